"""plots.course: the course's figures say what they show, tell lines apart without colour, share scales, and refuse what does not fit."""

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from labkit import plots
from labkit.errors import LabkitError

XS = [1, 2, 3]


def photo(shade=0, size=(32, 32)):
    return Image.new("RGB", size, (shade, 80, 120))


def drawn(figure):
    FigureCanvasAgg(figure).draw()
    return figure


def make(kind):
    if kind == "strips":
        return plots.strips({"a": [photo(0), photo(99)], "b": [photo(5), photo(7)]}, ["x", "y"], "Title", "two rows of two pictures")
    if kind == "curves":
        lines = {name: (XS, [n + 1, n + 2, n + 4]) for n, name in enumerate("abcdefgh")}
        return plots.curves(lines, "t", "error", "Title", "eight rising lines", ("log", "log"), marks=True, level=(2, "here"))
    if kind == "maps":
        return plots.maps([torch.eye(4), 3 * torch.eye(4)], ["one", "three"], "share", "Title", "two diagonal lines", signed=True)
    if kind == "clouds":
        return plots.clouds({"a": torch.rand(9, 2), "b": 9 * torch.rand(9, 2)}, "Title", "two clouds of points", limit=2)
    at = torch.rand(9, 2)
    return plots.arrows({"here": (at, at), "there": (at, -2 * at)}, torch.rand(20, 2), "Title", "two fields of arrows", ("x", "y"))


KINDS = ("strips", "curves", "maps", "arrows", "clouds")


@pytest.mark.parametrize("kind", KINDS)
def test_a_figure_is_described_drawn_and_legible(kind):
    figure = drawn(make(kind))
    assert len(plots.described(figure).split()) >= 3 and figure._suptitle.get_text() == "Title"
    sizes = [text.get_fontsize() for ax in figure.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label) if text.get_text()]
    assert all(size >= plots.SMALL for size in sizes)
    assert plots.png(figure)[:4] == b"\x89PNG"


def test_every_picture_stands_in_its_own_row_and_column():
    figure = drawn(make("strips"))
    shades = [int(ax.images[0].get_array()[0, 0, 0]) for ax in figure.axes]
    assert shades == [0, 99, 5, 7] and [ax.get_title() for ax in figure.axes] == ["x", "y", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes] == ["a", "", "b", ""]


def test_pictures_are_as_small_as_asked():
    args = ({"": [photo(), photo()]}, ["x", "y"], "Title", "two small pictures")
    wide, narrow = (drawn(plots.strips(*args, side=side)) for side in (3.0, 1.5))
    assert narrow.axes[0].get_window_extent().width < 0.62 * wide.axes[0].get_window_extent().width


def test_lines_are_told_apart_by_colour_and_by_dashes():
    lines = [line for line in drawn(make("curves")).axes[0].lines if line.get_marker() == "o"]
    assert len({line.get_color() for line in lines}) == len({str(line._unscaled_dash_pattern) for line in lines}) == 8
    assert [list(line.get_ydata()) for line in lines][2] == [3, 4, 6]
    assert lines[0].axes.get_xscale() == lines[0].axes.get_yscale() == "log"


def test_maps_share_one_scale_and_signed_ones_have_zero_in_the_middle():
    figure = drawn(make("maps"))
    limits = [ax.images[0].get_clim() for ax in figure.axes[:2]]
    assert limits == [(-3, 3), (-3, 3)]
    named = drawn(plots.maps([torch.eye(2)], ["m"], "share", "Title", "a small map", ticks=(["r1", "r2"], ["c1", "c2"])))
    assert [t.get_text() for t in named.axes[0].get_yticklabels()] == ["r1", "r2"] and named.axes[0].images[0].get_clim() == (0, 1)


def test_arrows_of_all_panels_have_one_scale():
    quivers = [next(c for c in ax.collections if hasattr(c, "U")) for ax in drawn(make("arrows")).axes]
    assert quivers[0].scale == quivers[1].scale and (quivers[1].U.round(5) == (-2 * quivers[0].U).round(5)).all()


def test_clouds_share_their_axes():
    axes = drawn(make("clouds")).axes
    assert {ax.get_xlim() for ax in axes} == {(-2, 2)} and [len(ax.collections[0].get_offsets()) for ax in axes] == [9, 9]


@pytest.mark.parametrize("wrong", [
    lambda: plots.strips({"a": [photo()]}, ["x", "y"], "T", "a b c"),
    lambda: plots.strips({}, ["x"], "T", "a b c"),
    lambda: plots.curves({}, "x", "y", "T", "a b c"),
    lambda: plots.curves({"a": (XS, [1])}, "x", "y", "T", "a b c"),
    lambda: plots.maps([torch.eye(2)], ["a", "b"], "s", "T", "a b c"),
    lambda: plots.maps([torch.ones(2)], ["a"], "s", "T", "a b c"),
    lambda: plots.arrows({"a": (torch.ones(3, 2), torch.ones(4, 2))}, torch.ones(2, 2), "T", "a b c"),
    lambda: plots.clouds({"a": torch.ones(3)}, "T", "a b c"),
])
def test_what_does_not_fit_is_refused_in_one_line(wrong):
    with pytest.raises(LabkitError) as caught:
        wrong()
    assert "\n" not in str(caught.value)
