"""A slider over figures that are drawn beforehand: turn the knob, see the next one; below it all of them as one figure."""

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image

from labkit import plots
from labkit.errors import LabkitError
from labkit.widgets.view import Axis, Panel, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def flip(frames: Sequence["Figure"], labels: Sequence[str], name: str, below: "Figure", start: int = 0) -> View:
    """A slider called `name` with one frame for each label, and `below` it the whole as one figure.

    Focus the handle and use the arrow keys, Home and End. Raises LabkitError unless each frame has a label of its own.
    """
    labels = [str(label) for label in labels]
    if not frames or len(frames) != len(labels) or len(set(labels)) < len(labels) or not 0 <= start < len(labels):
        raise LabkitError(f"{len(frames)} frames and {len(labels)} labels, starting at {start}: give each frame a label of its own.")
    listed = ", ".join(labels)
    pictures = [Image.open(BytesIO(plots.png(frame))).convert("RGB") for frame in frames]
    size = tuple(max(sides) for sides in zip(*(picture.size for picture in pictures)))
    pictures = [on_white(picture, size) for picture in pictures]  # so that nothing jumps when the knob is turned
    panel = Panel(pictures, f"{plots.described(frames[start])} One of {len(frames)} figures, for {name}: {listed}.")
    text = f"[A slider over {name}, {listed}: run this cell in JupyterLab to move it. All of it is below.]"
    return View(name, (panel,), (Axis(name, tuple(labels), pictures=True, start=start),), below, text)


def on_white(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in the top left corner of a white one of this size."""
    sheet = Image.new("RGB", size, "white")
    sheet.paste(picture)
    return sheet
