"""The slider over figures: each label shows its own figure, moved by the browser, never without the static figure below."""

import base64
import html
import io
import re

import pytest
from PIL import Image

from labkit import plots, plots_course
from labkit.errors import LabkitError
from labkit.widgets import flip


def figure(shade):
    return plots_course.strips({"": [Image.new("RGB", (16, 16), (shade, 0, 0))]}, ["x"], "Title", f"a picture of shade {shade}")


def knob(**options):
    return flip([figure(s) for s in (10, 120, 250)], ["low", "mid", "high"], "shade", figure(60), **options)


def test_every_label_shows_its_own_figure():
    slider, stack = knob(start=1).widget.children
    assert slider._options_labels == ("low", "mid", "high") and slider.index == stack.selected_index == 1
    for shade, child in zip((10, 120, 250), stack.children):
        alt, png = re.fullmatch(r'<img [^>]*alt="([^"]*)" src="data:image/png;base64,([^"]*)">', child.value).groups()
        assert html.unescape(alt) == f"a picture of shade {shade}"
        picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
        assert (shade, 0, 0) in {colour for _, colour in picture.getcolors(picture.width * picture.height)}


def test_slider_and_pictures_are_linked_in_the_browser_and_the_words_stand_in(monkeypatch):
    sent = []
    monkeypatch.setattr("IPython.display.publish_display_data", lambda data, metadata=None: sent.append((data, metadata)))
    made = knob()
    made._ipython_display_()
    assert "low, mid, high" in sent[0][0]["text/plain"] and plots.png(made.figure) == sent[1][0]["image/png"]
    assert sent[1][1]["image/png"]["alt"] == "a picture of shade 60"


@pytest.mark.parametrize("frames, labels, start", [([], [], 0), ([1], ["a", "b"], 0), ([1, 2], ["a", "a"], 0), ([1, 2], ["a", "b"], 2)])
def test_frames_without_labels_of_their_own_are_refused(frames, labels, start):
    with pytest.raises(LabkitError):
        flip(frames, labels, "shade", None, start)
