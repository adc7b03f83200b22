"""A table of measurements as squares, dark to bright, with the numbers in them."""

from textwrap import fill
from typing import TYPE_CHECKING

from labkit.plots.canvas import DPI, LABEL, MAP, SMALL, TITLE, WIDTH, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERS = 14  # columns up to which numbers can be read in the squares


def table(data) -> "Figure":
    """A `labkit.probes.table.Table`, one square a measurement; rows and columns as named, the scale from the smallest to the largest value; what is missing stays white."""
    from matplotlib.figure import Figure
    from numpy import nanmax, nanmin

    values = data.values.float().numpy()
    rows, columns = values.shape
    figure = Figure(figsize=(WIDTH, min(1.9 + 0.55 * rows, 2 * WIDTH)), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    shown = ax.imshow(values, cmap=MAP, aspect="auto")
    ax.set_xticks(range(columns), [plain(name) for name in data.columns], fontsize=SMALL)
    ax.set_yticks(range(rows), [plain(name) for name in data.rows], fontsize=SMALL)
    ax.set_xlabel(data.axes[1], fontsize=LABEL)
    ax.set_ylabel(data.axes[0], fontsize=LABEL)
    ax.set_title(fill(plain(data.title), 75), fontsize=TITLE if len(data.title) < 75 else LABEL)
    ax.spines[:].set_visible(False)
    low, high = nanmin(values), nanmax(values)
    if columns <= NUMBERS:
        digits = 2 if high - low >= 0.1 else 3
        for y, x in ((y, x) for y in range(rows) for x in range(columns) if values[y, x] == values[y, x]):
            dark = values[y, x] < low + 0.6 * (high - low)
            ax.text(x, y, f"{values[y, x]:z.{digits}f}", ha="center", va="center", fontsize=SMALL, color="white" if dark else "black")
    bar = figure.colorbar(shown, ax=ax, pad=0.02)
    bar.set_label(data.unit, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)
    y, x = divmod(int(data.values.nan_to_num(float("-inf")).argmax()), columns)
    figure.labkit_alt = (
        f"{data.title}: a grid of {data.axes[0]} ({', '.join(data.rows)}) by {data.axes[1]} ({', '.join(data.columns)}), {data.unit}, "
        f"from {low:.3g} to {high:.3g}; the largest is at {data.rows[y]}, {data.columns[x]}."
    )
    return figure
