"""A slider over the guidance scale: one prompt, the same seeds, w under the thumb.

    eps = eps_u + w (eps_c - eps_u)             Ho & Salimans 2021; see labkit.guidance and labkit.probes.sweep

The pictures of all scales are drawn before the slider appears, one panel a seed, and the browser changes them by itself.
"""

from labkit import plots
from labkit.errors import LabkitError
from labkit.probes.sweep import Sweep
from labkit.widgets.view import Axis, Panel, View


def guidance_slider(sweep: Sweep, start: float | None = None) -> View:
    """A slider over the scales of a sweep that shows the pictures of all seeds, and below it the whole sweep as a figure.

    `sweep`: of `labkit.sweep_guidance`; `start`: the scale shown first, by default the one in the middle. Focus the slider
    and use the arrow keys, Home and End. Raises LabkitError if the sweep's rows do not fit its scales and seeds, or if it
    has no scale `start`.
    """
    figure = plots.guidance_sweep(sweep.images, sweep.scales, sweep.seeds)  # raises where the sweep is not whole
    scales = list(sweep.scales)
    if len(set(scales)) < len(scales):
        raise LabkitError(f"The sweep has a scale twice: {_listed(scales)}.")
    start = scales[len(scales) // 2] if start is None else start
    if start not in scales:
        raise LabkitError(f"The sweep has no scale {start!r}; it has {_listed(scales)}.")
    about = f"“{sweep.prompt}” at guidance scales {_listed(scales)}, one at a time"
    panels = tuple(Panel(row, f"{about}: seed {seed}.", label=f"seed {seed}") for row, seed in zip(sweep.images, sweep.seeds))
    axis = Axis("guidance w", tuple(f"w = {w:g}" for w in scales), pictures=True, start=scales.index(start))
    text = f"[A slider over the guidance scale, {_listed(scales)}: run this cell in JupyterLab to move it. All its pictures are below.]"
    return View(f"“{sweep.prompt}” under guidance", panels, (axis,), figure, text)


def _listed(scales) -> str:
    return ", ".join(f"{w:g}" for w in scales)
