"""Exercises of notebook 06: guidance, what it does to the size of the answer, and the part of it that points elsewhere.

    eps = eps_u + w (eps_c - eps_u)                                             Ho & Salimans 2022, with w + 1 there for w here
    eps' = phi eps std(eps_c) / std(eps) + (1 - phi) eps                        Lin et al. 2023, eq. 15 and 16
    d = eps_c - eps_u,    d_par = (d . eps_c / |eps_c|^2) eps_c,    d_orth = d - d_par          one dot product for each picture
    guide where low <= t <= high only                                           Kynkaanniemi et al. 2024
"""

from torch import Tensor

from labkit.checks.check import Check, seeded
from labkit.guidance import rescaled as labkit_rescaled


def _pair(n: int) -> tuple[Tensor, Tensor]:
    eps_u = seeded(2, 4, 3, 3, seed=n)
    return eps_u, eps_u + 0.3 * seeded(2, 4, 3, 3, seed=30 + n)


guide = Check(
    "guide",
    reference=lambda eps_u, eps_c, w: eps_u + w * (eps_c - eps_u),
    wrong={
        "That is $\\epsilon_c + w(\\epsilon_c-\\epsilon_u)$, the paper's own letter: its w is one less. With it, w = 1 is not the plain conditional answer.": (
            lambda u, c, w: c + w * (c - u)),
        "The sign of the second term: it is $w\\,\\epsilon_c + (1-w)\\,\\epsilon_u$. You have (w - 1), an error that stands in a well-known course, in twelve places.": (
            lambda u, c, w: w * c + (w - 1) * u),
        "The two answers have changed places: you walk away from the sentence.": lambda u, c, w: c + w * (u - c),
        "The unconditional answer is missing: start from $\\epsilon_u$.": lambda u, c, w: w * (c - u),
        "That is the conditional answer, multiplied; guidance multiplies the *difference*.": lambda u, c, w: w * c,
        "You divided by w to make a mean of it. It is no mean: for w > 1 it goes beyond the conditional answer, and that is the point.": lambda u, c, w: (u + w * c) / (1 + w),
        "The difference is subtracted.": lambda u, c, w: u - w * (c - u),
        "That is the difference alone: multiply it by `w`, and add it to $\\epsilon_u$.": lambda u, c, w: c - u,
    },
    task="`guide` makes one answer of two, equation (1): start at `eps_u`, go `w` times the way to `eps_c`.",
    praise="w = 0 is nobody listening, 1 the network's own answer, above it is exaggeration.",
    cases=lambda: [(*_pair(n), w) for n, w in enumerate((0.0, 1.0, 7.5, -1.0))],
)


def _spread(x: Tensor) -> Tensor:
    return x.std(dim=(1, 2, 3), keepdim=True)


rescale = Check(
    "rescale",
    reference=labkit_rescaled,
    wrong={
        "The ratio is upside down: the guided answer is too large, so it is multiplied by $\\operatorname{std}(\\epsilon_c)/\\operatorname{std}(\\epsilon)$.": (
            lambda e, c, phi: phi * e * _spread(e) / _spread(c) + (1 - phi) * e),
        "That is the full correction; only the share $\\phi$ of it is wanted, mixed with $1-\\phi$ of the answer as it was.": lambda e, c, phi: e * _spread(c) / _spread(e),
        "One spread for the whole batch; take one for each picture, or pictures depend on their neighbours.": lambda e, c, phi: phi * e * c.std() / e.std() + (1 - phi) * e,
        "$\\phi$ and $1-\\phi$ have changed places.": lambda e, c, phi: (1 - phi) * e * _spread(c) / _spread(e) + phi * e,
        "You mixed with $\\epsilon_c$; what is mixed in is the guided answer before the correction.": lambda e, c, phi: phi * e * _spread(c) / _spread(e) + (1 - phi) * c,
        "You used the variance; the ratio is of standard deviations.": lambda e, c, phi: phi * e * (_spread(c) / _spread(e)) ** 2 + (1 - phi) * e,
        "You mixed the two answers; what is mixed is the guided answer with *itself*, its spread corrected.": lambda e, c, phi: phi * c + (1 - phi) * e,
        "The share $1-\\phi$ of the answer as it was is missing.": lambda e, c, phi: phi * e * _spread(c) / _spread(e),
        "One spread for each channel; it is one for each picture, or channels lose their proportions.": lambda e, c, phi: (
            phi * e * c.std((2, 3), keepdim=True) / e.std((2, 3), keepdim=True) + (1 - phi) * e),
    },
    task="`rescale` gives the guided answer the spread of `eps_c` back, by the share `phi`, equation (3). One spread for each picture: `.std(dim=(1, 2, 3), keepdim=True)`.",
    praise="0.7 is what the paper found best, for its own model.",
    cases=lambda: [(u + w * (c - u), c, phi) for n, (w, phi) in enumerate(((7.5, 0.7), (3.0, 1.0), (15.0, 0.2))) for u, c in [_pair(n)]],
)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1).view(-1, 1, 1, 1)


apart = Check(
    "apart",
    reference=lambda u, c: ((p := _dot(c - u, c) / _dot(c, c) * c), c - u - p),
    wrong={
        "You divided by the length; a projection divides by its square.": lambda u, c: ((p := _dot(c - u, c) / _dot(c, c).sqrt() * c), c - u - p),
        "You projected onto $\\epsilon_u$; it is onto $\\epsilon_c$.": lambda u, c: ((p := _dot(c - u, u) / _dot(u, u) * u), c - u - p),
        "One dot product for the whole batch; each picture has its own.": lambda u, c: ((p := ((c - u) * c).sum() / (c * c).sum() * c), c - u - p),
        "The two parts have changed places: the one along $\\epsilon_c$ comes first.": lambda u, c: (c - u - (p := _dot(c - u, c) / _dot(c, c) * c), p),
        "You split the negative difference: it is $\\epsilon_c-\\epsilon_u$.": lambda u, c: ((p := _dot(u - c, c) / _dot(c, c) * c), u - c - p),
        "Those are $\\epsilon_c$'s own parts; what is split is the difference $\\epsilon_c-\\epsilon_u$.": lambda u, c: ((p := _dot(c, u) / _dot(u, u) * u), c - p),
        "The second is the rest of $\\epsilon_c$; it is the rest of the *difference*, $d-d_\\parallel$.": lambda u, c: ((p := _dot(c - u, c) / _dot(c, c) * c), c - p),
        "That is halves of the difference; one part points along $\\epsilon_c$, the other at right angles to it.": lambda u, c: ((c - u) / 2, (c - u) / 2),
    },
    task="`apart` splits the difference $\\epsilon_c-\\epsilon_u$ into two: the part along $\\epsilon_c$, and the rest, equation (2). Returns both.",
    praise="the first only makes the answer larger; the second is what the words have to say.",
    cases=lambda: [_pair(n) for n in range(2)],
)

where = Check(
    "where",
    reference=lambda t, low, high, guided, plain: guided if low <= t <= high else plain,
    wrong={
        "The wrong way round: guided *inside* the interval, plain outside.": lambda t, low, high, guided, plain: plain if low <= t <= high else guided,
        "Only the upper end is looked at: below `low` the answer is plain too.": lambda t, low, high, guided, plain: guided if t <= high else plain,
        "Only the lower end is looked at: above `high` the answer is plain too.": lambda t, low, high, guided, plain: guided if t >= low else plain,
        "The ends belong to the interval.": lambda t, low, high, guided, plain: guided if low < t < high else plain,
        "The upper end belongs to the interval too: `t <= high`.": lambda t, low, high, guided, plain: guided if low <= t < high else plain,
        "The lower end belongs to the interval too: `low <= t`.": lambda t, low, high, guided, plain: guided if low < t <= high else plain,
        "Outside and on the ends you guide; it is inside that is guided.": lambda t, low, high, guided, plain: guided if t <= low or t >= high else plain,
        "It is always guided: the interval is not looked at.": lambda t, low, high, guided, plain: guided.clone(),
    },
    task="`where` returns `guided` where `low <= t <= high` and `plain` elsewhere.",
    praise="and outside the interval half of the work is saved, for no unconditional answer is needed.",
    cases=lambda: [(t, 200, 800, seeded(3), seeded(3, seed=1)) for t in (999, 800, 500, 200, 199, 0)],
)
