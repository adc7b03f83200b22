"""Exercises of notebook 09: attention carried over from one prompt to another, in which steps, and where the edit is let in.

    A*[n, j] = sum_i A_source[n, i] M[i, j] + own_j A_target[n, j]                              Hertz et al. 2022, sec. 3
    in step i of T, i = 0 the noisiest:  round(a T) <= i < round(b T)                           eq. 6 there
    m = 1 where (a - min a) / (max a - min a) > threshold for the source's or the target's map, each picture by its own range
"""

import torch
from torch import Tensor

from labkit.checks.check import Check, seeded
from labkit.editing.blend import mask as labkit_mask
from labkit.editing.control import in_steps


def _prompts(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention (2 heads, 6 places, L tokens) of both prompts, and who copies from whom: token 1 is 2 and 3, token 4 is new, 5 is 3."""
    M = torch.zeros(6, 6, dtype=torch.float64)
    M[0, 0], M[1, 2], M[1, 3], M[3, 5], M[4, 1], M[2, 1], M[5, 1] = 1, 0.5, 0.5, 1, 1, 1, 1
    own = torch.tensor([0, 0, 0, 0, 1, 0], dtype=torch.float64)
    return seeded(2, 6, 6, seed=n).softmax(-1), seeded(2, 6, 6, seed=50 + n).softmax(-1), M, own


carry = Check(
    "carry",
    reference=lambda A_source, A_target, M, own: A_source @ M + own * A_target,
    wrong={
        "You multiplied by the transpose: row i of M is a token of the source, column j one of the target, so it is `A_source @ M`. Where each word has one "
        "counterpart in its own place M is symmetric, and nobody sees it.": lambda s, t, M, own: s @ M.T + own * t,
        "The new words are missing: what has no counterpart in the source keeps its own map, `own * A_target`.": lambda s, t, M, own: s @ M,
        "The two prompts have changed places: the *source's* attention goes through M, the target keeps its own where it is new.": lambda s, t, M, own: t @ M + own * s,
        "The target's own map is added everywhere: only where `own` is 1.": lambda s, t, M, own: s @ M + t,
        "`own` is the wrong way round: 1 where the target keeps its own map.": lambda s, t, M, own: s @ M + (1 - own) * t,
        "The source's maps are taken place by place, without M: then token j copies token j, whatever stands there.": lambda s, t, M, own: (1 - own) * s + own * t,
        "M is on the wrong side: it mixes tokens, the last axis, not places.": lambda s, t, M, own: M @ s + own * t,
        "You made the rows sum to one again. Equation (1) does not: what M leaves out is missing from the sum, and that is meant.": lambda s, t, M, own: (
            (a := s @ M + own * t) / a.sum(-1, keepdim=True)),
        "`own` is 1 for the tokens that keep the *target's* map; you gave those the source's.": lambda s, t, M, own: (
            own * s + (1 - own) * t),
        "M is missing: the source's maps as they stand, and the target's added.": lambda s, t, M, own: s + own * t,
    },
    task="`carry` gives the target's tokens the source's maps, equation (1): `A_source` and `A_target` are (..., N, L), `M` is (L, L), `own` is (L,).",
    praise="one product and one sum: all the rest of the method is to say what M is, and when.",
    cases=lambda: [_prompts(n) for n in range(2)],
)

WINDOWS = ((0.0, 0.4), (0.0, 0.75), (0.2, 0.8), (0.0, 1.0), (0.5, 0.5))

shared = Check(
    "shared",
    reference=lambda T, a, b: in_steps((a, b), T).float(),
    wrong={
        "That is the other end of time: i = 0 is the *noisiest* step, and the window is counted from there.": lambda T, a, b: in_steps((a, b), T).float().flip(0),
        "The last step of the window is outside: i < round(b T), so that b = 0.5 of 8 steps are four.": (
            lambda T, a, b: ((torch.arange(T) >= round(a * T)) & (torch.arange(T) <= round(b * T))).float()),
        "The begin is not looked at: steps before round(a T) are not shared.": lambda T, a, b: (torch.arange(T) < round(b * T)).float(),
        "You cut off where rounding is wanted: 0.75 of 10 steps is 8, and `int` gives 7.": lambda T, a, b: ((torch.arange(T) >= int(a * T)) & (torch.arange(T) < int(b * T))).float(),
        "That is the published code's count, of T + 1 steps: one step more than asked for, at times.": (
            lambda T, a, b: ((torch.arange(T) >= int(a * (T + 1))) & (torch.arange(T) < int(b * (T + 1)))).float()),
        "Inside and outside are exchanged: 1 where the maps are shared.": lambda T, a, b: 1 - in_steps((a, b), T).float(),
        "a and b are shares, from 0 to 1; you compared step numbers with them: multiply by T first.": lambda T, a, b: (
            ((torch.arange(T) >= a) & (torch.arange(T) < b)).float()),
        "The first step of the window is inside: `>=`, not `>`.": lambda T, a, b: ((torch.arange(T) > round(a * T)) & (torch.arange(T) < round(b * T))).float(),
        "You did not round: 0.4 of 8 steps is 3.2, which rounds to 3, and step 3 is outside.": lambda T, a, b: (
            ((torch.arange(T) >= a * T) & (torch.arange(T) < b * T)).float()),
    },
    task="`shared` says in which of T steps maps are shared, a tensor (T,) of 0 and 1, equation (2): 1 where round(a T) <= i < round(b T).",
    praise="a and b are shares of the *steps*, so that the same edit can be drawn with more of them.",
    cases=lambda: [(T, a, b) for T in (8, 10) for a, b in WINDOWS],
)


def _maps(n: int) -> tuple[Tensor, Tensor, float]:
    """Attention to some word (2 pictures, 5, 5), with a floor under it and different heights, of both sides."""
    heights = torch.tensor([1.0, 0.4], dtype=torch.float64)[:, None, None]
    return heights * (0.3 + seeded(2, 5, 5, seed=n).sigmoid()), 0.7 * heights * (0.3 + seeded(2, 5, 5, seed=9 + n).sigmoid()), (0.3, 0.6)[n]


def _labkit(a: Tensor, threshold: float, reference: bool = False) -> Tensor:
    """labkit's own mask of one side's maps, without its pooling: each value stands alone in a field of 3x3 (blend.py pools over 3x3)."""
    apart = a.repeat_interleave(3, 1).repeat_interleave(3, 2)  # (S, 3 y, 3 x): in the middle of each field the pool sees that field alone
    return labkit_mask(apart[..., None], (0,), tuple(apart.shape[1:]), threshold, reference)[:, 1::3, 1::3]


def _by(a: Tensor, threshold: float, dims: tuple[int, ...] = (1, 2)) -> Tensor:
    low, high = a.amin(dims, keepdim=True), a.amax(dims, keepdim=True)
    return ((a - low) / (high - low) > threshold).double()


def _together(s: Tensor, t: Tensor, threshold: float) -> Tensor:
    low, high = torch.minimum(s, t).amin((1, 2), keepdim=True), torch.maximum(s, t).amax((1, 2), keepdim=True)
    return ((torch.maximum(s, t) - low) / (high - low) > threshold).double()


let_in = Check(
    "let_in",
    reference=lambda a_source, a_target, threshold: torch.maximum(_labkit(a_source, threshold), _labkit(a_target, threshold)),
    wrong={
        "You took the places that both maps have; the edit is let in where *either* has it: the old thing must go, the new one must come.": (
            lambda s, t, h: _by(s, h) * _by(t, h)),
        "Only the target's map is looked at: where the old thing was and the new one is not, the old one would stay.": lambda s, t, h: _by(t, h),
        "Only the source's map is looked at: the new thing may stand elsewhere or be larger.": lambda s, t, h: _by(s, h),
        "You divided by the maximum alone, as the published code does: a small model spreads its attention, and then everything is let in. Take the minimum off first.": (
            lambda s, t, h: torch.maximum(_labkit(s, h, True), _labkit(t, h, True))),
        "The threshold is a share of the map's own range, from min to max; you compared the attention itself with it.": lambda s, t, h: torch.maximum((s > h).double(), (t > h).double()),
        "One range for the whole batch: then a picture's mask depends on its neighbours.": lambda s, t, h: torch.maximum(_by(s, h, (0, 1, 2)), _by(t, h, (0, 1, 2))),
        "One range for both sides: the two words have maps of different heights; each goes by its own.": _together,
        "That is the opposite: 1 where the edit is let *in*.": lambda s, t, h: 1 - torch.maximum(_by(s, h), _by(t, h)),
        "Both masks are added, and where both are 1 the sum is 2: take the larger, or clamp.": lambda s, t, h: _by(s, h) + _by(t, h),
        "The comparison is the wrong way round: high attention is let in.": lambda s, t, h: torch.maximum(1 - _by(s, h), 1 - _by(t, h)),
        "You added the maps before comparing; each side is compared by itself, and either is enough.": lambda s, t, h: _by(s + t, h),
        "The range goes over places, `(1, 2)`; you took it over pictures.": lambda s, t, h: torch.maximum(_by(s, h, (0,)), _by(t, h, (0,))),
        "That is a soft mask; it has only 0 and 1 in it: compare with the threshold.": lambda s, t, h: torch.maximum(
            *((a - a.amin((1, 2), keepdim=True)) / (a.amax((1, 2), keepdim=True) - a.amin((1, 2), keepdim=True)) for a in (s, t))),
    },
    task="`let_in` makes the mask (S, y, x) of 0 and 1, equation (3), of the words' maps (S, y, x) in the source and in the target: each picture by its own range.",
    praise="the union of two masks, because something has to go and something has to come.",
    cases=lambda: [_maps(n) for n in range(2)],
)
