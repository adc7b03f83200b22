"""Pictures in rows, each with a few words above it: from one thing to another, layer by layer, step by step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL.Image import Image

from labkit.errors import LabkitError
from labkit.plots.canvas import LABEL, TITLE, grid, picture, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rows_of_pictures(
    images: Sequence[Sequence[Image]] | Sequence[Image], columns: Sequence, rows: Sequence | None = None, title: str = "", axis: str = ""
) -> "Figure":
    """Pictures `images[row][column]`, or one row of them, under the columns' names and beside the rows'; `axis` says what runs across."""
    images = [list(images)] if images and isinstance(images[0], Image) else [list(row) for row in images]
    columns, rows = [str(c) for c in columns], [str(r) for r in rows or []]
    if not images or any(len(row) != len(columns) or not row for row in images) or (rows and len(rows) != len(images)):
        raise LabkitError(f"There are {len(columns)} columns and {len(rows) or 1} rows of names, but rows of {[len(row) for row in images]} pictures.")
    first = images[0][0]
    figure, axes = grid(len(images), len(columns), first.height / first.width, titles=1, left=0.5 if rows else 0.0, footer=0.2 if axis else 0.0)
    figure.suptitle(plain(title), fontsize=TITLE)
    for row, pictures in enumerate(images):
        for column, image in enumerate(pictures):
            picture(axes[row][column], image, plain(columns[column]) if row == 0 else None)
        if rows:
            axes[row][0].set_ylabel(plain(rows[row]), fontsize=LABEL)
    if axis:
        figure.supxlabel(plain(axis), fontsize=LABEL)
    across = f", {axis}" if axis else ""
    down = f"; from top to bottom {', '.join(rows)}" if rows else ""
    figure.labkit_alt = f"{title or 'Pictures'}: {len(images)} by {len(columns)} pictures; from left to right{across} {', '.join(columns)}{down}."
    return figure
