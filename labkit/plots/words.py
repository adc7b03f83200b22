"""Where each word had the attention: maps of colour over the picture, all on one scale."""

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from PIL.Image import Image

from labkit.errors import LabkitError
from labkit.plots.canvas import SMALL, TITLE, grid, over_grey, percent, picture, plain, tinted

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def word_heatmaps(image: Image, heatmaps: Sequence, title: str | None = None) -> "Figure":
    """One panel a word over the greyed picture, all on one scale: the attention that each place gave to it.

    `heatmaps` are HeatMaps in one unit, such as `trace.heatmaps()`. The scale goes from the smallest to the largest value in any panel, not
    from zero: tokens share what there is, and in most layers no word has much more than its neighbours.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    heatmaps = list(heatmaps)
    if not heatmaps:
        raise LabkitError("There are no heat maps to draw: give trace.heatmaps().")
    if len({h.unit for h in heatmaps}) > 1:
        raise LabkitError(f"Maps in different units cannot share a scale: {', '.join(sorted({h.unit for h in heatmaps}))}; draw them apart.")
    n = len(heatmaps) + 1
    columns = min(n, max(4, -(-n // 2)), 6)
    rows = -(-n // columns)
    averages = fill(f"({heatmaps[0].averages})", 26 * columns)  # characters that fit under so many panels
    footer = 0.6 + 0.25 * len(averages.splitlines())
    figure, axes = grid(rows, columns, image.height / image.width, titles=rows, footer=footer)
    figure.suptitle(title or "Where each word had the attention", fontsize=TITLE)
    low, high = min(float(h.map.min()) for h in heatmaps), max(float(h.map.max()) for h in heatmaps)
    colours = Normalize(low if low < high else 0, high)  # the same for all: a word may have little everywhere
    panels = [ax for row in axes for ax in row]
    picture(panels[0], image, "the picture")
    for ax, heatmap in zip(panels[1:], heatmaps):
        share = heatmap.resized(image.height, image.width).numpy()
        picture(ax, over_grey(image, colours(share)), f"“{plain(heatmap.word)}”")
    for ax in panels[n:]:
        ax.set_visible(False)
    bar = figure.colorbar(ScalarMappable(colours, tinted()), ax=panels, location="bottom", aspect=45, fraction=0.05, pad=0.03)
    same = ", the same scale in all panels" if len(heatmaps) > 1 else ""
    bar.set_label(f"{heatmaps[0].unit}{same}\n{averages}", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    if heatmaps[0].unit.startswith("share"):
        bar.ax.xaxis.set_major_formatter(percent)
    bar.outline.set_visible(False)
    strongest = sorted(heatmaps, key=lambda h: float(h.map.max()), reverse=True)[:3]
    figure.labkit_alt = (
        f"Attention of {len(heatmaps)} words as heat maps over the picture, one panel each; strongest are "
        + ", ".join(f"“{h.word}” ({strength(h)}, {place(h)})" for h in strongest)
        + f"; {heatmaps[0].averages}."
    )
    return figure


def strength(heatmap) -> str:
    """The largest value of a map, in words."""
    return f"{float(heatmap.map.max()):.0%}" if heatmap.unit.startswith("share") else f"{float(heatmap.map.max()):.2g}"


def place(heatmap) -> str:
    """Where a map has its maximum, in words."""
    h, w = heatmap.map.shape
    y, x = divmod(int(heatmap.map.argmax()), w)
    rows, columns = ("top", "middle", "bottom"), ("left", "centre", "right")
    return f"{rows[3 * y // h]} {columns[3 * x // w]}"
