"""plots: figures that can be read, compared and heard, made without global state, saved complete or not at all."""

import os
import subprocess
import sys
import threading
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from labkit import plots
from labkit.errors import LabkitError
from labkit.probes.heatmap import HeatMap

WORDS = "a red sphere left of blue cube".split()


def photo(width=48, height=48, shade=0) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 5 % 256, y * 5 % 256, (x + y + shade) % 256], -1).astype(np.uint8))


def heatmaps(n=len(WORDS), strength=0.3):
    found = []
    for i, word in enumerate(WORDS[:n]):
        share = torch.full((4, 4), 0.01)
        share[i % 4, i // 4] = strength / (i + 1)
        found.append(HeatMap(word, share, "mean over 20 steps, 7 layers and all heads; the shares of all 32 tokens sum to 1"))
    return found


def make(kind, wide=False):
    image = photo(72 if wide else 48)
    if kind == "words":
        return plots.word_heatmaps(image, heatmaps(3 if wide else 7))
    if kind == "trajectory":
        return plots.trajectory([image] * 6, [image] * 6, (999, 799, 599, 399, 199, 49))
    if kind == "trade":
        runs = [{"guidance": w, "six": {"share": a, "low": a - 0.05, "high": a + 0.04}, "diversity": d, "saturation": s, "frechet": f}
                for w, a, d, s, f in ((4.0, 0.82, 0.31, 0.20, 9.0), (1.0, 0.40, 0.55, 0.15, 14.0), (2.0, 0.71, 0.42, 0.17, 8.0), (8.0, 0.84, 0.24, 0.27, 16.0))]
        return plots.guidance_trade(runs[: 2 if wide else 4], {"saturation": 0.18, "frechet": 2.0})
    return plots.guidance_sweep([[image] * 4] * 3, (1.0, 2.0, 4.0, 7.5), (0, 1, 2))


KINDS = ("words", "trajectory", "sweep", "trade")


def looking(kind):
    """The figures of labkit.probes' other rooms."""
    if kind == "rows":
        return plots.rows_of_pictures([[photo()] * 5] * 2, range(5), ["seed 0", "seed 1"], "Between", "share of the second")
    if kind == "curves":
        measures = {"angle": torch.rand(3, 4), "diversity": torch.rand(4), "entropy": torch.rand(3, 4), "clipped": torch.rand(3, 4)}
        return plots.measures((1, 2, 4, 8), measures, "guidance scale w", "What guidance does")
    if kind == "matrix":
        return plots.matrix(torch.linspace(-1, 1, 12).view(3, 4), ["red", "blue", "cube"], ["start", "a $1", "sphere", "end"], "cosine", "Alike", ("layer", "token"))
    coordinates = torch.randn(5, 9, 2, generator=torch.Generator().manual_seed(0)).cumsum(1)
    return plots.latent_paths(SimpleNamespace(coordinates=coordinates, share=torch.tensor([0.4, 0.2]), seeds=range(5), prompt="a $5 ball", what="x_t"))


LOOKING = ("rows", "curves", "matrix", "paths")


@pytest.mark.parametrize("kind", LOOKING)
def test_figures_of_looking_can_be_read_and_heard(kind):
    figure = looking(kind)
    width, height = figure.get_size_inches() * figure.dpi
    assert 6 <= figure.get_size_inches()[0] <= 12
    FigureCanvasAgg(figure).draw()
    for text in texts(figure):
        box = text.get_window_extent()
        assert text.get_fontsize() >= 12 and box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()
    alt = figure.labkit_alt
    assert 60 < len(alt) < 500 and "\n" not in alt and alt.endswith(".")
    assert {"rows": "2 by 5 pictures", "curves": "angle from", "matrix": "blue, cube", "paths": "40% and 20%"}[kind] in alt
    assert plots.png(figure)[:4] == b"\x89PNG"


def test_curves_show_every_seed_and_their_mean():
    rows = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    ax = plots.measures((1, 2), {"angle": rows}, "w").axes[0]
    assert [list(line.get_ydata()) for line in ax.lines] == [[0, 1], [2, 5], [1, 3]] and ax.get_ylabel() == "degrees"


def test_a_table_parts_at_zero_and_is_written_into():
    ax = looking("matrix").axes[0]
    assert ax.images[0].get_clim() == (-1, 1) and [t.get_text() for t in ax.texts][:2] == ["-1.00", "-0.82"]
    assert plots.matrix([[0.5, 0.2]], ["a"], ["b", "c"], "x").axes[0].images[0].get_clim() == (0, 0.5)
    assert not plots.matrix(torch.zeros(2, 20), range(2), range(20), "x").axes[0].texts


def texts(figure) -> list[Text]:
    """All that is written in a figure, tick labels beyond the axes' ends left out (they are never drawn)."""
    FigureCanvasAgg(figure).draw()
    found = [figure._suptitle]
    for ax in (ax for ax in figure.axes if ax.get_visible()):
        low, high = ax.get_xlim()
        found += [ax.title, ax.xaxis.label, ax.yaxis.label]
        found += [label for at, label in zip(ax.get_xticks(), ax.get_xticklabels()) if low <= at <= high]
    return [text for text in found if text.get_text()]


@pytest.mark.parametrize("strongest", [0.3, 0.2, 0.02])
def test_a_colour_bar_says_where_its_marks_are(strongest):
    """The numbers at the marks are not rounded: those of a bar to 20 % stand every 2.5 %."""
    figure = plots.word_heatmaps(photo(), heatmaps(strength=strongest))
    FigureCanvasAgg(figure).draw()
    marks = figure.axes[-1].xaxis
    said = [float(label.get_text().removesuffix("%")) / 100 for label in marks.get_ticklabels()]
    assert len(said) > 3 and said == pytest.approx(list(marks.get_ticklocs()), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", [False, True])
def test_legible_on_a_projector_and_nothing_cut_off(kind, wide):
    figure = make(kind, wide)
    width, height = figure.get_size_inches() * figure.dpi
    assert 6 <= figure.get_size_inches()[0] <= 12
    written = texts(figure)
    # 12 points at 12 inches; a narrower figure may be shown larger, never the other way round
    assert len(written) >= 3 and min(t.get_fontsize() for t in written) >= 12
    for text in written:
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()
    panels = [ax.get_window_extent() for ax in figure.axes if ax.get_visible() and ax.images]
    assert bool(panels) == (kind != "trade")
    if kind == "trade":
        return  # curves, no pictures to be stretched
    assert panels[0].width / panels[0].height == pytest.approx(1.5 if wide else 1, rel=0.02)  # not stretched
    assert sum(p.width * p.height for p in panels) > 0.5 * width * height or wide  # pictures, not margins


def test_words_share_one_scale_and_say_so():
    figure = make("words")
    shown = [ax for ax in figure.axes if ax.get_visible() and ax.images]
    assert [ax.get_title() for ax in shown] == ["the picture", *(f"“{w}”" for w in WORDS)]
    bar = next(ax for ax in figure.axes if "share of attention" in ax.get_xlabel())
    assert "the same scale in all panels" in bar.get_xlabel() and "sum to 1" in bar.get_xlabel()
    assert bar.get_xlim() == pytest.approx((0.01, 0.3))
    # the strongest place of the first word is brighter than that of the last, which has a seventh of it
    grey = Image.new("RGB", (48, 48), (128, 128, 128))
    panels = [ax.images[0].get_array() for ax in plots.word_heatmaps(grey, heatmaps()).axes if ax.images][1:]
    peaks = [float(np.asarray(p).sum(-1).max()) for p in panels[:7]]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 2 * peaks[-1]


def test_a_map_lies_where_its_places_are():
    share = torch.zeros(4, 6)
    share[0, 5] = 0.5  # upper right
    panel = plots.word_heatmaps(Image.new("RGB", (48, 32)), [HeatMap("x", share, "")]).axes[1].images[0].get_array()
    bright = np.unravel_index(np.asarray(panel).sum(-1).argmax(), (32, 48))
    assert panel.shape == (32, 48, 3) and bright[0] < 8 and bright[1] >= 40


def test_colours_rise_evenly_in_lightness_and_the_bar_is_what_panels_show():
    colours = plots.tinted()(np.linspace(0, 1, 64))[:, :3]
    luminance = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all()
    grey = plots.over_grey(Image.new("RGB", (64, 1), (128, 128, 128)), np.linspace(0, 1, 64)[None])
    assert np.abs(grey[0] - colours).max() < 0.01


def test_trajectory_and_sweep_are_labelled():
    figure = make("trajectory")
    assert [ax.get_title() for ax in figure.axes[:6]] == [f"$t$ = {t}" for t in (999, 799, 599, 399, 199, 49)]
    assert "$x_t$" in figure.axes[0].get_ylabel() and "$x_0$" in figure.axes[6].get_ylabel()
    shades = [[photo(shade=10 * r + c) for c in range(4)] for r in range(3)]
    figure = plots.guidance_sweep(shades, (1.0, 2.0, 4.0, 7.5), (0, 5, 9))
    assert [ax.get_title() for ax in figure.axes[:4]] == ["$w$ = 1", "$w$ = 2", "$w$ = 4", "$w$ = 7.5"]
    assert [figure.axes[i].get_ylabel() for i in (0, 4, 8)] == ["seed 0", "seed 5", "seed 9"]
    for i, ax in enumerate(figure.axes):
        assert np.array_equal(ax.images[0].get_array(), np.asarray(shades[i // 4][i % 4]))


def test_dollars_in_a_prompt_are_dollars():
    figure = plots.word_heatmaps(photo(), [HeatMap("$x^2$", torch.eye(4), "")], plots.plain("a $5 and a $6 cube"))
    assert figure._suptitle.get_text() == r"a \$5 and a \$6 cube"
    assert len(plots.png(figure)) > 1000


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_says_what_it_shows(kind):
    alt = make(kind).labkit_alt
    assert 60 < len(alt) < 500 and "\n" not in alt and alt.endswith(".")
    assert {"words": "“a” (30%, top left)", "trajectory": "999, 799", "sweep": "1, 2, 4, 7.5", "trade": "40, 71, 82, 84"}[kind] in alt


def test_saved_with_its_words_inside(tmp_path):
    figure = make("sweep")
    path = plots.save(figure, tmp_path / "new folder" / "sweep é.png")
    image = Image.open(path)
    assert image.format == "PNG" and image.info["Description"] == figure.labkit_alt
    box = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())  # inches
    assert [abs(side - (inches + 0.16) * plots.DPI) <= 1 for side, inches in zip(image.size, (box.width, box.height))] == [True, True]


def test_no_title_is_cut_and_no_margin_is_empty():
    square = Image.new("RGB", (64, 64), "black")
    strips = plots.strips({"": [square, square]}, ["a title", "a title that is wider than its picture is"], "Two squares", "Two black squares side by side.", side=1.5)
    ink = np.asarray(Image.open(BytesIO(plots.png(strips))).convert("L")) < 200
    assert not ink[:, [0, 1, -2, -1]].any() and not ink[[0, 1, -2, -1]].any(), "cut at an edge"
    assert ink[-12:].any() and ink[:12].any() and ink[:, -12:].any(), "an empty margin"


def test_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    figure = make("sweep")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "replace", full)
        with pytest.raises(LabkitError, match="figure.png: cannot be written .No space left"):
            plots.save(figure, path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["figure.png"]
    with pytest.raises(LabkitError, match="cannot be written"):
        plots.save(figure, path / "below a file.png")


def test_shown_in_a_notebook_with_its_words(monkeypatch, capsys):
    import IPython.display

    published = []
    monkeypatch.setattr(IPython.display, "publish_display_data", lambda data, metadata: published.append((data, metadata)))
    figure = make("sweep")
    assert plots.show(figure) is None
    (data, metadata) = published[0]
    assert Image.open(BytesIO(data["image/png"])).format == "PNG"
    assert metadata == {"image/png": {"alt": figure.labkit_alt}}
    assert capsys.readouterr().out == figure.labkit_alt + "\n"
    del figure.labkit_alt
    with pytest.raises(LabkitError, match="no description"):
        plots.show(figure)


def test_made_in_a_thread():
    done = []
    thread = threading.Thread(target=lambda: done.append(plots.png(make("sweep"))))
    thread.start()
    thread.join()
    assert done[0][:4] == b"\x89PNG"


def test_no_pyplot_and_nothing_at_import():
    code = (
        "import sys, labkit.plots as p; assert 'matplotlib' not in sys.modules;"
        "from PIL import Image; p.png(p.guidance_sweep([[Image.new('RGB', (8, 8))]], [1], [0]));"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(
    "call",
    [
        lambda: plots.word_heatmaps(photo(), []),
        lambda: plots.trajectory([], [], []),
        lambda: plots.trajectory([photo()], [photo()], [1, 2]),
        lambda: plots.guidance_sweep([], [], []),
        lambda: plots.guidance_sweep([[photo()], [photo()] * 2], [1, 2], [0, 1]),
        lambda: plots.guidance_sweep([[photo()]], [1], [0, 1]),
        lambda: plots.png(SimpleNamespace()),
        lambda: plots.rows_of_pictures([], []),
        lambda: plots.rows_of_pictures([photo()], [1, 2]),
        lambda: plots.rows_of_pictures([[photo()]], [1], ["a", "b"]),
        lambda: plots.measures((1, 2), {}, "w"),
        lambda: plots.measures((1, 2), {"angle": [1, 2, 3]}, "w"),
        lambda: plots.matrix([[1, 2]], ["a"], ["b"], "x"),
        lambda: plots.latent_paths(SimpleNamespace(coordinates=torch.zeros(3, 1, 2), share=torch.ones(2), seeds=range(3), prompt="", what="x0")),
    ],
)
def test_data_that_does_not_fit_is_one_line(call):
    with pytest.raises(LabkitError) as error:
        call()
    assert "\n" not in str(error.value)


def test_trade_is_over_scales_in_order_and_says_the_best():
    figure = make("trade")
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [1, 2, 4, 8] and list(line.get_ydata()) == pytest.approx([40, 71, 82, 84])
    assert "Most are right at 8." in figure.labkit_alt and "0.15, 0.17, 0.2, 0.27" in figure.labkit_alt
    assert len(figure.axes[2].lines) == 2 and figure.axes[2].lines[1].get_ydata()[0] == 0.18, "beside the renders"
    with pytest.raises(LabkitError, match="two scales"):
        plots.guidance_trade([{"guidance": 1.0, "six": {"share": 1, "low": 1, "high": 1}}], {})
