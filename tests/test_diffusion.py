"""diffusion: the same picture as diffusers from the same weights and seed, batches that do not mix, errors of one line."""

import json

import diffusers
import pytest
import torch
from PIL import Image

from labkit.checkpoint import load_pipeline, save_pipeline
from labkit.diffusion import LatentDiffusion
from labkit.generation import from_pil, to_pil
from labkit.errors import LabkitError
from labkit.models.clip import CLIPText
from labkit.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from labkit.models.tokenizer import Tokenizer, build_vocabulary
from labkit.models.unet import UNet
from labkit.models.vae import VAE
from labkit.samplers import SAMPLERS
from labkit.schedule import ScheduleConfig, q_sample, x0_from_eps
from labkit.tap import listen, taps

WORDS = "a red blue ball cube left of".split()
PROMPTS = ["a red ball", "a blue cube left of a red ball"]


def build(**change) -> LatentDiffusion:
    """A model of the true make and tiny widths; random weights, strong enough that prompt, seed and guidance all matter."""
    generator = torch.Generator().manual_seed(0)
    unet = UNet(UNetConfig((32, 64), (True, False), (2, 4), 1, 48, norm_num_groups=8, sample_size=8))
    vae = VAE(VAEConfig((16, 32), 1, norm_num_groups=4, scaling_factor=0.31, sample_size=16))
    text = CLIPText(CLIPTextConfig(700, 16, 48, 96, 2, 4))
    with torch.no_grad():
        for p in [*unet.parameters(), *vae.parameters(), *text.parameters()]:
            p.copy_(torch.randn(p.shape, generator=generator) * (0.08 if p.ndim > 1 else 0.1) + (p.ndim == 1) * 0.5)
    tokenizer = Tokenizer(*build_vocabulary(WORDS), max_length=16)
    metadata = {"defaults": {"steps": 4, "guidance": 5.0}, "vocabulary": WORDS}
    return LatentDiffusion(unet, vae, text, tokenizer, ScheduleConfig(**change), "tiny", metadata)


@pytest.fixture(scope="module")
def lab():
    return build()


def draw(lab, *args, **kwargs):
    return lab.generate(*args, progress=False, **kwargs)


# --- diffusers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_same_weights_and_seeds_give_the_latents_and_pictures_of_diffusers(kind, tmp_path):
    lab = build(prediction_type=kind)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        save_pipeline(lab, tmp_path / kind), safety_checker=None, feature_extractor=None, image_encoder=None
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = []

    def keep(pipe, i, t, values):
        theirs.append((int(t), values["latents"].clone()))
        return values

    generators = [torch.Generator("cpu").manual_seed(s) for s in (3, 4)]
    images = pipe(
        PROMPTS, negative_prompt=["blue", "cube"], num_inference_steps=6, guidance_scale=4.0, height=16, width=24,
        generator=generators, callback_on_step_end=keep,
    ).images  # fmt: skip
    arguments = dict(steps=6, guidance=4.0, seed=[3, 4], negative_prompt=["blue", "cube"], height=16, width=24)
    for step, (t, latents) in zip(lab.steps(PROMPTS, **arguments), theirs, strict=True):
        assert step.t == t
        assert (step.x - latents).norm() < 1e-4 * latents.norm()
    ours = draw(lab, PROMPTS, **arguments)
    for mine, yours in zip(ours.images, images, strict=True):
        assert mine.size == yours.size == (24, 16)
        assert (from_pil(mine) - from_pil(yours)).abs().max() < 1.5 / 255


THEIRS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_solver": ("DPMSolverMultistepScheduler", {}),
    "dpm_solver_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    def pipe(kind, spacing):
        lab = build(prediction_type=kind, timestep_spacing=spacing)
        folder = save_pipeline(lab, tmp_path_factory.mktemp("pipe") / kind)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None, image_encoder=None)
        pipe.set_progress_bar_config(disable=True)
        return lab, pipe, pipe.scheduler.config

    return {kind: pipe(kind, spacing) for kind, spacing in (("epsilon", "leading"), ("v_prediction", "trailing"))}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_the_latents_of_diffusers(sampler, kind, pipes):
    """Leading spacing and eps, trailing spacing and v; where Euler starts depends on the spacing."""
    lab, pipe, config = pipes[kind]
    cls, options = THEIRS[sampler]
    pipe.scheduler = getattr(diffusers, cls).from_config(config, **options)
    generators = [torch.Generator("cpu").manual_seed(s) for s in (3, 4)]
    latents = pipe(
        PROMPTS, num_inference_steps=6, guidance_scale=4.0, height=16, width=24, generator=generators, output_type="latent"
    ).images  # fmt: skip
    ours = draw(lab, PROMPTS, steps=6, guidance=4.0, seed=[3, 4], height=16, width=24, sampler=sampler)
    assert ours.recipe["sampler"] == sampler
    assert (ours.latents - latents).norm() < 2e-4 * latents.norm()


def test_saved_and_opened_again_it_is_the_same_model(lab, tmp_path):
    again = LatentDiffusion(**vars(load_pipeline(save_pipeline(lab, tmp_path / "m"))))
    assert (again.name, again.defaults, again.vocabulary) == (lab.name, lab.defaults, lab.vocabulary)
    assert torch.equal(draw(again, "a red ball", seed=1).latents, draw(lab, "a red ball", seed=1).latents)


# --- generate and steps -----------------------------------------------------------------------------------------------


def test_the_loop_and_the_call_are_the_same_thing(lab):
    steps = list(lab.steps("a red ball", seed=5))
    result = draw(lab, "a red ball", seed=5)
    assert [s.i for s in steps] == [0, 1, 2, 3] and torch.equal(steps[-1].x, result.latents)
    assert result.image.size == (16, 16) and result.latents.shape == (1, 4, 8, 8)
    assert result.image.tobytes() == to_pil(lab.decode(steps[-1].x))[0].tobytes()


def test_everything_asked_for_matters(lab):
    base = draw(lab, "a red ball", seed=1).latents
    for other in (
        draw(lab, "a blue ball", seed=1),
        draw(lab, "a red ball", seed=2),
        draw(lab, "a red ball", seed=1, guidance=1.0),
        draw(lab, "a red ball", seed=1, negative_prompt="blue"),
        draw(lab, "a red ball", seed=1, steps=5),
        draw(lab, "a red ball", seed=1, sampler="ddpm"),
    ):
        assert (other.latents - base).norm() > 1e-3 * base.norm()
    assert torch.equal(draw(lab, "a red ball", seed=1).latents, base)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_picture_does_not_depend_on_its_neighbours(lab, sampler):
    alone = draw(lab, PROMPTS[1], seed=9, guidance=3.0, sampler=sampler).latents[0]
    among = draw(lab, ["a cube", PROMPTS[1], "a ball"], seed=[1, 9, 2], guidance=[1.0, 3.0, 9.0], sampler=sampler)
    torch.testing.assert_close(among.latents[1], alone, rtol=1e-4, atol=1e-4)


def test_one_value_serves_all_pictures(lab):
    by_seed = draw(lab, "a red ball", seed=[1, 2, 3])
    assert len(by_seed.images) == 3 and by_seed.recipe["prompt"] == ["a red ball"] * 3
    same_noise = draw(lab, PROMPTS, seed=7)
    torch.testing.assert_close(same_noise.latents[0], draw(lab, PROMPTS[0], seed=7).latents[0], rtol=1e-4, atol=1e-4)


def test_the_recipe_is_plain_and_draws_the_picture_again(lab):
    import numpy as np

    first = draw(lab, PROMPTS, guidance=torch.tensor([2.0, 3.0]), seed=np.arange(2), sampler="ddpm", height=32)
    again = draw(lab, **json.loads(json.dumps(first.recipe)))
    assert torch.equal(first.latents, again.latents)
    assert first.recipe["seed"] == [0, 1] and first.recipe["steps"] == 4 and first.model == "tiny"


def test_a_generation_shows_itself_in_a_notebook(lab):
    png = draw(lab, "a red ball", seed=[1, 2])._repr_png_()
    assert png.startswith(b"\x89PNG")


def test_nothing_keeps_a_graph_for_gradients(lab):
    step = list(lab.steps("a red ball"))[-1]
    assert not step.x.requires_grad and not lab.decode(step.x).requires_grad
    assert all(p.requires_grad for p in lab.unet.parameters())  # and the networks can still be trained


def test_progress_is_shown_or_not(lab, capsys):
    draw(lab, "a red ball")
    assert capsys.readouterr() == ("", "")
    lab.generate("a red ball")
    assert "tiny" in capsys.readouterr().err


# --- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w, branches", [(5.0, ("uncond", "cond")), (1.0, ("cond",)), (0.0, ("uncond",))])
def test_layout_names_the_rows_of_the_network_call(lab, w, branches):
    seen = []

    def listener(x, name):
        seen.append((lab.layout, x.shape[0]))

    site = next(iter(taps(lab.unet)))  # one is enough
    with listen(lab.unet, {site: listener}):
        for step in lab.steps(PROMPTS, guidance=w, height=16, width=24, negative_prompt="blue"):
            assert lab.layout is None  # between calls there are no rows
    assert [layout.i for layout, _ in seen] == [0, 1, 2, 3]
    assert [layout.t for layout, _ in seen] == lab.schedule.timesteps(4).tolist()
    for layout, rows in seen:
        assert layout.branches == branches and layout.images == 2 and rows % (2 * len(branches)) == 0
        assert layout.size == (8, 12) and layout.steps == 4
        assert layout.prompts == tuple(PROMPTS) and layout.negative_prompts == ("blue", "blue")


def test_layout_counts_heuns_steps_and_not_its_calls(lab):
    seen = []
    site = next(iter(taps(lab.unet)))
    with listen(lab.unet, {site: lambda x, name: seen.append((lab.layout.i, lab.layout.t))}):
        for step in lab.steps("a red ball", steps=3, sampler="heun"):
            assert lab.layout is None
    first, second, third = lab.schedule.timesteps(3).tolist()
    assert seen == [(0, first), (0, second), (1, second), (1, third), (2, third)]


def test_layout_is_gone_after_an_error(lab):
    def stop(x, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listen(lab.unet, {"*": stop}):
        list(lab.steps("a red ball"))
    assert lab.layout is None


# --- images and latents -----------------------------------------------------------------------------------------------


def test_decode_and_encode_apply_the_scale_once_and_change_nothing_in_place(lab):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = z.clone()
    with torch.no_grad():
        expected = (lab.vae.decode(z / 0.31) / 2 + 0.5).clamp(0, 1)
    image = lab.decode(z)
    torch.testing.assert_close(image, expected)
    assert torch.equal(z, before) and image.shape == (2, 3, 16, 16) and image.min() >= 0 and image.max() <= 1
    with torch.no_grad():
        torch.testing.assert_close(lab.encode_image(image), lab.vae.encode(image * 2 - 1).mean * 0.31)


def test_decoding_in_parts_is_decoding(lab, monkeypatch):
    z = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = lab.decode(z)
    monkeypatch.setattr("labkit.diffusion.DECODED_AT_ONCE", 2 * 16 * 16)
    torch.testing.assert_close(lab.decode(z), whole, rtol=1e-5, atol=1e-5)


def test_pil_and_back(lab):
    image = Image.new("RGB", (16, 32), (255, 128, 0))
    x = from_pil([image, image])
    assert x.shape == (2, 3, 32, 16) and x[0, :, 5, 5].tolist() == pytest.approx([1, 128 / 255, 0])
    assert to_pil(x)[1].tobytes() == image.tobytes()
    assert lab.encode_image(image).shape == (1, 4, 16, 8)
    assert from_pil(Image.new("L", (4, 4), 7)).shape == (1, 3, 4, 4)


def test_the_steps_are_consistent_with_the_schedule(lab):
    """x0 and eps of a step put together at its own timestep give the latent that the network saw."""
    first, second = list(lab.steps("a red ball"))[:2]
    x_t = q_sample(second.x0, second.t, second.eps, lab.schedule)
    torch.testing.assert_close(x_t, first.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x0_from_eps(first.x, second.t, second.eps, lab.schedule), second.x0)


def test_half_precision_network_with_float32_latents():
    lab = build()
    full = draw(lab, "a red ball", guidance=2.0).latents
    for network in (lab.unet, lab.vae, lab.text_encoder):
        network.to(torch.bfloat16)
    half = draw(lab, "a red ball", guidance=2.0)
    assert half.latents.dtype is torch.float32 and lab.dtype is torch.bfloat16
    assert (half.latents - full).norm() < 0.1 * full.norm()


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(prompt=""), "empty"), (dict(prompt="  \n"), "empty"), (dict(prompt=[]), "prompt"),
        (dict(prompt=["a ball", " "]), "empty"), (dict(prompt=3), "text"), (dict(prompt=None), "text"),
        (dict(prompt="a red ball " * 6), "cut off"), (dict(prompt="a green ball"), "green"),
        (dict(negative_prompt="a bal"), "Did you mean 'ball'"), (dict(negative_prompt=None), "text"),
        (dict(steps=0), "steps"), (dict(steps=-1), "steps"), (dict(steps=5000), "steps"), (dict(steps=2.5), "steps"),
        (dict(guidance=float("nan")), "Guidance"), (dict(guidance="much"), "Guidance"), (dict(guidance=[]), "guidance"),
        (dict(guidance=[1.0, float("inf")]), "Guidance"), (dict(guidance=["a"]), "Guidance"),
        (dict(height=15), "multiple of 4"), (dict(width=0), "width"), (dict(width=-8), "width"), (dict(height="16"), "height"),
        (dict(seed="a"), "seed"), (dict(seed=-1), "seed"), (dict(seed=1.5), "seed"), (dict(seed=None), "seed"),
        (dict(seed=[1, 2, 3], prompt=PROMPTS), "one for each"), (dict(sampler="magic"), "ddim, ddpm"),
        (dict(rescale=1.5), "rescale is 1.5"), (dict(rescale="0.7"), "rescale"), (dict(rescale=True), "rescale is True"),
        (dict(interval=(800, 200)), "lower timestep first"), (dict(interval=5), "two timesteps"), (dict(interval=(1, 2, 3)), "two timesteps"),
        (dict(interval=(0, None)), "two timesteps"), (dict(interval=(0, float("nan"))), "lower timestep first"), (dict(interval="ab"), "two timesteps"),
        (dict(stepz=5), "no argument 'stepz'; there are prompt, steps"),
    ],
)  # fmt: skip
def test_bad_input_is_told_at_once_in_one_line(lab, change, says):
    for call in (lab.steps, lambda **arguments: draw(lab, **arguments)):
        with pytest.raises(LabkitError, match=says) as error:
            call(**{"prompt": "a red ball", **change})  # `steps` says it before it is iterated
        assert "\n" not in str(error.value)


def test_an_open_vocabulary_takes_any_word():
    lab = build()
    lab.vocabulary = frozenset()
    assert draw(lab, "x y z").image


def test_a_picture_that_is_not_finite_is_an_error_not_a_black_image(lab):
    with pytest.raises(LabkitError, match="float32"):
        lab.decode(torch.full((1, 4, 8, 8), float("nan")))


def test_images_that_do_not_fit(lab):
    for bad in (Image.new("RGB", (15, 16)), torch.zeros(3, 16, 16), [], "picture.png", [Image.new("RGB", (4, 4)), None],
                [Image.new("RGB", (4, 4)), Image.new("RGB", (8, 8))]):
        with pytest.raises(LabkitError) as error:
            lab.encode_image(bad)
        assert "\n" not in str(error.value)
