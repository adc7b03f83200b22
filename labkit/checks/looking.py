"""Exercises of notebook 08: from queries and keys to a map of attention, from many maps to a word's heat map, from that to a score.

    A = softmax(q k^T / sqrt(d))                                                    over tokens; Vaswani et al. 2017, eq. 1
    m = mean over layers of upsample( mean over heads of sum over tokens of A )     labkit.probes.heatmap
    IoU = |{m > tau max(m)} and M| / |{m > tau max(m)} or M|                        labkit.measure.grounding
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.checks.check import Check, seeded
from labkit.probes.heatmap import average

attention_map = Check(
    "attention_map",
    reference=lambda q, k: (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1),
    wrong={
        "The softmax runs over places; each *place* divides its attention, so it runs over the tokens, the last axis.": (
            lambda q, k: (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-2)),
        "$1/\\sqrt d$ is missing: without it a few tokens take nearly everything.": lambda q, k: (q @ k.transpose(-1, -2)).softmax(-1),
        "You divided by d; it is by its square root.": lambda q, k: (q @ k.transpose(-1, -2) / q.shape[-1]).softmax(-1),
        "Those are the scores before the softmax: no shares yet.": lambda q, k: q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5,
        "The heads were averaged; keep them apart, the next exercise needs them.": (
            lambda q, k: (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(0, keepdim=True).expand(q.shape[0], -1, -1)),
        "d is the channels of one head, the last axis of q, and not the number of tokens.": lambda q, k: (q @ k.transpose(-1, -2) / k.shape[-2] ** 0.5).softmax(-1),
    },
    task="`attention_map` makes shares (head, place, token) of q (head, place, d) and k (head, token, d), equation (1).",
    praise="at every place the shares of all tokens add up to one. Remember that; it is behind most surprises below.",
    cases=lambda: [(2 * seeded(2, 9, 4, seed=n), seeded(2, 5, 4, seed=10 + n)) for n in range(2)],
)  # fmt: skip


def _words(maps: list[Tensor], tokens: tuple[int, ...]) -> list[Tensor]:
    return [m[..., list(tokens)].sum(-1) for m in maps]


def _up(m: Tensor, size: tuple[int, int], **how) -> Tensor:
    return F.interpolate(m[None, None], size=size, **(how or {"mode": "bilinear", "align_corners": False}))[0, 0]


def _layers(maps: list[Tensor], size: tuple[int, int], **how) -> Tensor:
    return torch.stack([_up(m, size, **how) for m in maps])


def _maps(n: int) -> list[Tensor]:
    shapes = ((2, 4, 4, 6), (3, 2, 2, 6), (3, 2, 2, 6))  # layers differ in size and in their number of heads
    return [seeded(*shape, seed=3 * n + i).softmax(-1) for i, shape in enumerate(shapes)]


heat_map = Check(
    "heat_map",
    reference=lambda maps, tokens, size: average(_words(maps, tokens), size),
    wrong={
        "The word's tokens were averaged; attention is a share, and the shares of a word's pieces are added.": (
            lambda maps, tokens, size: average(_words(maps, tokens), size) / len(tokens)),
        "Only the word's first token is looked at.": lambda maps, tokens, size: average(_words(maps, tokens[:1]), size),
        "The token positions are one too low: BOS is token 0.": lambda maps, tokens, size: average(_words(maps, [t - 1 for t in tokens]), size),
        "The heads were added; take their mean, or layers with many heads count more.": (
            lambda maps, tokens, size: _layers([m.sum(0) for m in _words(maps, tokens)], size).mean(0)),
        "The strongest head was taken at each place; it is the mean over heads.": (
            lambda maps, tokens, size: _layers([m.amax(0) for m in _words(maps, tokens)], size).mean(0)),
        "The layers were added; with their mean the map stays a share.": lambda maps, tokens, size: average(_words(maps, tokens), size) * len(maps),
        "`align_corners=True` moves the centres of places; a place is an area, so it is False.": (
            lambda maps, tokens, size: _layers([m.mean(0) for m in _words(maps, tokens)], size, mode="bilinear", align_corners=True).mean(0)),
        "That is nearest-neighbour, `interpolate`'s default: say `mode=\"bilinear\"`.": (
            lambda maps, tokens, size: _layers([m.mean(0) for m in _words(maps, tokens)], size, mode="nearest").mean(0)),
        "You divided by the maximum, as Prompt-to-Prompt does for display: then a word that nobody looks at seems to glow.": (
            lambda maps, tokens, size: (m := average(_words(maps, tokens), size)) / m.max()),
    },
    task="`heat_map` makes one map of `size` of a list of maps (head, y, x, token): add the word's tokens, mean over heads, upsample, mean over layers, equation (2).",
    praise="a share between 0 and 1; the maps of all tokens add up to one at every place.",
    cases=lambda: [(_maps(0), (2, 3), (4, 4)), (_maps(1), (5,), (8, 8))],
)  # fmt: skip


def _counts(m: Tensor, mask: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    inside = m > tau * m.max()
    return (inside & mask).sum(), inside.sum(), mask.sum()


def _dice(m: Tensor, mask: Tensor, tau: float) -> Tensor:
    both, a, b = _counts(m, mask, tau)
    return 2 * both / (a + b)


def _twice(m: Tensor, mask: Tensor, tau: float) -> Tensor:
    both, a, b = _counts(m, mask, tau)
    return both / (a + b)


def _absolute(m: Tensor, mask: Tensor, tau: float) -> Tensor:
    inside = m > tau
    return (inside & mask).sum() / (inside | mask).sum()


iou = Check(
    "iou",
    reference=lambda m, mask, tau: ((m > tau * m.max()) & mask).sum() / ((m > tau * m.max()) | mask).sum(),
    wrong={
        "The threshold is `tau` itself; it is `tau` times the maximum of the map.": _absolute,
        "That is recall: you divided by the mask. Divide by the union.": lambda m, mask, tau: (c := _counts(m, mask, tau))[0] / c[2],
        "That is precision: you divided by what the map found. Divide by the union.": lambda m, mask, tau: (c := _counts(m, mask, tau))[0] / c[1],
        "That is Dice, $2|A\\cap B|/(|A|+|B|)$, which is always the larger of the two.": _dice,
        "The union is not the sum of both: the intersection was counted twice.": _twice,
        "That is the share of places where map and mask agree; an empty map would do well on a small object.": (
            lambda m, mask, tau: ((m > tau * m.max()) == mask).double().mean()),
    },
    task="`iou` cuts the map at `tau` times its maximum and divides intersection by union with the mask, equation (3).",
    praise="0 is no overlap, 1 the very same places.",
    cases=lambda: [(0.3 * seeded(6, 6, seed=n).abs(), seeded(6, 6, seed=20 + n) > 0.2, tau) for n, tau in enumerate((0.2, 0.4, 0.6))],
)  # fmt: skip
