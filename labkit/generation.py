"""Finished pictures: what a run arrives at, with the recipe that draws it again; PIL pictures and tensors of them.

    (B, 3, H, W) in [0, 1]  <->  B pictures of W x H pixels, 8 bits a colour
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from labkit.errors import LabkitError
from labkit.recipe import Recipe
from labkit.samplers import Step


@dataclass(frozen=True, eq=False)
class Generation:
    """Finished pictures and what made them: `lab.generate(**generation.recipe)` draws them again."""

    images: list[Image.Image]
    latents: Tensor  # (B, 4, h, w), scaled as the U-Net sees them
    recipe: dict     # arguments of `generate`, plain values
    model: str

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the pictures side by side."""
        width, height = self.image.size
        strip = Image.new("RGB", (width * len(self.images), height))
        for n, image in enumerate(self.images):
            strip.paste(image, (n * width, 0))
        strip.save(png := BytesIO(), "PNG")
        return png.getvalue()


def finished(lab, steps: Iterator[Step], recipe: Recipe, progress: bool = True) -> Generation:
    """The pictures that the steps of a LatentDiffusion arrive at, drawn to the end, with or without a progress bar."""
    from tqdm.auto import tqdm

    for step in tqdm(steps, total=recipe.steps, desc=lab.name, disable=not progress):
        pass
    return Generation(to_pil(lab.decode(step.x)), step.x, recipe.plain(), lab.name)


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] as PIL pictures."""
    pixels = (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(p) for p in rearrange(pixels, "b c h w -> b h w c").contiguous().numpy()]


def from_pil(images: Image.Image | Sequence[Image.Image]) -> Tensor:
    """PIL pictures of one size as (B, 3, H, W) in [0, 1]; LabkitError if their sizes differ."""
    images = [images] if isinstance(images, Image.Image) else list(images)
    if not images or not all(isinstance(image, Image.Image) for image in images):
        raise LabkitError("There is no picture: give a PIL image, a list of them, or a tensor (B, 3, H, W) in [0, 1].")
    if len({image.size for image in images}) > 1:
        raise LabkitError(f"The pictures have sizes {sorted({i.size for i in images})}: encode one size at a time.")
    rows = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in images]
    width, height = images[0].size
    return rearrange(torch.stack(rows).float() / 255, "b (h w c) -> b c h w", h=height, w=width)
