"""The slider over figures: each label shows its own figure, never without the static figure below."""

import io

import pytest
from PIL import Image

from labkit import plots
from labkit.errors import LabkitError
from labkit.widgets import flip


def figure(shade):
    return plots.strips({"": [Image.new("RGB", (16, 16), (shade, 0, 0))]}, ["x"], "Title", f"a picture of shade {shade}")


def knob(**options):
    return flip([figure(s) for s in (10, 120, 250)], ["low", "mid", "high"], "shade", figure(60), **options)


def test_every_label_shows_its_own_figure():
    made = knob(start=1)
    (axis,), (panel,) = made.state["axes"], made.state["panels"]
    assert axis["values"] == ["low", "mid", "high"] and axis["start"] == 1
    assert "a picture of shade 120" in panel["alt"] and "low, mid, high" in panel["alt"]
    for shade, (start, length) in zip((10, 120, 250), panel["pictures"], strict=True):
        picture = Image.open(io.BytesIO(made.blob[start : start + length])).convert("RGB")
        reds = [pixel for _, pixel in picture.getcolors(picture.width * picture.height) if pixel[1] + pixel[2] < 40]
        assert any(abs(pixel[0] - shade) < 12 for pixel in reds), f"shade {shade} is not in its picture"


def test_the_words_and_the_figure_stand_in_for_the_widget():
    made = knob()
    assert "low, mid, high" in repr(made) and plots.described(made.figure) == "a picture of shade 60"


@pytest.mark.parametrize("frames, labels, start", [([], [], 0), ([1], ["a", "b"], 0), ([1, 2], ["a", "a"], 0), ([1, 2], ["a", "b"], 2)])
def test_frames_without_labels_of_their_own_are_refused(frames, labels, start):
    with pytest.raises(LabkitError):
        flip(frames, labels, "shade", None, start)
