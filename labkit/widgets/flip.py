"""A slider over figures that are drawn beforehand: turn the knob, see the next one.

As with the guidance slider (labkit.widgets.guidance) the browser does the turning: no Python runs, nothing can hang, and below the
widget stands a static figure with the same content.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from labkit.errors import LabkitError
from labkit.widgets.guidance import Knob, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def flip(frames: Sequence["Figure"], labels: Sequence[str], name: str, below: "Figure", start: int = 0) -> Knob:
    """A slider called `name` with one frame for each label, and `below` it the whole as one figure.

    Focus the handle and use the arrow keys, Home and End. Raises LabkitError unless each frame has a label of its own.
    """
    from ipywidgets import Layout, SelectionSlider, Stack, VBox, jsdlink

    labels = [str(label) for label in labels]
    if not frames or len(frames) != len(labels) or len(set(labels)) < len(labels) or not 0 <= start < len(labels):
        raise LabkitError(f"{len(frames)} frames and {len(labels)} labels, starting at {start}: give each frame a label of its own.")
    listed = ", ".join(labels)
    slider = SelectionSlider(
        options=[(label, n) for n, label in enumerate(labels)], value=start, description=name,
        tooltip=f"{name}: {listed}. Left and right arrow keys move it.", style={"description_width": "initial"},
        layout=Layout(width="30em", max_width="98%"),
    )  # fmt: skip
    pictures = Stack([picture(frame) for frame in frames], selected_index=start)
    jsdlink((slider, "index"), (pictures, "selected_index"))
    return Knob(VBox([slider, pictures]), below, f"[A slider over {name}, {listed}: run this cell in JupyterLab to move it. All of it is below.]")
