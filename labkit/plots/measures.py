"""Numbers against a number: one panel a measure, seeds as thin lines, their mean as a thick one."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from labkit.errors import LabkitError
from labkit.plots.canvas import LABEL, LINE, SMALL, TITLE, WIDTH, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3
UNITS = {"angle": "degrees", "entropy": "bits", "saturation": "0 to 1", "clipped": "share of values", "diversity": "rms difference"}


def measures(x: Sequence[float], values: Mapping, across: str, title: str = "", units: Mapping[str, str] = UNITS) -> "Figure":
    """Each measure, (x,) or (seed, x), in a panel of its own over the same x; `across` names x, `units` say what a measure is in."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    x, found = [float(value) for value in x], {name: _rows(value, len(x), name) for name, value in values.items()}
    if not found:
        raise LabkitError("There are no measures to draw.")
    columns = min(COLUMNS, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 0.75 * WIDTH, 0.6 + 3.4 * lines), dpi=100, layout="constrained")
    figure.suptitle(plain(title), fontsize=TITLE)
    axes = [ax for row in figure.subplots(lines, columns, squeeze=False) for ax in row]
    for ax, (name, rows) in zip(axes, found.items()):
        mean = [sum(values) / len(rows) for values in zip(*rows)]
        for row in rows if len(rows) > 1 else []:
            ax.plot(x, row, color=LINE, alpha=0.3, linewidth=1.2)
        ax.plot(x, mean, color=LINE, linewidth=3, marker="o", markersize=6)
        ax.set_title(plain(name), fontsize=LABEL)
        ax.set_xlabel(plain(across), fontsize=SMALL)
        ax.set_ylabel(plain(units.get(name, "")), fontsize=SMALL)
        ax.xaxis.set_major_locator(MaxNLocator(integer=all(value == int(value) for value in x), nbins=6))
        ax.tick_params(labelsize=SMALL)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    for ax in axes[len(found) :]:
        ax.set_visible(False)
    ends = "; ".join(f"{name} from {_mean(rows, 0):.3g} to {_mean(rows, -1):.3g}" for name, rows in found.items())
    figure.labkit_alt = f"{title or 'Measures'}, over {across} from {x[0]:g} to {x[-1]:g}: {ends}."
    return figure


def _rows(values, n: int, name: str) -> list[list[float]]:
    rows = values.tolist() if hasattr(values, "tolist") else [list(row) if hasattr(row, "__iter__") else row for row in values]
    rows = rows if rows and isinstance(rows[0], list) else [rows]
    if any(len(row) != n for row in rows):
        raise LabkitError(f"{name} has {[len(row) for row in rows]} values for {n} places: give (x,) or (seed, x).")
    return rows


def _mean(rows: list[list[float]], k: int) -> float:
    return sum(row[k] for row in rows) / len(rows)
