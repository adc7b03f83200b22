"""Who copies from whom: how the attention of one prompt's tokens is carried over to another's.

    A*[n, j] = sum_i A_source[n, i] M[i, j] + own_j A_target[n, j]

A place n of the picture divides its attention among the tokens of the prompt. Prompt-to-Prompt (Hertz et al. 2022,
arXiv:2208.01626, sec. 3) gives the tokens of an edited prompt the maps that their counterparts have under the original one, so that
things stay where they are. Prompts are aligned word by word with the fewest changes (Levenshtein 1966), a word being what
`probes.words` calls one, and punctuation standing for itself:

    kept        the same word on both sides                 copies it
    replaced    another word in its place                   copies it too ("replace"), or keeps its own map ("refine")
    new         no counterpart                              keeps its own map, own_j = 1
    BOS, EOS, padding                                       copy BOS, EOS, padding, in order; surplus goes to the last one

n tokens for m: in order where n = m, else each of the m has one m-th of the n together. Whatever a place gave to kept and replaced
words is given on in full, so with no word new and none gone every row of A* sums to 1. Where words come or go, `mixed` normalises.
`reference=True` is the published code instead (`published.py`, which lists its quirks).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.editing import published
from labkit.errors import LabkitError
from labkit.models.tokenizer import Tokenizer, normalise
from labkit.probes.words import words

METHODS = ("replace", "refine")
PAD = "padding"


@dataclass(frozen=True, eq=False)
class Alignment:
    """From source to target: `matrix` M (L, L), `own` (L,) in {0, 1}, and what is at each position; prints as a table.

    `gone` and `new` are the tokens of source and target, by word, that have no equal on the other side.
    """

    matrix: Tensor
    own: Tensor
    pieces: tuple[tuple[str, ...], tuple[str, ...]]                        # of source and target, without padding
    gone: tuple[tuple[int, ...], ...] = ()
    new: tuple[tuple[int, ...], ...] = ()
    normalised: bool = True                                                # False: the published code, whose shares need not sum to 1

    def mixed(self, source: Tensor, target: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        """A* (..., L) of attention under both prompts; `strength`, a number or (L,), 0 to 1: how much of the edit each token takes.

        Shares sum to 1 where those given do. Equal to the last bit to `target` where prompts and attention are the same.
        """
        M, weight = self.matrix.to(source), strength * (1 - self.own.to(source))                       # (L, L), (L,)
        edited = torch.lerp(target, source @ M, weight.expand(target.shape[-1]).to(target))            # (..., L)
        if not self.normalised:
            return edited
        same = (edited == target).all(-1, keepdim=True)  # there the sum is 1 but for rounding, which is not to be divided by
        return torch.where(same, target, edited / edited.sum(-1, keepdim=True))

    def rows(self) -> list[tuple[str, str]]:
        """(token of the target, what it copies) in words; padding is one row."""
        before, after = self.pieces
        found = []
        for j, piece in enumerate(after):
            found.append((piece, "keeps its own map" if self.own[j] else self._copied(j, before)))
        pads = list(range(len(after), self.matrix.shape[1]))
        if pads:
            from_ = [i for i in range(len(before)) if bool(self.matrix[i, pads].any())]
            beside = f" and {', '.join(before[i] for i in from_)}" if from_ else ""
            found.append((f"{PAD} ({len(pads)})", f"{PAD} ({self.matrix.shape[0] - len(before)}){beside}"))
        return found

    def _copied(self, j: int, before: tuple[str, ...]) -> str:
        parts = []
        for i in self.matrix[:, j].nonzero().flatten().tolist():
            name, share = before[i] if i < len(before) else PAD, float(self.matrix[i, j])
            said = name if share == 1 else f"1/{round(1 / share)} of {name}"
            if said not in parts:
                parts.append(said)
        return " + ".join(parts) or "nothing"

    def __str__(self) -> str:
        rows = [("the target's", "copies the source's"), *self.rows()]
        width = max(len(left) for left, _ in rows)
        return "\n".join(f"{left:<{width}}   {right}" for left, right in rows)

    def _repr_html_(self) -> str:
        from html import escape

        body = "".join(f"<tr><td>{escape(left)}</td><td>{escape(right)}</td></tr>" for left, right in self.rows())
        return f"<table><thead><tr><th>the target's</th><th>copies the source's</th></tr></thead><tbody>{body}</tbody></table>"


def align(tokenizer: Tokenizer, source: str, target: str, method: str = "replace", reference: bool = False) -> Alignment:
    """The Alignment of two prompts; LabkitError if one is empty or longer than the tokenizer's context.

    `method`: whether a word that stands in another's place copies the other's map ("replace") or keeps its own ("refine").
    `reference`: exactly the numbers of the published code, which for "replace" needs as many words on both sides.
    """
    if method not in METHODS:
        raise LabkitError(f"The method is {method!r}: use 'replace' or 'refine'.")
    for text in (source, target):
        if not isinstance(text, str) or not text.strip():
            raise LabkitError(f"A prompt to align is {text!r}: give a text that is not empty.")
        if rest := tokenizer.cut(text):
            raise LabkitError(f"A prompt is too long to be aligned: {rest!r} is cut off; shorten it.")
    pieces = (as_typed(tokenizer, source), as_typed(tokenizer, target))
    before, after = units(tokenizer, source), units(tokenizer, target)
    pairs = fewest_changes([text for text, _ in before], [text for text, _ in after])
    gone = tuple(before[i][1] for i, j in pairs if i is not None and (j is None or before[i][0] != after[j][0]))
    new = tuple(after[j][1] for i, j in pairs if j is not None and (i is None or before[i][0] != after[j][0]))
    if reference:
        return _published(tokenizer, source, target, method, (pieces, gone, new))
    L = tokenizer.max_length
    M, own = torch.zeros(L, L), torch.zeros(L)
    for i, j in pairs:
        if j is None:
            continue
        if i is None or (method == "refine" and before[i][0] != after[j][0]):
            own[list(after[j][1])] = 1
        else:
            give(M, before[i][1], after[j][1])
    M[0, 0] = 1  # BOS
    give_in_order(M, range(len(pieces[0]) - 1, L), range(len(pieces[1]) - 1, L))  # EOS and padding
    return Alignment(M, own, pieces, gone, new)


def as_typed(tokenizer: Tokenizer, prompt: str) -> tuple[str, ...]:
    """The prompt's tokens from BOS to EOS as the characters that they came from."""
    tokens = tokenizer.encode(prompt)
    return tuple(piece if span is None else prompt[slice(*span)] for piece, span in zip(tokens.pieces, tokens.spans))


def units(tokenizer: Tokenizer, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
    """The prompt cut into words and single tokens of punctuation: (text, token positions) of each, in order."""
    found = [(normalise(w.text)[0], w.tokens) for w in words(tokenizer, prompt)]
    taken = {token for _, tokens in found for token in tokens}
    encoded = tokenizer.encode(prompt)
    found += [(piece, (i,)) for i, piece in enumerate(encoded.pieces[1:-1], start=1) if i not in taken]
    return sorted(found, key=lambda unit: unit[1])


def fewest_changes(before: Sequence[str], after: Sequence[str]) -> list[tuple[int | None, int | None]]:
    """Pairs (i, j) that lead from one list to the other with the fewest words replaced, added (None, j) and taken out (i, None).

    Of equally short ways the one that leaves the fewest words alone, then the one that keeps the most letters, then the one that
    pairs the latest words: "a cat" and "a fluffy dog" pair cat with dog.
    """

    def cost_if(i: int, j: int, di: int, dj: int) -> tuple[int, int, int]:
        """Of all up to i and j, the last ones a pair (di = dj = 1), added (0, 1) or taken out (1, 0): changes, words alone, letters kept."""
        changes, alone, kept = cost[i - di][j - dj]
        if di + dj == 1:
            return changes + 1, alone + 1, kept
        return (changes, alone, kept - len(after[j - 1])) if before[i - 1] == after[j - 1] else (changes + 1, alone, kept)

    ways = ((1, 1), (0, 1), (1, 0))
    cost = [[(i + j, i + j, 0) for j in range(len(after) + 1)] for i in range(len(before) + 1)]  # right where i or j is 0
    for i in range(1, len(before) + 1):
        for j in range(1, len(after) + 1):
            cost[i][j] = min(cost_if(i, j, *way) for way in ways)
    i, j, pairs = len(before), len(after), []
    while i or j:
        di, dj = next(way for way in ways if i >= way[0] and j >= way[1] and cost_if(i, j, *way) == cost[i][j])
        i, j = i - di, j - dj
        pairs.append((i if di else None, j if dj else None))
    return pairs[::-1]


def give(M: Tensor, from_: tuple[int, ...], to: tuple[int, ...]) -> None:
    """Enter into M that tokens `to` share what tokens `from_` have: one by one where they are as many, else evenly."""
    if len(from_) == len(to):
        M[list(from_), list(to)] = 1
    else:
        M[torch.tensor(from_)[:, None], torch.tensor(to)] = 1 / len(to)


def give_in_order(M: Tensor, from_: range, to: range) -> None:
    """Enter into M that token by token is copied; the last one of the shorter side stands for what is left of the longer one."""
    n = min(len(from_), len(to))
    M[list(from_[: n - 1]), list(to[: n - 1])] = 1
    M[torch.tensor(from_[n - 1 :])[:, None], torch.tensor(to[n - 1 :])] = 1 / (len(to) - n + 1)


def _published(tokenizer: Tokenizer, source: str, target: str, method: str, about: tuple) -> Alignment:
    L = tokenizer.max_length
    if method == "replace":
        return Alignment(published.replacement(tokenizer, source, target), torch.zeros(L), *about, normalised=False)
    m, a = published.refinement(tokenizer, source, target)
    M = torch.zeros(L, L)
    M[m[a == 1], torch.arange(L)[a == 1]] = 1
    return Alignment(M, 1 - a, *about, normalised=False)
