"""The model in data/: whole, small enough, and as good as its card says, on a sample."""
import re

import numpy as np
import pytest
import torch

import labkit
from labkit.checkpoint import verify_sums
from labkit.models.sources import DATA
from labkit.scenes.render import render
from labkit.scenes.judge import Wants, right
from labkit.scenes.prompts import PAIRS
from labkit.scenes.verify import read
from labkit.training.data import TEST_SEED, World, scenes
from labkit.training.measures import psnr
from tests.benchmarks import figures

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def lab():
    return labkit.load("tabletop", device="cpu")


def test_sums_hold_and_everything_fits():
    verify_sums(DATA / "tabletop")
    verify_sums(DATA / "verifier")
    files = [p for p in DATA.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 64 * MEBIBYTE
    assert {p.suffix for p in files if p.stat().st_size > MEBIBYTE} <= {".safetensors"}


def test_card_states_the_parameters_that_are_there(lab):
    card = (DATA / "README.md").read_text(encoding="utf-8")
    for part in (lab.unet, lab.vae, lab.text_encoder):
        assert f"{sum(p.numel() for p in part.parameters()):,}" in card
    assert not re.findall(r"@\w+@", card)


@pytest.mark.parametrize("path", figures.DOCUMENTS, ids=("README", "card"))
def test_tables_say_what_was_measured(path):
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- figures: (.*) -->", text)) <= set(figures.TABLES) and text.count("<!-- figures") == text.count("<!-- end -->") > 0
    assert figures.filled(text, figures.kept()) == text


def test_what_was_measured_is_of_the_shipped_weights():
    assert figures.kept().get("weights", figures.weights()) == figures.weights()


def test_held_out_renders_come_back(lab):
    pictures = render(scenes(World(), TEST_SEED, 16)).image
    back = lab.decode(lab.encode_image(pictures))
    assert float(psnr(pictures, back).mean()) >= 31  # the card has the mean of 500; the first target was 27


def test_latents_have_unit_variance(lab):
    z = lab.encode_image(render(scenes(World(), TEST_SEED, 16)).image)
    assert float(z.std()) == pytest.approx(1, abs=0.15)


def test_one_object_prompts_are_drawn_right(lab):
    """Every pair of colour and shape that was trained on, once."""
    wanted = [Wants(things=({"colour": colour, "shape": shape},)) for colour, shape in PAIRS]
    prompts = [f"{'an' if colour == 'orange' else 'a'} {colour} {shape}" for colour, shape in PAIRS]
    drawn = lab.generate(prompts, seed=list(range(len(prompts))), progress=False)
    counted = sum(right(said, wants) for said, wants in zip(read(drawn.images), wanted))
    assert counted >= 27  # of 31; chance is 1


def test_words_look_where_their_object_is(lab):
    """More of the attention to "red" falls on the red pixels than their share of the picture."""
    with labkit.record(lab) as trace:
        image = lab.generate("a red sphere", seed=0, progress=False).image
    pixels = torch.from_numpy(np.array(image)).float()
    red = (pixels[..., 0] > 1.6 * pixels[..., 1:].amax(-1)).float()
    assert 0.01 < red.mean() < 0.6
    share = trace.heatmap("red").resized(*red.shape)
    assert float((share * red).sum() / share.sum()) > 1.3 * float(red.mean())
