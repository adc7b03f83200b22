"""Prompt-to-Prompt's published code, number by number: its mappers and time table, with their quirks.

    replace:  A*[n, j] = sum_i A_source[n, i] M[i, j]                        refine:  A*[n, j] = a_j A_source[n, m_j] + (1 - a_j) A_target[n, j]

Hertz et al. 2022, "Prompt-to-Prompt Image Editing with Cross Attention Control", and the code published with it (`seq_aligner.py`,
`ptp_utils.py`). It is here to compare with; `alignment.py` has what labkit does. What differs:

    words are what single spaces part, so "cat," is not "cat"; a piece belongs to the word in which the letters counted so far fall
    M behind the last changed word is the identity, also where the words had different numbers of tokens: maps then go to the wrong
    words, and the shares of a place no longer add up to 1 (1 token for 3: the row sums of "on" and "mat" are 0; 3 for 1: some are 2)
    refine: where the target is shorter, its padding copies words of the source; a word put in the place of another keeps its own map
    shares are never normalised again
    the time table has T + 1 rows and counts int(b (T + 1)) steps, while self-attention counts int(b T)
"""

import torch
from torch import Tensor

from labkit.errors import LabkitError
from labkit.models.tokenizer import Tokenizer


def word_tokens(tokenizer: Tokenizer, text: str, word: str | int) -> list[int]:
    """Token positions (BOS is 0) of every word that is `word`, or of the word of that number, as `get_word_inds` counts them."""
    words = text.split(" ")
    wanted = [k for k, w in enumerate(words) if w == word] if isinstance(word, str) else [word]
    found, k, letters = [], 0, 0
    if not wanted:
        return found
    for i, token in enumerate(tokenizer.tokenize(text).ids):
        letters += len(tokenizer.decode([token]).strip("#"))
        if k in wanted:
            found.append(i + 1)
        if k < len(words) and letters >= len(words[k]):
            k, letters = k + 1, 0
    return found


def replacement(tokenizer: Tokenizer, source: str, target: str) -> Tensor:
    """The matrix M (L, L) of `get_replacement_mapper`; LabkitError unless both prompts have as many words."""
    before, after, L = source.split(" "), target.split(" "), tokenizer.max_length
    if len(before) != len(after):
        raise LabkitError(f"The published replacement needs as many words on both sides, these have {len(before)} and {len(after)}: use method='refine'.")
    changed = [k for k, (b, a) in enumerate(zip(before, after)) if b != a]
    pairs = [(word_tokens(tokenizer, source, k), word_tokens(tokenizer, target, k)) for k in changed]
    if not all(from_ and to for from_, to in pairs):
        raise LabkitError("The published replacement lost count of the words: leave single spaces between them, or use reference=False.")
    M, i, j = torch.zeros(L, L), 0, 0
    while i < L and j < L:
        if not pairs:
            M[j, j] = 1  # j, not i: the quirk
            i, j = i + 1, j + 1
        elif pairs[0][0][0] == i:
            from_, to = pairs.pop(0)
            if len(from_) == len(to):
                M[from_, to] = 1
            else:
                for one in to:
                    M[from_, one] = 1 / len(to)
            i, j = i + len(from_), j + len(to)
        else:
            M[i, j] = 1
            i, j = i + 1, j + 1
    return M


def refinement(tokenizer: Tokenizer, source: str, target: str) -> tuple[Tensor, Tensor]:
    """The mapper m (L,) int64, -1 where nothing is copied, and a (L,), 1 where something is, of `get_refinement_mapper`."""
    x, y, L = tokenizer.encode(source).ids, tokenizer.encode(target).ids, tokenizer.max_length
    found = _needleman_wunsch(x, y)
    m, a = torch.arange(L), torch.ones(L)
    m[: len(y)] = torch.tensor(found)
    a[: len(y)] = (m[: len(y)] != -1).float()
    return m, a


def _needleman_wunsch(x: tuple[int, ...], y: tuple[int, ...]) -> list[int]:
    """For each token of y the place in x that it is aligned with, or -1: match 1, mismatch -1, gap 0; ties prefer a new token."""
    score = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    way = [["left"] * (len(y) + 1)] + [["up"] + [""] * len(y) for _ in x]
    for i in range(1, len(x) + 1):
        for j in range(1, len(y) + 1):
            options = {"left": score[i][j - 1], "up": score[i - 1][j], "diagonal": score[i - 1][j - 1] + (1 if x[i - 1] == y[j - 1] else -1)}
            way[i][j] = max(options, key=options.get)  # the first of the best
            score[i][j] = options[way[i][j]]
    i, j, found = len(x), len(y), []
    while j > 0:
        if way[i][j] == "up":
            i -= 1
            continue
        found.append(i - 1 if way[i][j] == "diagonal" else -1)
        i, j = i - (way[i][j] == "diagonal"), j - 1
    return found[::-1]


def time_table(bounds: tuple[float, float], steps: int) -> Tensor:
    """1 in the steps in which cross-attention is edited, (T + 1,), of `get_time_words_attention_alpha`; the last row is never used."""
    table = torch.zeros(steps + 1)
    table[int(bounds[0] * (steps + 1)) : int(bounds[1] * (steps + 1))] = 1
    return table
