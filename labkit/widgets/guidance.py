"""A slider over the guidance scale: one prompt, the same seeds, w under the thumb.

    eps = eps_u + w (eps_c - eps_u)             Ho & Salimans 2021; see labkit.guidance and labkit.probes.sweep

The pictures of all scales are drawn before the slider appears, and the browser turns the slider's place into one of them by
itself. No Python runs when it is moved, so there is nothing to hang, no thread to be on the wrong one of, and it goes on
working while the kernel computes something else.
"""

from base64 import b64encode
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from labkit import plots
from labkit.errors import LabkitError
from labkit.probes.sweep import Sweep

if TYPE_CHECKING:
    from ipywidgets import VBox
    from matplotlib.figure import Figure

VIEW = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True, eq=False)
class Knob:
    """A widget and the figure with the same content; in a notebook both appear, the figure below the widget."""

    widget: "VBox"
    figure: "Figure"
    text: str  # what stands there where widgets cannot be drawn

    def _ipython_display_(self) -> None:
        from IPython.display import publish_display_data

        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        publish_display_data({VIEW: view, "text/plain": self.text})
        plots.show(self.figure)

    def __repr__(self) -> str:
        return self.text


def guidance_slider(sweep: Sweep, start: float | None = None) -> Knob:
    """A slider over the scales of a sweep that shows the pictures of all seeds, and below it the whole sweep as a figure.

    `sweep`: of `labkit.sweep_guidance`; `start`: the scale shown first, by default the one in the middle. Focus the handle
    and use the arrow keys, Home and End. Raises LabkitError if the sweep's rows do not fit its scales and seeds, or if it
    has no scale `start`.
    """
    from ipywidgets import Layout, SelectionSlider, Stack, VBox, jsdlink

    figure = plots.guidance_sweep(sweep.images, sweep.scales, sweep.seeds)  # raises where the sweep is not whole
    scales = list(sweep.scales)
    if len(set(scales)) < len(scales):
        raise LabkitError(f"The sweep has a scale twice: {_listed(scales)}.")
    start = scales[len(scales) // 2] if start is None else start
    if start not in scales:
        raise LabkitError(f"The sweep has no scale {start!r}; it has {_listed(scales)}.")
    shown = [frame(sweep, column) for column in range(len(scales))]
    slider = SelectionSlider(
        options=[(f"{w:g}", w) for w in scales], value=start, description="guidance w",
        tooltip=f"The guidance scale: {_listed(scales)}. Left and right arrow keys move it.",
        style={"description_width": "initial"}, layout=Layout(width="30em", max_width="98%"),
    )  # fmt: skip
    pictures = Stack([picture(figure) for figure in shown], selected_index=slider.index)
    jsdlink((slider, "index"), (pictures, "selected_index"))
    text = f"[A slider over the guidance scale, {_listed(scales)}: run this cell in JupyterLab to move it. All its pictures are below.]"
    return Knob(VBox([slider, pictures]), figure, text)


def frame(sweep: Sweep, column: int) -> "Figure":
    """What the slider shows at one scale: the pictures of all seeds, side by side."""
    first = sweep.images[0][column]
    figure, axes = plots.grid(1, len(sweep.seeds), first.height / first.width, titles=1)
    figure.suptitle(f"$w$ = {sweep.scales[column]:g}", fontsize=plots.TITLE)
    for ax, row, seed in zip(axes[0], sweep.images, sweep.seeds):
        plots.picture(ax, row[column], f"seed {seed}")
    count = "one picture" if len(sweep.seeds) == 1 else f"{len(sweep.seeds)} pictures"
    figure.labkit_alt = f"“{sweep.prompt}” at guidance scale {sweep.scales[column]:g}: {count}, {_seeds(sweep.seeds)}."
    return figure


def picture(figure: "Figure"):
    """A figure as a widget, with its description as alternative text, for which ipywidgets' own Image has no place."""
    from ipywidgets import HTML, Layout

    source = "data:image/png;base64," + b64encode(plots.png(figure)).decode()
    style = "width: 100%; max-width: 1000px; height: auto"
    alt = escape(plots.described(figure), quote=True)
    return HTML(f'<img class="widget-image" style="{style}" alt="{alt}" src="{source}">', layout=Layout(width="100%"))


def _listed(scales) -> str:
    return ", ".join(f"{w:g}" for w in scales)


def _seeds(seeds) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
