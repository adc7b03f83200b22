"""Exercises of notebook 00: a sentence of fixed length, how alike two states are, and what a decoder says as pixels.

    ids = start, words, end, padding ...         L of them; too many words are cut, the end stays          CLIP (Radford et al. 2021), section 2.4
    cos(a, b) = a . b / (|a| |b|)
    byte = round(255 x), x held to [0, 1]
"""

import torch
from torch import Tensor

from labkit.checks.check import Check, seeded

START, END = 90, 91  # of the cases; the padding is the end token again, as in CLIP


def _padded(ids: list[int], start: int, end: int, length: int) -> list[int]:
    kept = [start, *ids[: length - 2], end]
    return kept + [end] * (length - len(kept))


padded = Check(
    "padded",
    reference=_padded,
    wrong={
        "The start token is missing: the sentence begins with it.": lambda ids, start, end, length: (ids[: length - 1] + [end] * length)[:length],
        "The padding is the end token again, not zero: zero is a word of the list.": lambda ids, start, end, length: (
            (kept := [start, *ids[: length - 2], end]) + [0] * (length - len(kept))),
        "It is not filled up: every sentence has the same length.": lambda ids, start, end, length: [start, *ids[: length - 2], end],
        "A long sentence is cut so that the end token is lost; the end always stands there: cut the words to `length - 2` first.": lambda ids, start, end, length: (
            ([start, *ids] + [end] * length)[:length]),
        "A sentence that is too long stays too long: cut the words to `length - 2` first.": lambda ids, start, end, length: (
            [start, *ids, end] + [end] * (length - len(ids) - 2)),
        "The padding stands in front; it comes behind the end.": lambda ids, start, end, length: (
            [end] * (length - len(kept := [start, *ids[: length - 2], end])) + kept),
    },
    task="`padded` makes a list of `length` numbers: `start`, the words' numbers `ids`, `end`, and `end` again until it is full. If the words are too many, the last ones are left out.",
    praise="every sentence has the same length, so that many go through the network at once; what is cut off is never seen.",
    cases=lambda: [([5, 6, 7], START, END, 8), ([3], START, END, 6), (list(range(1, 11)), START, END, 7), ([4, 5, 6, 7], START, END, 6)],
)

cosine = Check(
    "cosine",
    reference=lambda a, b: torch.nn.functional.cosine_similarity(a, b, dim=0),
    wrong={
        "That is the product of the two; divide it by both lengths, or a longer state would count as more alike.": lambda a, b: (a * b).sum(),
        "You divided by one length; it is divided by both.": lambda a, b: (a * b).sum() / a.norm(),
        "You divided by the squared lengths: a length is a root, `norm()`.": lambda a, b: (a * b).sum() / (a.square().sum() * b.square().sum()),
        "That is the distance of the two: the more alike, the *smaller* it is.": lambda a, b: (a - b).norm(),
        "You took the mean off first: that is a correlation.": lambda a, b: torch.corrcoef(torch.stack([a, b]))[0, 1],
        "That is the angle; its cosine is asked for.": lambda a, b: torch.nn.functional.cosine_similarity(a, b, dim=0).acos(),
        "The product is not summed up: one number for two states.": lambda a, b: a * b / (a.norm() * b.norm()),
    },
    task="`cosine` is given two states, (D,) each, and returns the cosine of the angle between them: their product, summed, over both lengths.",
    praise="1 is the same direction, 0 nothing in common, and how long a state is does not matter.",
    cases=lambda: [(seeded(6, seed=n) + 0.7, 3 * seeded(6, seed=10 + n) + 0.5) for n in range(3)],
)


def _to_bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round()


to_bytes = Check(
    "to_bytes",
    reference=_to_bytes,
    wrong={
        "It is not held to [0, 1] first: a decoder says 1.02 at times, and as a byte 260 becomes 4, a black dot in a white cloud.": lambda x: (x * 255).round(),
        "It is cut off where rounding is wanted: the picture gets darker by half a step.": lambda x: (x.clamp(0, 1) * 255).floor(),
        "A byte goes to 255, not to 256: white would be one too many.": lambda x: (x.clamp(0, 1) * 256).round(),
        "These go from 0 to 1; your formula is for numbers from -1 to 1.": lambda x: ((x.clamp(-1, 1) + 1) * 127.5).round(),
        "Rounded before it is multiplied, all is black or white.": lambda x: x.clamp(0, 1).round() * 255,
    },
    task="`to_bytes` turns what the decoder says, numbers about 0 to 1, into whole numbers from 0 to 255: hold to the range, multiply, round.",
    praise="the last step of every generator; what is rounded away here is why a picture read back is never quite its latent's.",
    cases=lambda: [((0.5 + 0.4 * seeded(3, 4, 4, seed=n)),) for n in range(2)],
)
