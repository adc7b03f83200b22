"""Points in groups: whether one number goes with another."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from labkit.plots.canvas import DPI, LABEL, MAP, SMALL, TITLE, WIDTH, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = "osD^vPX*<>"


def scatter(x: Sequence[float], y: Sequence[float], groups: Sequence[str], axes: tuple[str, str], title: str) -> "Figure":
    """One point a pair (x, y), a mark and a colour for each group; `axes` names x and y."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    x, y, names = [float(v) for v in x], [float(v) for v in y], list(dict.fromkeys(groups))
    figure = Figure(figsize=(WIDTH, WIDTH * 0.6), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    ax.axhline(0, color="0.6", linewidth=1)
    for k, name in enumerate(names):
        points = [(a, b) for a, b, group in zip(x, y, groups) if group == name]
        colour = colormaps[MAP](0.1 + 0.75 * k / max(len(names) - 1, 1))
        ax.scatter(*zip(*points), s=110, marker=MARKS[k % len(MARKS)], color=colour, edgecolors="white", label=plain(name))
    ax.set_xlabel(axes[0], fontsize=LABEL)
    ax.set_ylabel(axes[1], fontsize=LABEL)
    ax.set_title(plain(title), fontsize=TITLE)
    ax.tick_params(labelsize=SMALL)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=SMALL, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.labkit_alt = (
        f"{title}: {len(x)} points in {len(names)} groups ({', '.join(names)}); across {axes[0]}, from {min(x):.3g} to {max(x):.3g}, "
        f"up {axes[1]}, from {min(y):.3g} to {max(y):.3g}."
    )
    return figure
