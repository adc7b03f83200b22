"""The slider: right pictures at the right places, linked in the browser, never without its static figure and its words."""

import base64
import html
import io
import re
import threading
from dataclasses import replace

import pytest
from PIL import Image

from labkit import plots
from labkit.errors import LabkitError
from labkit.probes.sweep import Sweep
from labkit.widgets import guidance, guidance_slider

SCALES, SEEDS = (0.0, 1.0, 4.0, 7.5), (3, 5)


def sweep() -> Sweep:
    """Pictures whose red says the scale and whose green says the seed."""
    rows = [[Image.new("RGB", (16, 16), (int(30 * w), 40 * s, 0)) for w in SCALES] for s in SEEDS]
    return Sweep(rows, SCALES, SEEDS, "a red sphere")


def parts(knob):
    slider, stack = knob.widget.children
    return slider, stack


def image(child) -> tuple[Image.Image, str]:
    """The picture and the alternative text of one place of the slider."""
    found = re.fullmatch(r'<img [^>]*alt="([^"]*)" src="data:image/png;base64,([^"]*)">', child.value)
    return Image.open(io.BytesIO(base64.b64decode(found[2]))).convert("RGB"), html.unescape(found[1])


def published(knob, monkeypatch) -> list[tuple[dict, dict]]:
    """What displaying sends to the notebook: (data, metadata) of each output."""
    sent = []
    monkeypatch.setattr("IPython.display.publish_display_data", lambda data, metadata=None: sent.append((data, metadata)))
    knob._ipython_display_()
    return sent


def test_every_scale_has_its_own_picture_in_order():
    _, stack = parts(guidance_slider(sweep()))
    assert len(stack.children) == len(SCALES)
    for scale, child in zip(SCALES, stack.children):
        shown, alt = image(child)
        colours = {colour for _, colour in shown.getcolors(shown.width * shown.height)}
        assert {(int(30 * scale), 40 * seed, 0) for seed in SEEDS} <= colours, f"wrong pictures at w = {scale}"
        assert alt == f"“a red sphere” at guidance scale {scale:g}: 2 pictures, seeds 3, 5."


def test_the_slider_names_the_scales_and_starts_where_it_is_told():
    slider, stack = parts(guidance_slider(sweep()))
    assert slider._options_labels == ("0", "1", "4", "7.5") and slider.value == 4.0
    assert stack.selected_index == slider.index == 2, "slider and picture disagree before the first move"
    assert "guidance" in slider.description and "arrow keys" in slider.tooltip
    slider, stack = parts(guidance_slider(sweep(), start=0))
    assert slider.value == 0 and stack.selected_index == 0


def test_it_is_linked_in_the_browser_and_nothing_runs_in_the_kernel(monkeypatch):
    links = []
    import ipywidgets

    real = ipywidgets.jsdlink
    monkeypatch.setattr(ipywidgets, "jsdlink", lambda *ends: links.append(ends) or real(*ends))
    slider, stack = parts(guidance_slider(sweep()))
    assert links == [((slider, "index"), (stack, "selected_index"))]
    drawn = []
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure))
    slider.value = 7.5
    assert drawn == [], "the kernel drew when the slider moved"


def test_it_can_be_made_and_moved_in_another_thread():
    made = []

    def work():
        knob = guidance_slider(sweep())
        parts(knob)[0].value = 1.0
        made.append(parts(knob)[0].index)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert made == [1]


def test_it_never_touches_pyplot():
    import matplotlib.pyplot as plt

    plt.close("all")
    guidance_slider(sweep())
    assert plt.get_fignums() == []


def test_the_static_figure_stands_below_the_widget(monkeypatch):
    knob = guidance_slider(sweep())
    (widget, _), (figure, about) = published(knob, monkeypatch)
    assert widget[guidance.VIEW]["model_id"] == knob.widget.model_id
    assert "slider" in widget["text/plain"] and "0, 1, 4, 7.5" in widget["text/plain"], "no words where widgets are not drawn"
    assert Image.open(io.BytesIO(figure["image/png"])).info["Description"] == about["image/png"]["alt"] == knob.figure.labkit_alt
    assert "0x" not in repr(knob), "an address in the output is different in every run"


def test_one_seed_and_one_scale_will_do():
    knob = guidance_slider(Sweep([[Image.new("RGB", (16, 8))]], (2.0,), (0,), "a cube"))
    slider, stack = parts(knob)
    assert slider.value == 2.0 and image(stack.children[0])[1] == "“a cube” at guidance scale 2: one picture, seed 0."


def test_signs_in_a_prompt_do_not_break_the_page():
    knob = guidance_slider(Sweep([[Image.new("RGB", (16, 8))]], (2.0,), (0,), 'a "cube" <b> & more'))
    assert image(parts(knob)[1].children[0])[1].startswith('“a "cube" <b> & more” at')


@pytest.mark.parametrize("spoilt, said", [
    (lambda s: replace(s, images=s.images[:1]), "seed"),
    (lambda s: replace(s, images=[row[:2] for row in s.images]), "scale"),
    (lambda s: replace(s, images=[], seeds=()), "sweep"),
    (lambda s: replace(s, scales=(1.0, 1.0, 4.0, 7.5)), "twice: 1, 1, 4, 7.5"),
])
def test_a_sweep_that_is_not_whole_is_refused(spoilt, said):
    with pytest.raises(LabkitError, match=said):
        guidance_slider(spoilt(sweep()))


@pytest.mark.parametrize("start", [2, float("nan"), "4"])
def test_a_start_that_was_not_drawn_is_refused(start):
    with pytest.raises(LabkitError, match="it has 0, 1, 4, 7.5"):
        guidance_slider(sweep(), start=start)
