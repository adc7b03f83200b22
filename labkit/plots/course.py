"""Figures of the course: pictures in rows, lines, maps and fields of arrows. Data in, a matplotlib `Figure` out.

    strips(rows, columns, ...)        rows of pictures, each row with a name
    curves(lines, ...)                lines over one axis; told apart by colour and by dashes
    maps(values, titles, ...)         numbers over places, all panels on one scale
    arrows(fields, points, ...)       vectors over a plane, with the points they belong to
    clouds(points, ...)               points in a plane, a panel for each set of them

What a figure shows in words is the caller's to say (`alt`): only who made the numbers knows what they mean.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL.Image import Image

from labkit.errors import LabkitError
from labkit.plots.canvas import DPI, LABEL, LARGEST, MAP, SMALL, TITLE, WIDTH, grid, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe & Ito: apart to all eyes
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))


def strips(rows: Mapping[str, Sequence[Image]], columns: Sequence[str], title: str, alt: str, side: float = LARGEST) -> "Figure":
    """Rows of pictures under common column titles, `side` inches wide at most; the keys of `rows` are written beside them. All pictures have one shape."""
    pictures = [list(row) for row in rows.values()]
    if not pictures or not columns or any(len(row) != len(columns) for row in pictures):
        raise LabkitError(f"Each row needs a picture for each of the {len(columns)} columns; the rows have {[len(row) for row in pictures]}.")
    first = pictures[0][0]
    left = 0.9 if any(rows) else 0.0
    spare = max(WIDTH - left - side * len(columns), 0.0)  # inches that the pictures are not to fill
    figure, axes = grid(len(pictures), len(columns), first.height / first.width, titles=1, left=left + spare)
    figure.set_figwidth(max(figure.get_figwidth() - spare, WIDTH / 2))
    figure.suptitle(title, fontsize=TITLE)
    for r, (name, row) in enumerate(zip(rows, pictures)):
        for c, image in enumerate(row):
            picture(axes[r][c], image, columns[c] if r == 0 else None)
        axes[r][0].set_ylabel(name, fontsize=LABEL)
    figure.labkit_alt = alt
    return figure


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, title: str, alt: str,
    scale: tuple[str, str] = ("linear", "linear"), marks: bool = False, level: tuple[float, str] | None = None,
) -> "Figure":  # fmt: skip
    """Lines {name: (xs, ys)}; `scale` is that of x and y ("linear", "log"), `marks` puts a dot on every value, `level` (y, text) a thin line across."""
    if not lines or any(len(xs) != len(ys) or len(xs) == 0 for xs, ys in lines.values()):
        raise LabkitError("Curves need as many x as y, one at least: give {name: (xs, ys)}.")
    figure, ax = _axes(WIDTH * 0.8, 5.2)
    for n, (name, (xs, ys)) in enumerate(lines.items()):
        style = dict(color=COLOURS[n % len(COLOURS)], linestyle=DASHES[n % len(DASHES)], marker="o" if marks else None)
        ax.plot([float(v) for v in xs], [float(v) for v in ys], label=name, linewidth=2.6, markersize=6, **style)
    if level is not None:
        ax.axhline(level[0], color="#7F7F7F", linewidth=1.2)
        ax.annotate(level[1], (1, level[0]), xycoords=("axes fraction", "data"), xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=SMALL,
                    color="#555555")
    ax.set_xscale(scale[0])
    ax.set_yscale(scale[1])
    _dress(ax, x, y)
    if len(lines) > 1:
        ax.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3.2)
    figure.suptitle(title, fontsize=TITLE)
    figure.labkit_alt = alt
    return figure


def maps(
    values: Sequence["Tensor"], titles: Sequence[str], bar: str, title: str, alt: str, signed: bool = False,
    ticks: tuple[Sequence[str], Sequence[str]] | None = None,
) -> "Figure":  # fmt: skip
    """Panels (h, w) on one scale with one colour bar; `signed`: white is zero, limits are symmetric; `ticks`: names of the rows and columns."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    values = [v.detach().float().cpu().numpy() for v in values]
    if not values or len(values) != len(titles) or any(v.ndim != 2 for v in values):
        raise LabkitError(f"Maps are tensors (h, w), each with a title; there are {len(values)} maps and {len(titles)} titles.")
    high, low = max(float(v.max()) for v in values), min(float(v.min()) for v in values)
    low, high = (-max(abs(low), abs(high)), max(abs(low), abs(high))) if signed else (low, high)
    colours, colour_map = Normalize(low, high if high > low else low + 1), "PuOr" if signed else MAP
    columns = min(len(values), 6 if ticks is None else 3)
    rows = -(-len(values) // columns)
    shape = values[0].shape[0] / values[0].shape[1]
    side = min(WIDTH / columns, 3.2 if ticks is None else 7.5)
    figure, _ = _axes(max(side * columns + 1.5, 5), rows * (side * shape + 0.5) + 0.8, axes=False)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax, value, name in zip(axes, values, titles):
        ax.imshow(value, cmap=colour_map, norm=colours, interpolation="nearest")
        ax.set_title(name, fontsize=LABEL)
        ax.set_xticks(range(len(ticks[1])) if ticks else [], ticks[1] if ticks else [], rotation=60, fontsize=SMALL)
        ax.set_yticks(range(len(ticks[0])) if ticks else [], ticks[0] if ticks else [], fontsize=SMALL)
    for ax in axes[len(values) :]:
        ax.set_visible(False)
    colour_bar = figure.colorbar(ScalarMappable(colours, colour_map), ax=axes, shrink=0.85)
    colour_bar.set_label(bar, fontsize=SMALL)
    colour_bar.ax.tick_params(labelsize=SMALL)
    figure.suptitle(title, fontsize=TITLE)
    figure.labkit_alt = alt
    return figure


def arrows(
    fields: Mapping[str, tuple["Tensor", "Tensor"]], points: "Tensor", title: str, alt: str, names: tuple[str, str] = ("", "")
) -> "Figure":
    """One panel a field {name: (places (N, 2), vectors (N, 2))}, all with arrows of one scale, over a cloud of `points` (M, 2); `names` of the axes."""
    if not fields or any(at.shape != v.shape or at.ndim != 2 or at.shape[1] != 2 for at, v in fields.values()):
        raise LabkitError("A field is a pair of tensors (N, 2): places and the vectors there.")
    width = min(WIDTH, 3.6 * len(fields))
    figure, _ = _axes(width, 0.9 + (width - 0.8) / len(fields), axes=False)
    longest = max(float(v.norm(dim=1).max()) for _, v in fields.values())
    panels = figure.subplots(1, len(fields), squeeze=False, sharex=True, sharey=True)[0]
    for ax, (name, (at, v)) in zip(panels, fields.items()):
        ax.scatter(*points.T.tolist(), s=5, color="#BBBBBB", linewidths=0)
        spread = float(at[:, 0].max() - at[:, 0].min())
        ax.quiver(*at.T.tolist(), *v.T.tolist(), color=COLOURS[0], angles="xy", scale_units="xy", scale=longest / (spread * 0.12), width=0.006)
        ax.set_title(name, fontsize=LABEL)
        ax.set_aspect("equal")
        _dress(ax, names[0], names[1] if ax is panels[0] else "")
    figure.suptitle(title, fontsize=TITLE)
    figure.labkit_alt = alt
    return figure

def clouds(points: Mapping[str, "Tensor"], title: str, alt: str, limit: float | None = None) -> "Figure":
    """One panel a cloud of points {name: (N, 2)}, all with the same axes; `limit` cuts them at plus and minus that."""
    if not points or any(p.ndim != 2 or p.shape[1] != 2 for p in points.values()):
        raise LabkitError("A cloud is a tensor (N, 2): two numbers a point.")
    figure, _ = _axes(WIDTH, 0.9 + (WIDTH - 0.8) / max(len(points), 3), axes=False)
    panels = figure.subplots(1, len(points), squeeze=False, sharex=True, sharey=True)[0]
    for ax, (name, at) in zip(panels, points.items()):
        ax.scatter(*at.T.tolist(), s=4, color=COLOURS[0], alpha=0.4, linewidths=0)
        ax.set_title(name, fontsize=LABEL)
        ax.set_aspect("equal")
        _dress(ax, "", "")
    if limit is not None:
        panels[0].set_xlim(-limit, limit)
        panels[0].set_ylim(-limit, limit)
    figure.suptitle(title, fontsize=TITLE)
    figure.labkit_alt = alt
    return figure


def _axes(width: float, height: float, axes: bool = True) -> tuple:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots() if axes else None


def _dress(ax, x: str, y: str) -> None:
    """Labels that can be read from the back row, and no more frame than is needed."""
    ax.set_xlabel(x, fontsize=LABEL)
    ax.set_ylabel(y, fontsize=LABEL)
    ax.tick_params(labelsize=SMALL)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
