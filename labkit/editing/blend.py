"""Local blend: keep the source's latents wherever the words of the edit have no attention.

    a = mean of A[words] over layers, heads and the steps so far,  3x3 max-pooled                             of source and target
    m = (a_source - min) / (max - min) > threshold   or   (a_target - min) / (max - min) > threshold
    x_target <- x_source + m (x_target - x_source)                                                            after each step from `start` on

Hertz et al. 2022, "Prompt-to-Prompt" (sec. 4, "local editing"), as the code published with null-text inversion has it (threshold 0.3, from
a fifth of the steps on, the union of both masks), but for the minimum: there a / max > threshold. A small model spreads its
attention, so that no place has less than 0.3 of the maximum and all is let in; where the minimum is nearly 0 both are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.editing.alignment import Alignment
from labkit.errors import LabkitError
from labkit.models.tokenizer import Tokenizer
from labkit.probes.words import find


@dataclass(frozen=True)
class Blend:
    """What a local blend goes by: `words` of either prompt, or the words that differ where it is empty."""

    words: str | Sequence[str] = ()
    threshold: float = 0.3  # of the map's own range
    start: float = 0.2      # share of the steps that are not blended: maps say little before

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1 or not 0 <= self.start <= 1:
            raise LabkitError(f"The blend has threshold {self.threshold!r} and start {self.start!r}: the first is 0 to below 1, the second 0 to 1.")


def blend_tokens(blend: Blend, tokenizer: Tokenizer, source: str, target: str, alignment: Alignment) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The token positions that the masks of source and target are made of; LabkitError if a word is in neither prompt."""
    words = [blend.words] if isinstance(blend.words, str) else list(blend.words)
    if not words:
        return tuple(t for word in alignment.gone for t in word), tuple(t for word in alignment.new for t in word)
    found: tuple[set, set] = (set(), set())
    for word in words:
        errors = []
        for prompt, tokens in zip((source, target), found):
            try:
                tokens.update(find(tokenizer, prompt, word))
            except LabkitError as error:
                errors.append(error)
        if len(errors) == 2:
            raise LabkitError(f"The blend's word is in neither prompt: {errors[0]} Of the target: {errors[1]}")
    return tuple(sorted(found[0])), tuple(sorted(found[1]))


def mask(maps: Tensor, tokens: Sequence[int], size: tuple[int, int], threshold: float, reference: bool = False) -> Tensor:
    """Where tokens have attention, (S, h, w) of 0 and 1: maps (S, y, x, L), summed or averaged, each by its own range (its maximum: `reference`)."""
    if not tokens:
        return torch.zeros(len(maps), *size, device=maps.device)
    m = maps[..., list(tokens)].sum(-1)  # (S, y, x)
    m = F.max_pool2d(m[:, None], 3, stride=1, padding=1)  # (S, 1, y, x)
    m = F.interpolate(m, size=size, mode="nearest")[:, 0]  # (S, h, w)
    least = 0.0 if reference else m.amin((1, 2), keepdim=True)
    return ((m - least) / (m.amax((1, 2), keepdim=True) - least).clamp(min=1e-12) > threshold).float()
