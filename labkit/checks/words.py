"""Exercises of notebook 04: byte-pair encoding, the causal mask, CLIP's activation, heads, and cross-attention.

    while some neighbouring pair is in the list: join the pair of the lowest rank, leftmost first     Sennrich et al. 2016
    A = softmax(scores with -inf where the key comes after the query)                                 Radford et al. 2018
    quick_gelu(x) = x sigmoid(1.702 x)                                                                CLIP's code, 2021
    Attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V                                                   Vaswani et al. 2017, eq. 1
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from labkit.checks.check import Check, seeded

MERGES = [("e", "r</w>"), ("l", "o"), ("lo", "w"), ("n", "e"), ("ne", "w"), ("w", "er</w>"), ("low", "er</w>"), ("e", "w"), ("b", "l"), ("u", "e</w>")]
WORDS = ("lower", "newer", "blue", "blow", "wow", "new")


def _symbols(word: str) -> list[str]:
    return [*word[:-1], word[-1] + "</w>"]


def _join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """The leftmost occurrence of the pair joined."""
    i = next(i for i, p in enumerate(zip(symbols, symbols[1:])) if p == pair)
    return [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


def _merge(word: str, merges: list, best=min, times: int = 10**6, symbols=_symbols) -> list[str]:
    pieces = symbols(word)
    for _ in range(times):
        known = [pair for pair in zip(pieces, pieces[1:]) if pair in merges]
        if not known:
            break
        pieces = _join(pieces, best(known, key=merges.index))
    return pieces


def _one_pass(word: str, merges: list) -> list[str]:
    """Goes through the list once and joins what it finds, never returning to an earlier entry."""
    pieces = _symbols(word)
    for pair in reversed(merges):
        while pair in list(zip(pieces, pieces[1:])):
            pieces = _join(pieces, pair)
    return pieces


bpe = Check(
    "bpe",
    reference=_merge,
    wrong={
        "You join the pair of the *highest* rank; the list is sorted, its first entries are joined first.": lambda word, merges: _merge(word, merges, max),
        "You join the leftmost pair that is in the list; it is the pair that stands *earliest in the list*.": lambda word, merges: (
            _merge(word, merges, lambda pairs, key: pairs[0])),
        "You join once and stop; go on until no pair of neighbours is in the list.": lambda word, merges: _merge(word, merges, times=1),
        "The end of the word is not marked: the last symbol carries `</w>`, so that `er` in the middle and at the end of a word differ.": lambda word, merges: (
            _merge(word, merges, symbols=list)),
        "Nothing is joined: these are single letters.": lambda word, merges: _symbols(word),
        "You go through the list from its end.": _one_pass,
    },
    task="`bpe` cuts a word into letters, the last one with `</w>`, then joins neighbours: always the pair that stands earliest in `merges`, until none is left. A list of pieces.",
    praise="no word is unknown to this: at worst it stays in letters.",
    cases=lambda: [(word, list(MERGES)) for word in WORDS],
)


def _mask(L: int, diagonal: int = 1) -> Tensor:
    return torch.ones(L, L, dtype=torch.bool).triu(diagonal)


def _masked(scores: Tensor, mask: Tensor, value: float = float("-inf"), dim: int = -1) -> Tensor:
    return scores.masked_fill(mask, value).softmax(dim)


causal = Check(
    "causal",
    reference=lambda scores: _masked(scores, _mask(scores.shape[-1])),
    wrong={
        "The mask is upside down: you hide the past and show the future.": lambda s: _masked(s, _mask(s.shape[-1]).T),
        "A token has to see itself: start the mask one above the diagonal. (Your first row is all NaN: it sees nothing.)": lambda s: _masked(s, _mask(s.shape[-1], 0)),
        "There is no mask: every token sees all of them.": lambda s: s.softmax(-1),
        "You put 0 where $-\\infty$ belongs: a score of 0 still gets $e^0$.": lambda s: _masked(s, _mask(s.shape[-1]), 0.0),
        "You masked *after* the softmax: the rows no longer sum to one.": lambda s: s.softmax(-1).masked_fill(_mask(s.shape[-1]), 0.0),
        "The softmax runs over the queries; every query divides *its* attention among the keys, `dim=-1`.": lambda s: _masked(s, _mask(s.shape[-1]), dim=-2),
        "The scores are masked but not yet normalised: the softmax is missing.": lambda s: s.masked_fill(_mask(s.shape[-1]), float("-inf")),
    },
    task="`causal` makes attention of scores (..., L, L), rows are queries: what comes after a token gets no share, and each row sums to one.",
    praise="so the state of a token depends on what came before it and on nothing else.",
    cases=lambda: [(seeded(5, 5),), (seeded(2, 3, 4, 4, seed=1),)],
)

quick_gelu = Check(
    "quick_gelu",
    reference=lambda x: x * torch.sigmoid(1.702 * x),
    wrong={
        "That is SiLU (swish), $x\\,\\sigma(x)$: the 1.702 is missing.": F.silu,
        "That is the exact GELU. Near, but CLIP was trained with the quick one, and the difference adds up over its layers.": F.gelu,
        "That is the GELU with tanh; CLIP's has the logistic function.": lambda x: F.gelu(x, approximate="tanh"),
        "The factor x in front is missing: a gate needs something to let through.": lambda x: torch.sigmoid(1.702 * x),
        "That is ReLU: everything below zero is cut.": F.relu,
    },
    task="`quick_gelu` is $x\\,\\sigma(1.702\\,x)$ with the logistic function $\\sigma$, `torch.sigmoid`.",
    praise="OpenAI's CLIP has this one, OpenCLIP the exact GELU; weights of one do not fit the other.",
    cases=lambda: [(torch.linspace(-4, 4, 33, dtype=torch.float64),)],
    tolerance=1e-6,
)

split_heads = Check(
    "split_heads",
    reference=lambda x, h: rearrange(x, "b n (h d) -> b h n d", h=h),
    wrong={
        "`view(B, h, N, d)` cuts across places: numbers of one place end up in other heads' places. Split the last axis first, then move it.": lambda x, h: (
            x.reshape(x.shape[0], h, x.shape[1], -1)),
        "The channels are dealt out in turn; head 0 has the *first* d of them: \"(h d)\", not \"(d h)\".": lambda x, h: rearrange(x, "b n (d h) -> b h n d", h=h),
        "The heads stand behind the places: (B, N, h, d). Move them in front.": lambda x, h: rearrange(x, "b n (h d) -> b n h d", h=h),
        "The last two axes have changed places: (B, h, d, N).": lambda x, h: rearrange(x, "b n (h d) -> b h d n", h=h),
    },
    task="`split_heads` turns (B, N, h d) into (B, h, N, d), equation (3): each head gets d neighbouring channels of every place.",
    praise="`rearrange` says what it does; `view` and `transpose` leave it to the reader.",
    cases=lambda: [(seeded(2, 6, 12), 3), (seeded(1, 4, 8, seed=1), 2)],
)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale=lambda d: d**-0.5, dim: int = -1) -> Tensor:
    return (q @ k.transpose(-1, -2) * scale(q.shape[-1])).softmax(dim) @ v


cross_attention = Check(
    "cross_attention",
    reference=F.scaled_dot_product_attention,
    wrong={
        "The scores are not divided by $\\sqrt d$: the softmax gets too sharp, the more so the larger d.": lambda q, k, v: _attention(q, k, v, lambda d: 1.0),
        "You divided by d; it is by its root.": lambda q, k, v: _attention(q, k, v, lambda d: 1 / d),
        "You multiplied by $\\sqrt d$.": lambda q, k, v: _attention(q, k, v, lambda d: d**0.5),
        "The softmax runs over the places; each *place* divides its attention among the tokens, `dim=-1`.": lambda q, k, v: _attention(q, k, v, dim=-2),
        "d is the width of one head, `q.shape[-1]`; you used the number of tokens.": lambda q, k, v: _attention(q, k, v, lambda d: k.shape[-2] ** -0.5),
        "Those are the shares A; what a place takes up are the *values* in these shares, A V.": lambda q, k, v: _attention(q, k, torch.eye(k.shape[-2], dtype=v.dtype)),
        "You took up the keys; keys are for finding, values for taking.": lambda q, k, v: _attention(q, k, k),
        "There is no softmax: shares have to be positive and sum to one.": lambda q, k, v: q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 @ v,
        "Queries and keys have changed places: the places ask, the tokens answer.": lambda q, k, v: _attention(k, q, q),
    },
    task="`cross_attention` of q (..., N, d), k and v (..., L, d): equation (4), the softmax over the L tokens.",
    praise="this line is the only door through which words reach the picture.",
    cases=lambda: [(2 * seeded(2, 7, 16, seed=n), 2 * seeded(2, 4, 16, seed=10 + n), seeded(2, 4, 16, seed=20 + n)) for n in range(2)],
)
