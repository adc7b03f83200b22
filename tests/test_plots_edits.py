"""Figures of edits: what is shown, on which scale, legible."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import tiny
from labkit import plots
from labkit.editing.alignment import align
from labkit.editing.result import Edit
from labkit.errors import LabkitError
from labkit.plots import edit_frontier, edit_panels

PROMPTS = ("a red ball", "a blue ball", "a red ball left of a cube")


def an_edit(masks=True, size=(48, 48)) -> Edit:
    tokenizer = tiny.build().tokenizer
    sources = [Image.new("RGB", size, (100, 100, 100)), Image.new("RGB", size, (90, 90, 90))]
    edited = [[s.copy() for s in sources] for _ in PROMPTS[1:]]
    edited[0][1].paste((150, 90, 90), (0, 0, 24, 24))  # upper left, 60 / 3 = 20 of 255 on average
    maps = torch.full((3, 2, 4, 4, 16), 0.01)
    maps[0, 1, 0, 0, 2], maps[1, 1, 3, 3, 2] = 0.2, 0.4
    alignments = [align(tokenizer, PROMPTS[0], text) for text in PROMPTS[1:]]
    m = torch.zeros(2, 2, 8, 8)
    m[0, 1, :4, :4] = 1
    return Edit(sources, edited, torch.zeros(3, 2, 4, 8, 8), maps, m if masks else None, alignments, PROMPTS, {}, "tiny", tokenizer)


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_visible() and ax.images and ax.get_title()]


def test_the_panels_are_source_edit_mask_difference_and_changed_words():
    figure = edit_panels(an_edit(), 0, 1)
    assert titles(figure) == ["the source", "the edit", "let in (white)", "where they differ", "“red” in the source", "“blue” in the edit"]
    shown = {ax.get_title(): np.asarray(ax.images[0].get_array(), dtype=float) for ax in figure.axes if ax.get_title()}
    differs = shown["where they differ"].sum(-1)
    assert differs[:24, :24].min() > differs[24:].max() and differs[:24, :24].min() > differs[:, 24:].max()
    assert shown["let in (white)"][:24, :24].min() == 255 and shown["let in (white)"][24:].max() == 0
    brightest = lambda panel: np.unravel_index(panel.sum(-1).argmax(), (48, 48))  # noqa: E731
    assert max(brightest(shown["“red” in the source"])) < 16 and min(brightest(shown["“blue” in the edit"])) >= 32
    assert shown["“blue” in the edit"].sum(-1).max() > shown["“red” in the source"].sum(-1).max()  # one scale
    assert "“red” in the source (up to 20.0%)" in figure.labkit_alt and "5.0 of 255" in figure.labkit_alt and "0% of the pixels" in figure.labkit_alt
    plots.png(figure)


def test_words_can_be_chosen_and_new_ones_are_shown():
    assert titles(edit_panels(an_edit(masks=False), 1))[-2:] == ["“a” in the edit", "“cube” in the edit"]
    assert titles(edit_panels(an_edit(), 1, words=["ball", "cube"]))[-3:] == ["“ball” in the source", "“ball” in the edit", "“cube” in the edit"]
    assert "let in (white)" not in titles(edit_panels(an_edit(masks=False)))
    with pytest.raises(LabkitError, match="'left' is not in the prompt"):
        edit_panels(an_edit(), 0, words=["left"])
    with pytest.raises(LabkitError, match="no words"):
        edit_panels(an_edit(), 0, words=[])


POINTS = [
    {"cross": c, "self": s, "kept": 15 + 10 * c + s, "success": 0.9 - 0.3 * c * s, "low": 0.85 - 0.3 * c * s, "high": 0.95 - 0.3 * c * s} for c in (0, 0.4, 0.8) for s in (0, 0.4)
]  # fmt: skip


def test_the_frontier_has_a_line_a_self_attention_window_and_named_points():
    figure = edit_frontier([*POINTS, {"name": "no editing", "kept": 13.0, "success": 0.97}])
    ax = figure.axes[0]
    lines = [bar.lines[0].get_xydata().tolist() for bar in ax.containers]
    assert lines == [[[p["kept"], p["success"]] for p in POINTS if p["self"] == s] for s in (0, 0.4)]
    assert "no editing" in [t.get_text() for t in ax.texts] and [t.get_text() for t in ax.get_legend().get_texts()] == ["0%", "40%"]
    assert "no editing: 97% at 13.0 dB" in figure.labkit_alt
    with pytest.raises(LabkitError, match="no points"):
        edit_frontier([])


@pytest.mark.parametrize("figure", [lambda: edit_panels(an_edit()), lambda: edit_panels(an_edit(size=(72, 48)), 1), lambda: edit_frontier(POINTS)])
def test_legible_and_nothing_cut_off(figure):
    figure = figure()
    FigureCanvasAgg(figure).draw()
    width, height = figure.get_size_inches() * figure.dpi
    written = [t for ax in figure.axes if ax.get_visible() for t in [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts] if t.get_text()]
    assert len(written) >= 3 and min(t.get_fontsize() for t in written) >= 12
    for text in written:
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()
