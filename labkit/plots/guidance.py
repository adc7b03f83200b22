"""The same prompt under several guidance scales."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL.Image import Image

from labkit.errors import LabkitError
from labkit.plots.canvas import LABEL, TITLE, grid, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def guidance_sweep(
    images: Sequence[Sequence[Image]], scales: Sequence[float], seeds: Sequence[int], title: str | None = None
) -> "Figure":
    """A grid of pictures `images[row][column]`: guidance scales across, seeds down."""
    images, scales, seeds = [list(row) for row in images], list(scales), list(seeds)
    if not images or len(images) != len(seeds) or any(len(row) != len(scales) or not row for row in images):
        sizes = [len(row) for row in images]
        raise LabkitError(f"A sweep has a row a seed ({len(seeds)}) and a column a scale ({len(scales)}); its rows are {sizes}.")
    figure, axes = grid(len(seeds), len(scales), images[0][0].height / images[0][0].width, titles=1, left=0.5)
    figure.suptitle(title or "The guidance scale $w$", fontsize=TITLE)
    for row, pictures in enumerate(images):
        for column, image in enumerate(pictures):
            picture(axes[row][column], image, f"$w$ = {scales[column]:g}" if row == 0 else None)
        axes[row][0].set_ylabel(f"seed {seeds[row]}", fontsize=LABEL)
    figure.labkit_alt = (
        f"A grid of pictures of one prompt: guidance scales {', '.join(f'{w:g}' for w in scales)} from left to right, "
        f"seeds {', '.join(map(str, seeds))} from top to bottom."
    )
    return figure
