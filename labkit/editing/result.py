"""What an edit gives back: the pictures of both sides, the attention that was used, and what they were made with.

    sources[seed]   edited[target][seed]      PIL pictures
    maps[side, seed, y, x, token]             side 0 is the source, 1 + k the target number k; sums to 1 over the tokens
"""

from dataclasses import dataclass, field
from io import BytesIO

from PIL import Image
from torch import Tensor

from labkit.editing.alignment import Alignment
from labkit.errors import LabkitError
from labkit.models.tokenizer import Tokenizer
from labkit.probes.heatmap import HeatMap
from labkit.probes.words import find


@dataclass(frozen=True, eq=False)
class Edit:
    """S pictures of a source prompt, and of each of K target prompts; what they were made with, and the maps and masks."""

    sources: list[Image.Image]             # one a seed
    edited: list[list[Image.Image]]        # [target][seed]
    latents: Tensor                        # (1 + K, S, 4, h, w), the source first
    maps: Tensor                           # (1 + K, S, y, x, L) float32: cross-attention used, mean over steps, heads, and layers of y x x places
    masks: Tensor | None                   # (K, S, h, w) of 0 and 1, where the local blend let the edit in after the last step; all of it where there is none
    alignments: list[Alignment]
    prompts: tuple[str, ...]               # the source's, then the targets'
    recipe: dict                           # what both sides were drawn with, as of `generate`
    model: str
    tokenizer: Tokenizer = field(repr=False)

    @property
    def source(self) -> Image.Image:
        """The source's first picture."""
        return self.sources[0]

    @property
    def image(self) -> Image.Image:
        """The first target's first picture."""
        return self.edited[0][0]

    def heatmap(self, word: str, target: int | None = 0, seed: int = 0) -> HeatMap:
        """Where a word of a target's prompt (of the source's with target=None) had the attention in this edit, (y, x)."""
        side = 0 if target is None else 1 + target
        if not 0 <= side < len(self.prompts) or not 0 <= seed < len(self.sources):
            raise LabkitError(f"There is no picture of target {target}, seed number {seed}: this edit has {len(self.edited)} targets and {len(self.sources)} seeds.")
        tokens = find(self.tokenizer, self.prompts[side], word)
        about = f"mean over steps, heads, and the layers of {self.maps.shape[2]}x{self.maps.shape[3]} places; the shares of all tokens sum to 1"
        return HeatMap(word, self.maps[side, seed][..., list(tokens)].sum(-1), about, tokens, "cond", seed)

    def _repr_png_(self) -> bytes:
        """What a notebook shows: a row a seed, the source and the edits side by side."""
        width, height = self.source.size
        sheet = Image.new("RGB", (width * len(self.prompts), height * len(self.sources)))
        for k, column in enumerate([self.sources, *self.edited]):
            for s, image in enumerate(column):
                sheet.paste(image, (k * width, s * height))
        sheet.save(png := BytesIO(), "PNG")
        return png.getvalue()
