"""image_to_image: the same pictures as diffusers' image-to-image pipelines, and what strength means."""

import pytest
import torch
from families import beside_diffusers

import labkit
from labkit.editing import image_to_image as room
from labkit.editing.image_to_image import taken
from labkit.errors import LabkitError
from labkit.generation import to_pil
from labkit.samplers import ddim

PIPELINES = {"sd15": "", "sd21": "", "sdxl": "XL"}
PROMPTS, H, W = ["a red ball", "a blue cube left of a ball"], 32, 16
PICTURES = to_pil(torch.rand(2, 3, H, W, generator=torch.Generator().manual_seed(5)))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return beside_diffusers(PIPELINES, "Img2Img", tmp_path_factory.mktemp("i2i"))


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def ours(lab, **asked):
    call = dict(prompt=PROMPTS, image=PICTURES, steps=5, guidance=7.5, seed=[0, 7], negative_prompt=["blue", "ball"], strength=0.7, progress=False)
    return labkit.image_to_image(lab, **{**call, **asked})


def theirs(pipe, strength=0.7, kind="latent"):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 7)]
    call = dict(num_inference_steps=5, guidance_scale=7.5, negative_prompt=["blue", "ball"], strength=strength, generator=generators, output_type=kind)
    return pipe(PROMPTS, image=PICTURES, **call).images


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("strength", [0.2, 0.7, 1.0])
def test_the_same_picture_as_diffusers(family, strength, pairs):
    lab, pipe = pairs[family]
    drawn = ours(lab, strength=strength)
    assert apart(drawn.latents, theirs(pipe, strength)) < 1e-5
    assert [image.size for image in drawn.images] == [(W, H)] * 2


def test_wrong_twins_draw_something_else(pairs, monkeypatch):
    lab, pipe = pairs["sd15"]
    expected = theirs(pipe)
    assert apart(ours(lab, strength=0.9).latents, expected) > 1e-3  # a step more
    encode, sample = lab.encode_image, room.q_sample
    with monkeypatch.context() as m:
        m.setattr(lab, "encode_image", lambda pixels, noise: encode(pixels))  # the mean, not a sample
        assert apart(ours(lab).latents, expected) > 1e-5
    with monkeypatch.context() as m:
        m.setattr(room, "q_sample", lambda z0, t, eps, schedule: sample(z0, max(t - 200, 0), eps, schedule))  # the next step's level
        assert apart(ours(lab).latents, expected) > 1e-2


def test_steps_are_those_of_a_whole_run_from_the_first_one_taken(pairs):
    lab, seen = pairs["sd15"][0], []
    with labkit.record(lab, latents=True) as trace:
        drawn = ours(lab, strength=0.5)
    assert [step.i for step in trace.steps] == [3, 4] and [step.t for step in trace.steps] == lab.schedule.timesteps(5)[3:].tolist()
    assert torch.equal(trace.steps[-1].x, drawn.latents)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = list(ddim(lambda x, t: seen.append(t) or 0.1 * x, x, lab.schedule, 5))
    rest = list(ddim(lambda x, t: 0.1 * x, whole[1].x, lab.schedule, 5, first=2))
    assert [step.i for step in rest] == [2, 3, 4] and torch.equal(rest[-1].x, whole[-1].x)
    with pytest.raises(LabkitError, match="first is 5"):
        ddim(lambda x, t: x, x, lab.schedule, 5, first=5)


def test_little_strength_keeps_the_picture_and_much_forgets_it(pairs):
    lab = labkit.load("tabletop")
    source = lab.generate("a red cube on a wooden table", seed=1, steps=10, progress=False)
    kept = [apart(labkit.image_to_image(lab, "a red cube on a wooden table", source.image, s, steps=10, seed=2, progress=False).latents, source.latents) for s in (0.1, 0.5, 1.0)]
    assert kept[0] < kept[1] < kept[2] and kept[0] < 0.4
    one = ours(pairs["sd15"][0], prompt=PROMPTS[1], image=PICTURES[1], seed=7, negative_prompt="ball")
    assert apart(one.latents, ours(pairs["sd15"][0]).latents[1:]) < 1e-5


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(strength=0), "strength is 0"), (dict(strength=1.2), "strength is 1.2"), (dict(strength=0.1), "of 5 steps"), (dict(strength="much"), "'much'"),
        (dict(sampler="euler"), "by DDIM at its own size"), (dict(width=32), "at its own size"), (dict(image="x.png"), "There is no picture"),
        (dict(image=torch.full((1, 3, H, W), 2.0)), r"in \[0, 1\]"), (dict(image=[PICTURES[0]] * 3), "3 images for 2 pictures"), (dict(prompt=""), "empty"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_one_line(pairs, change, says):
    with pytest.raises(LabkitError, match=says) as error:
        ours(pairs["sd15"][0], **change)
    assert "\n" not in str(error.value)
    assert taken(0.7, 5) == 3 and taken(1, 5) == 5
