"""When and where attention is edited: windows of steps, by fraction or by word, and which layers.

    cross-attention of token j is edited in the steps  round(a_j T) <= i < round(b_j T),   i = 0 the noisiest of T        all layers
    self-attention is copied in the steps              round(a T) <= i < round(b T)        layers of N <= max(16^2, h w / 16) places

Hertz et al. 2022, "Prompt-to-Prompt" (eq. 6 and sec. 3.2): early steps lay the picture out, later ones fill it in, so the longer the
window, the more of the source stays. Published code copies self-attention where 64x64 latents have 16x16 places or fewer: a quarter
of the side. A small model's latents are no larger than 16x16, hence the first number. A word's map is read at the finest of the same
layers, as is published too. `reference=True` counts steps as the published code does: int(b (T + 1)) for cross-, int(b T) for
self-attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.editing.alignment import Alignment
from labkit.editing.published import time_table
from labkit.errors import LabkitError
from labkit.models.tokenizer import Tokenizer
from labkit.probes.words import find
from labkit.tap import taps

Window = float | tuple[float, float]  # the end of a window that begins at 0, or both; shares of the steps
OTHERS = "default_"  # in a window by word: the words that are not named, as the published code calls them


@dataclass(frozen=True, eq=False)
class Control:
    """One target's edit in all steps: `cross` (T, L) in {0, 1}, `self` (T,) of bool, `weights` (L,) that its maps are multiplied by."""

    alignment: Alignment
    cross: Tensor
    self: Tensor
    weights: Tensor


def window(said: Window, what: str) -> tuple[float, float]:
    """(begin, end) of a window, shares of the steps; LabkitError unless 0 <= begin <= end <= 1."""
    pair = (0.0, said) if isinstance(said, (int, float)) and not isinstance(said, bool) else said
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(b, (int, float)) for b in pair) or not 0 <= pair[0] <= pair[1] <= 1:
        raise LabkitError(f"{what} is {said!r}: give a share of the steps such as 0.8, or its begin and end such as (0.2, 0.8).")
    return float(pair[0]), float(pair[1])


def cross_table(said: Window | Mapping[str, Window], tokenizer: Tokenizer, target: str, steps: int, reference: bool = False) -> Tensor:
    """Which token's cross-attention is edited in which step, (T, L) of 0 and 1; `said`: a window, or {word of the target: window}."""
    by_word = dict(said) if isinstance(said, Mapping) else {OTHERS: said}
    table = torch.zeros(steps, tokenizer.max_length)

    def column(bounds: Window, what: str) -> Tensor:
        a, b = window(bounds, what)
        return time_table((a, b), steps)[:steps] if reference else in_steps((a, b), steps).float()

    table[:] = column(by_word.pop(OTHERS, 1.0), "cross")[:, None]
    for word, bounds in by_word.items():
        table[:, list(find(tokenizer, target, word))] = column(bounds, f"cross of {word!r}")[:, None]
    return table


def self_table(said: Window, steps: int, reference: bool = False) -> Tensor:
    """In which steps self-attention is copied, (T,) bool."""
    a, b = window(said, "self_attention")
    if reference:
        i = torch.arange(steps)
        return (i >= int(steps * a)) & (i < int(steps * b))
    return in_steps((a, b), steps)


def in_steps(bounds: tuple[float, float], steps: int) -> Tensor:
    """(T,) bool: round(a T) <= i < round(b T)."""
    i = torch.arange(steps)
    return (i >= round(bounds[0] * steps)) & (i < round(bounds[1] * steps))


def weights(said: Mapping[str, float] | None, tokenizer: Tokenizer, target: str) -> Tensor:
    """What each token's map is multiplied by, (L,): 1 but for the words of the target in {word: weight}."""
    w = torch.ones(tokenizer.max_length)
    if not isinstance(said, (Mapping, type(None))):
        raise LabkitError(f"reweight is {said!r}: give weights by word, such as {{'red': 3}}.")
    for word, weight in (said or {}).items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) < float("inf"):
            raise LabkitError(f"The weight of {word!r} is {weight!r}: give a number, such as 3 for more, 0.3 for less, -1 for the opposite.")
        w[list(find(tokenizer, target, word))] = weight
    return w


def for_each(said, n: int, what: str) -> list:
    """One value for all of n targets, or a list of n; LabkitError otherwise."""
    values = list(said) if isinstance(said, list) else [said] * n
    if len(values) != n:
        raise LabkitError(f"{what} has {len(values)} entries for {n} target prompts: give one, or a list with one for each.")
    return values


def places(unet: nn.Module, name: str, size: tuple[int, int]) -> tuple[int, int]:
    """(y, x) of the layer in which a U-Net's tap of this name is, for latents of this size."""
    block, number, *_ = name.split(".")
    last = len(unet.config.block_out_channels) - 1
    level = {"down_blocks": lambda: int(number), "up_blocks": lambda: last - int(number), "mid_block": lambda: last}[block]()
    return size[0] >> level, size[1] >> level


def coarse(unet: nn.Module, kind: str, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """The attention taps "attn1" (self) or "attn2" (cross) in layers of at most max(16^2, h w / 16) places, and their (y, x).

    If all are finer, those of the coarsest. `size` is (h, w) of the latents.
    """
    there = {name: places(unet, name, size) for name in taps(unet, f"*.{kind}.probs")}
    most = max(256, size[0] * size[1] // 16, min(y * x for y, x in there.values()))
    return {name: (y, x) for name, (y, x) in there.items() if y * x <= most}


def worded(unet: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """The cross-attention taps where words are read off: the finest of `coarse`."""
    there = coarse(unet, "attn2", size)
    finest = max(y * x for y, x in there.values())
    return {name: (y, x) for name, (y, x) in there.items() if y * x == finest}


def check_prompts(prompts: Sequence[str]) -> None:
    """LabkitError unless these are texts that are not empty."""
    for text in prompts:
        if not isinstance(text, str) or not text.strip():
            raise LabkitError(f"A prompt is {text!r}: give a text such as 'a red sphere'.")
