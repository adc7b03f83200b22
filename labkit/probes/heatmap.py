"""A heat map: for every place of the picture, which share of its attention a word had.

    map = mean over layers of  upsample( mean over heads and steps of  sum over the word's tokens of  A[head, y, x, token] )

DAAM (Tang et al. 2023) is the same up to three choices: there the tokens of a word are averaged, not summed, upsampling
is bicubic and cut off below zero, and the middle block is left out. Here a map is a share between 0 and 1, and the maps
of all tokens (BOS, EOS and padding among them) add up to 1 at every place.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabkitError


SHARE = "share of attention"


@dataclass(frozen=True, eq=False)
class HeatMap:
    """`map` (h, w) float32: the attention that the word had at each place, measured in `unit`; `averages` says in words what was averaged."""

    word: str
    map: Tensor
    averages: str
    tokens: tuple[int, ...] = ()  # positions in the text encoder's sequence, BOS is 0
    branch: str = "cond"
    image: int = 0
    picture: Callable[[int], object] | None = field(default=None, repr=False)  # image number -> the finished picture, PIL
    unit: str = SHARE

    def plot(self, picture=None):
        """The map over the finished picture (or over a PIL picture of your own) as a matplotlib Figure; over grey where there is none."""
        from PIL import Image

        from labkit.plots.words import word_heatmaps

        if picture is None:
            h, w = self.map.shape
            picture = self.picture(self.image) if self.picture else Image.new("L", (8 * w, 8 * h), 128)
        return word_heatmaps(picture, [self], f"Where “{self.word}” had the attention")

    def resized(self, height: int, width: int) -> Tensor:
        """The map at another size, bilinear, (height, width)."""
        return resize(self.map, (height, width))


def average(maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Mean over layers of maps (head, y, x) or (y, x), each averaged over its heads and then resized to `size`: (h, w)."""
    if not maps:
        raise LabkitError("There are no maps to average.")
    mean = torch.zeros(size)
    for m in maps:
        m = m.mean(0) if m.ndim == 3 else m  # (y, x); heads first: upsampling is linear, so the order only saves time
        mean += resize(m, size) / len(maps)
    return mean  # (h, w)


def resize(m: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, with places as areas (align_corners=False): the centre of a place stays where it was."""
    return F.interpolate(m[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def described(steps: int, layers: int, heads: str, tokens: int) -> str:
    """One phrase that says what was averaged."""
    count = f"{steps} {'step' if steps == 1 else 'steps'}, {layers} {'layer' if layers == 1 else 'layers'} and {heads}"
    return f"mean over {count}; the shares of all {tokens} tokens sum to 1"
