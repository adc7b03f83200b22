"""Before and after: a picture, its edit, and what differs, with the maps of both prompts' words.

    difference = |after - before|, mean over red, green, blue, shown from 0 (black) to the largest (white)

Words that stand in both prompts light up in both pictures, so one sees whether an edit has kept the attention of the words that it
was to keep (Hertz et al. 2022, "Prompt-to-Prompt Image Editing with Cross Attention Control").
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from labkit import plots
from labkit.errors import LabkitError
from labkit.models.tokenizer import normalise
from labkit.probes.heatmap import HeatMap
from labkit.widgets.view import Panel, View, Word

Maps = Sequence[HeatMap]


def before_after(before: Image.Image, after: Image.Image, maps_before: Maps = (), maps_after: Maps = (), title: str = "Before and after") -> View:
    """Two pictures of one size and their difference, side by side, with the heat maps of their words (`trace.heatmaps(image=...)`).

    Raises LabkitError if the sizes differ, or if one side's heat maps do.
    """
    if before.size != after.size:
        raise LabkitError(f"The pictures have sizes {before.size} and {after.size}: an edit keeps the size.")
    changed, most = difference(before, after)
    panels = (
        side(before, maps_before, "before", title), side(after, maps_after, "after", title),
        Panel([changed], f"Where the two pictures differ: white is a difference of {most} of 255, black is none.", label=f"difference (white: {most} of 255)"),
    )  # fmt: skip
    text = f"[{title}: run this cell in JupyterLab to point at words and places. Both pictures and the maps of their words are below.]"
    return View(title, panels, (), static(panels, maps_before, maps_after, title), text)


def difference(before: Image.Image, after: Image.Image) -> tuple[Image.Image, int]:
    """|after - before| as a grey picture scaled to its largest value, and that value, of 255."""
    a, b = (np.asarray(picture.convert("RGB"), dtype=float) for picture in (before, after))  # (H, W, 3)
    far = abs(b - a).mean(2)  # (H, W)
    most = far.max()
    return Image.fromarray((far * (255 / most if most else 0)).round().astype("uint8"), "L"), round(float(most))


def side(picture: Image.Image, maps: Maps, label: str, title: str) -> Panel:
    """A picture with its words' maps."""
    if len({tuple(m.map.shape) for m in maps}) > 1:
        raise LabkitError("The heat maps of one picture have several sizes: take those of one trace.heatmaps(...).")
    named = tuple(Word(normalise(m.word)[0], m.word) for m in maps)
    if len({word.id for word in named}) < len(named):
        raise LabkitError(f"A word has several heat maps: {', '.join(m.word for m in maps)}; give one for each word.")
    shares = {(): torch.stack([m.map for m in maps])} if maps else {}
    return Panel([picture], f"{title}: the picture {label}. Its words are buttons below.", named, shares, label)


def static(panels: tuple[Panel, ...], maps_before: Maps, maps_after: Maps, title: str):
    """The figure: a row for each picture, with the maps of its words on one scale; the difference at the end of the first row."""
    rows = [(panels[0], list(maps_before)), (panels[1], list(maps_after))]
    columns = 2 + max(len(maps) for _, maps in rows)
    if columns == 2:
        rows, columns = [(panels[0], [])], 3
    first = panels[0].pictures[0]
    figure, axes = plots.grid(len(rows), columns, first.height / first.width, titles=len(rows))
    figure.suptitle(title, fontsize=plots.TITLE)
    every = [m for _, maps in rows for m in maps]
    low, high = min((float(m.map.min()) for m in every), default=0.0), max((float(m.map.max()) for m in every), default=1.0)
    for ax in (ax for line in axes for ax in line):
        ax.set_visible(False)

    def put(ax, image, name: str) -> None:
        ax.set_visible(True)
        plots.picture(ax, image, name)

    for line, (panel, maps) in zip(axes, rows):
        put(line[0], panel.pictures[0], panel.label)
        for ax, m in zip(line[1:], maps):
            share = (m.resized(first.height, first.width).numpy() - low) / max(high - low, 1e-12)
            put(ax, plots.over_grey(panel.pictures[0], share), f"“{plots.plain(m.word)}”")
    put(axes[0][-1], panels[2].pictures[0].convert("RGB"), "difference")
    if not every:
        put(axes[0][1], panels[1].pictures[0], panels[1].label)
    words = f", each with the heat maps of its words on one scale from {low:.0%} to {high:.0%}" if every else ""
    figure.labkit_alt = f"{title}: the picture before and after{words}, and their {panels[2].label}."
    return figure
