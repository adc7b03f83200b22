"""Exercises of notebook 07: what a step already knows, the way between two noises, and how much of a path a plane shows.

    x0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)                      Song et al. 2021 (DDIM), eq. 9
    slerp(a, b, f) = sin((1-f) theta)/sin(theta) a + sin(f theta)/sin(theta) b  Shoemake 1985
    share_k = s_k^2 / sum s^2,  s the singular values of the centred points     principal components
"""

import math

import torch

from labkit.checks.check import Check, seeded
from labkit.probes.between import slerp as labkit_slerp


def _arc(a, b, f, angle):
    return (((1 - f) * angle).sin() * a + (f * angle).sin() * b) / angle.sin()


def _shares(x, power: int = 2):
    s = torch.linalg.svdvals(x) ** power
    return s / s.sum()


preview = Check(
    "preview",
    reference=lambda x_t, eps, a: (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a),
    wrong={
        "The roots are missing: $\\bar\\alpha$ is a share of variance, the picture and the noise carry its root.": lambda x, e, a: (x - (1 - a) * e) / a,
        "The noise is taken away, but what remains is still scaled: divide by $\\sqrt{\\bar\\alpha_t}$.": lambda x, e, a: x - math.sqrt(1 - a) * e,
        "The two roots have changed places.": lambda x, e, a: (x - math.sqrt(a) * e) / math.sqrt(1 - a),
        "The noise is added; it is in $x_t$ already and must be taken away.": lambda x, e, a: (x + math.sqrt(1 - a) * e) / math.sqrt(a),
    },
    task="`preview` solves equation (1) for $x_0$: take the noise away, then undo the scale.",
    praise="That is all a preview is: no further call of the network.",
    cases=lambda: [(seeded(2, 4, 3, 3, seed=n), seeded(2, 4, 3, 3, seed=9 + n), a) for n, a in enumerate((0.9, 0.3, 0.01))],
)

slerp = Check(
    "slerp",
    reference=labkit_slerp,
    wrong={
        "That is the straight line: halfway it is shorter than both ends.": lambda a, b, f: (1 - f) * a + f * b,
        "The shares have changed places: f = 0 must give `a`.": lambda a, b, f: labkit_slerp(b, a, f),
        "That is the cosine, not the angle: take `arccos`.": lambda a, b, f: _arc(a, b, f, torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0)),
        "The division by $\\sin\\theta$ is missing.": lambda a, b, f: labkit_slerp(a, b, f) * torch.nn.functional.cosine_similarity(
            a.flatten(), b.flatten(), 0).arccos().sin(),
    },
    task="`slerp` goes the share `f` of the angle from `a` to `b`, equation (2).",
    praise="Every point on the way is as long as a draw should be.",
    cases=lambda: [(seeded(4, 3, 3, seed=n), seeded(4, 3, 3, seed=n + 5) + 0.6 * seeded(4, 3, 3, seed=n), f) for n, f in enumerate((0.0, 0.25, 0.5, 0.9))],
)

shares = Check(
    "shares",
    reference=lambda x: _shares(x - x.mean(0)),
    wrong={
        "The mean is still in it: the first direction then points from the origin to the cloud. Subtract `X.mean(0)`.": lambda x: _shares(x),
        "Singular values are lengths, variance goes with their squares.": lambda x: _shares(x - x.mean(0), 1),
        "You subtracted each point's own mean; subtract the mean of the points, `X.mean(0)`.": lambda x: _shares(x - x.mean(1, keepdim=True)),
        "Shares sum to 1: divide by the sum, not by the largest.": lambda x: (lambda s: s / s.max())(_shares(x - x.mean(0))),
    },
    task="`shares` gives the share of variance of each direction: centre the points (n, D), take singular values, square, divide by the sum.",
    praise="How much a picture of the first two directions shows is the sum of the first two.",
    cases=lambda: [(seeded(6, 9, seed=n) + 2 + torch.arange(6.0, dtype=torch.float64)[:, None],) for n in range(2)],
)
