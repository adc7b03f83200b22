"""recipe: what `generate` is asked for, the rarer things too, reaches the picture as it does in diffusers, and is written down."""

import json

import diffusers
import numpy as np
import pytest
import torch
from families import write
from tiny import build

from labkit.checkpoint import load_pipeline, save_pipeline
from labkit.diffusion import LatentDiffusion
from labkit.recipe import complete

PROMPTS = ["a red ball", "a blue cube left of a red ball"]
CALL = dict(prompt=PROMPTS, negative_prompt=["blue", "cube"], height=16, width=32)


def opened(folder, kind="StableDiffusionPipeline"):
    pipe = getattr(diffusers, kind).from_pretrained(folder)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The same weights in labkit and in diffusers: two predictions of the tiny model, and two families as diffusers writes them."""
    made = {}
    for kind in ("epsilon", "v_prediction"):
        lab = build(prediction_type=kind)
        folder = save_pipeline(lab, tmp_path_factory.mktemp("recipe") / kind)
        made[kind] = lab, opened(folder)
    for family, kind in (("sd21", "StableDiffusionPipeline"), ("sdxl", "StableDiffusionXLPipeline")):
        folder = write(family, tmp_path_factory.mktemp("recipe") / family)
        made[family] = LatentDiffusion(**vars(load_pipeline(folder))), opened(folder, kind)
    return made


W = 40.0  # the words move the random networks' latents by half a percent at w = 7.5; here it must matter


def draw(lab, **asked):
    return lab.generate(**{**CALL, "steps": 6, "guidance": W, "seed": [3, 4], "progress": False, **asked}).latents


def theirs(pipe, **asked):
    generators = [torch.Generator("cpu").manual_seed(s) for s in (3, 4)]
    call = {**CALL, "num_inference_steps": 6, "guidance_scale": W, "generator": generators, "output_type": "latent", **asked}
    return pipe(**call).images


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


# --- rescale and interval -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["epsilon", "v_prediction", "sd21", "sdxl"])
def test_rescaled_guidance_draws_the_latents_of_diffusers(model, pairs):
    lab, pipe = pairs[model]
    plain = draw(lab)
    for phi in (0.7, 1.0):
        ours = draw(lab, rescale=phi)
        assert apart(ours, theirs(pipe, guidance_rescale=phi)) < 2e-5
        assert apart(ours, plain) > 1e-3, "and it matters"


def test_rescale_of_a_v_network_is_not_that_of_its_eps(pairs, monkeypatch):
    from labkit import diffusion
    from labkit.guidance import classifier_free
    from labkit.schedule import eps_prediction

    lab, pipe = pairs["v_prediction"]
    expected = theirs(pipe, guidance_rescale=0.7)

    def twin(network, c, uncond, recipe, schedule):
        return classifier_free(eps_prediction(network, schedule), c, uncond, recipe.guidance, recipe.rescale)

    monkeypatch.setattr(diffusion, "guided", twin)
    assert apart(draw(lab, rescale=0.7), expected) > 1e-3
    assert apart(draw(lab), theirs(pipe)) < 2e-5  # without it they are the same


@pytest.mark.parametrize("model", ["epsilon", "v_prediction"])
def test_an_interval_ends_guidance_as_a_callback_of_diffusers_does(model, pairs):
    """Guided at the first three steps of six, t = 831, 665, 499; conditional from then on."""
    lab, pipe = pairs[model]

    def stop(pipe, i, t, values):
        if i == 2:
            pipe._guidance_scale = 1.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[1]
        return values

    expected = theirs(pipe, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert lab.schedule.timesteps(6).tolist() == [831, 665, 499, 333, 167, 1]
    assert apart(draw(lab, interval=(400, 999)), expected) < 2e-5
    for other in ((499.5, 999), (333, 999), (0, 400)):
        assert apart(draw(lab, interval=other), expected) > 1e-3


def test_an_interval_of_everything_and_of_nothing(pairs):
    lab = pairs["v_prediction"][0]
    assert torch.equal(draw(lab, interval=(0, 999)), draw(lab))
    assert torch.equal(draw(lab, interval=(2, 100)), draw(lab, guidance=1.0))


def test_outside_of_the_interval_one_branch_is_computed_and_said(pairs):
    lab, seen = pairs["epsilon"][0], []
    forward = lab.unet.forward

    def watched(x_t, t, c):
        seen.append((lab.layout.branches, len(x_t), len(c)))
        return forward(x_t, t, c)

    lab.unet.forward = watched
    try:
        draw(lab, interval=(300, 700), rescale=0.5)
    finally:
        del lab.unet.forward
    inside, outside = (("uncond", "cond"), 4, 4), (("cond",), 2, 2)
    assert seen == [outside, inside, inside, inside, outside, outside]


def test_words_are_looked_up_in_a_recording_with_an_interval(pairs):
    from labkit.probes.record import record

    lab = pairs["epsilon"][0]
    with record(lab) as trace:
        draw(lab, interval=(300, 700))
    assert len(trace.heatmaps()) == 3 and all(torch.isfinite(torch.as_tensor(m.map)).all() for m in trace.heatmaps())


# --- the recipe ---------------------------------------------------------------------------------------------------------


def test_the_recipe_has_all_that_was_asked_for_and_draws_it_again(pairs):
    lab = pairs["v_prediction"][0]
    asked = dict(guidance=torch.tensor([4.0, 7.5]), rescale=0.7, interval=np.array([100, 900]), sampler="euler_ancestral")
    first = lab.generate(**CALL, seed=[3, 4], progress=False, **asked)
    assert (first.recipe["rescale"], first.recipe["interval"], first.recipe["guidance"]) == (0.7, (100, 900), [4.0, 7.5])
    again = lab.generate(**json.loads(json.dumps(first.recipe)), progress=False)
    assert torch.equal(first.latents, again.latents) and again.recipe == first.recipe


def test_what_is_off_is_not_in_the_recipe(pairs):
    recipe = complete(pairs["epsilon"][0], "a red ball", guidance=np.float32(3)).plain()
    assert json.loads(json.dumps(recipe)) == {
        "prompt": ["a red ball"], "steps": 4, "guidance": 3.0, "seed": [0], "negative_prompt": [""], "height": 16, "width": 16, "sampler": "ddim",
    }  # fmt: skip
