"""Inversion: the path is diffusers' own, and each of the four ways down is the published one; rendered pictures come back."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from families import write

import labkit
import tiny
from labkit.checkpoint import load_pipeline
from labkit.device import Noise
from labkit.diffusion import Course, LatentDiffusion
from labkit.editing import inversion as room
from labkit.editing.inversion import invert
from labkit.editing.prompt_to_prompt import edit
from labkit.errors import LabkitError
from labkit.generation import from_pil, to_pil
from labkit.recipe import complete
from labkit.samplers import ddim
from labkit.samplers.ddim import visits
from labkit.scenes.captions import describe
from labkit.scenes.render import render
from labkit.scenes.scene import scene_from_seed

PROMPT, OTHER, T, w = "a red ball", "a blue cube", 5, 6.0
FAMILIES = ("sd15", "sd21", "sdxl")
PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """In float64: what is compared went through a network in batches of different sizes, whose kernels round differently."""
    folders = {family: write(family, tmp_path_factory.mktemp("inv") / "m") for family in FAMILIES}
    return {family: LatentDiffusion(**vars(load_pipeline(folder, torch.device("cpu"), torch.float64))) for family, folder in folders.items()}


def ours(lab, kind="direct", images=PICTURES, **asked):
    return invert(lab, images, PROMPT, kind, **{"steps": T, "guidance": w, **asked})


def redrawn(lab, inversion, target=None, **how):
    """(1 + K, S, 4, h, w): the source, and targets without any editing."""
    return edit(lab, inversion, target, cross=0.0, self_attention=0.0, progress=False, **how).latents


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def network(lab, x, t, states, uncond=False):
    """The U-Net itself, on one condition."""
    c, u = lab.conditions(lab_recipe(lab, len(x)))
    said = u if uncond else c
    said = replace(said, states=states) if hasattr(said, "pooled") and states is not None else (said if states is None else states)
    out = lab.unet(x, t, said)
    a = lab.schedule.alpha_bar_at(t)
    return out if lab.schedule_config.prediction_type == "epsilon" else a**0.5 * out + (1 - a) ** 0.5 * x


def lab_recipe(lab, B):
    return complete(lab, PROMPT, seed=[0] * B, height=16, width=16)


def moved(x, e, a, b):
    """DDIM's step from level a to level b, written once more."""
    return b**0.5 * (x - (1 - a) ** 0.5 * e) / a**0.5 + (1 - b) ** 0.5 * e


@pytest.mark.parametrize("family", FAMILIES)
def test_the_path_is_the_published_one(family, labs):
    """next: the formula of prev with (t - s -> t), the network told the later timestep; the conditional branch alone; T + 1 latents."""
    lab = labs[family]
    found = ours(lab)
    assert found.path.shape == (T + 1, 2, 4, 8, 8) and torch.equal(found.z, found.path[-1])
    z = lab.encode_image(PICTURES)
    assert torch.equal(found.path[0], z)
    with torch.no_grad():
        for k, (t, s) in enumerate(visits(lab.schedule, T)[::-1], start=1):
            e = network(lab, z, t, None)
            z = moved(z, e, lab.schedule.alpha_bar_at(s), lab.schedule.alpha_bar_at(t))
            assert apart(found.path[k], z) < 1e-5
    own = ours(lab, told="own")
    assert apart(own.z, found.z) > 1e-3  # the wrong twin: told the timestep of the latent itself


def test_as_diffusers_inverts(labs):
    import diffusers

    lab = labs["sd15"]
    theirs = diffusers.DDIMInverseScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
    )
    theirs.set_timesteps(T)
    z = lab.encode_image(PICTURES)
    with torch.no_grad():
        for t in theirs.timesteps:
            z = theirs.step(network(lab, z, int(t), None), t, z).prev_sample
    assert apart(ours(lab).z, z) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_direct_keeps_the_source_on_its_path_and_leaves_the_target_alone(family, labs):
    lab = labs[family]
    found = ours(lab)
    latents = redrawn(lab, found, OTHER)
    assert torch.equal(latents[0], found.path[0])
    # as published: the source's run, its distance from the path recorded at each step, and added again to the source alone
    run = {"steps": T, "guidance": w, "height": 16, "width": 16}
    z, offsets = found.z, []
    denoise = room.denoiser(lab, found.recipe)
    with torch.no_grad():
        for i, (t, s) in enumerate(visits(lab.schedule, T)):
            z = moved(z, denoise(z, t), lab.schedule.alpha_bar_at(t), lab.schedule.alpha_bar_at(s))
            offsets.append(found.path[T - 1 - i] - z)
            z = z + offsets[-1]
    assert max(float(d.norm() / found.path[0].norm()) for d in offsets) > 1e-3 and apart(z, found.path[0]) < 1e-6
    drawn = list(lab.steps(OTHER, seed=[0, 0], course=lambda noise: Course(found.z), **run))[-1].x
    assert apart(latents[1], drawn) < 1e-10
    plain = redrawn(lab, ours(lab, "ddim"), OTHER)
    assert apart(plain[0], found.path[0]) > 1e-3 and apart(plain[1], latents[1]) < 1e-6


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_noise_is_the_forward_process_with_one_noise(family, labs, monkeypatch):
    lab = labs[family]
    with monkeypatch.context() as m:
        m.setattr(lab.unet, "forward", lambda *_: 1 / 0)  # no network call
        found = ours(lab, "noise", seed=[3, 4])
    z0, z = lab.encode_image(PICTURES), Noise([3, 4], (4, 8, 8)).draw()
    assert torch.equal(found.path[0], z0) and torch.equal(found.z, z)
    for k, t in enumerate(lab.schedule.timesteps(T).tolist()[::-1][:-1], start=1):
        a = lab.schedule.alpha_bar_at(t)
        torch.testing.assert_close(found.path[k], a**0.5 * z0 + (1 - a) ** 0.5 * z)
    latents = redrawn(lab, found, OTHER)
    assert torch.equal(latents[0], z0)
    plain = lab.generate(OTHER, seed=[3, 4], steps=T, guidance=w, height=16, width=16, sampler="ddim", progress=False)
    assert apart(latents[1], plain.latents) < 1e-5  # without editing nothing of the picture comes over
    edited = edit(lab, found, OTHER, cross=1.0, self_attention=1.0, progress=False).latents
    assert apart(edited[1], latents[1]) > 1e-3


def test_negative_prompt_goes_down_as_it_came_up(labs):
    lab = labs["sd15"]
    found = ours(lab, "negative_prompt")
    assert found.recipe.negative_prompt == [PROMPT] * 2
    guided, plain = redrawn(lab, found)[0], redrawn(lab, ours(lab, "ddim", guidance=1.0))[0]
    assert apart(guided, plain) < 1e-4  # eps_u = eps_c: guidance does nothing to the source
    assert apart(redrawn(lab, ours(lab, "ddim"))[0], plain) > 1e-2


def published_null_text(lab, path, rate=lambda i: 1e-2 * (1 - i / 100), updates=10, close=lambda i: 1e-5 + i * 2e-5, fresh=False):
    """Null-text optimisation of one picture, written once more: (T, L, D)."""
    empty = lab.conditions(lab_recipe(lab, 1))[1]
    u = (empty.states if hasattr(empty, "states") else empty).clone()
    first, z, found = u.clone(), path[-1], []
    for i, (t, s) in enumerate(visits(lab.schedule, T)):
        u = (first if fresh else u).clone().detach().requires_grad_(True)
        optimizer = torch.optim.Adam([u], lr=rate(i))
        a, b = lab.schedule.alpha_bar_at(t), lab.schedule.alpha_bar_at(s)
        with torch.no_grad():
            e_c = network(lab, z, t, None)
        for _ in range(updates):
            e_u = network(lab, z, t, u, uncond=True)
            loss = F.mse_loss(moved(z, e_u + w * (e_c - e_u), a, b), path[T - 1 - i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss.item() < close(i):
                break
        with torch.no_grad():
            e_u = network(lab, z, t, u, uncond=True)
            z = moved(z, e_u + w * (e_c - e_u), a, b)
        found.append(u.detach()[0])
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_null_text_is_the_published_optimisation_and_batches_do_not_matter(family, labs):
    lab = labs[family]
    found = ours(lab, "null_text")
    for b in (0, 1):
        expected = published_null_text(lab, found.path[:, b : b + 1])
        assert apart(found.uncond[:, b], expected) < 1e-3
        one = ours(lab, "null_text", PICTURES[b : b + 1])
        assert apart(one.uncond[:, 0], found.uncond[:, b]) < 1e-3
    both, alone = redrawn(lab, found), redrawn(lab, one)
    assert apart(both[0, 1:], alone[0]) < 1e-3  # one picture's states bring it back in a batch too
    nearer, plain = apart(both[0], found.path[0]), apart(redrawn(lab, ours(lab, "ddim"))[0], found.path[0])
    assert nearer < 0.9 * plain


def test_wrong_twins_of_null_text(labs):
    lab = labs["sd15"]
    found = ours(lab, "null_text", PICTURES[:1])
    twins = {
        "a constant rate": dict(rate=lambda i: 1e-2), "each step from the empty text": dict(fresh=True), "one update": dict(updates=1), "close at once": dict(close=lambda i: 1.0),
    }  # fmt: skip
    for name, twin in twins.items():
        assert apart(published_null_text(lab, found.path, **twin), found.uncond[:, 0]) > 1e-3, name


def test_an_early_stop_still_takes_the_step(labs, monkeypatch):
    lab = labs["sd15"]
    monkeypatch.setattr(room, "CLOSE", 1e9)
    found = ours(lab, "null_text", PICTURES[:1])
    assert apart(found.uncond[:, 0], published_null_text(lab, found.path, updates=1)) < 1e-5


def test_a_render_comes_back_and_can_be_edited():
    lab = labkit.load("tabletop")
    scene = scene_from_seed(10_000_001, counts=(1,))
    image, prompt = render(scene).image, describe(scene).text
    kept = lab.encode_image(image)
    errors = {}
    for kind in ("ddim", "negative_prompt", "direct"):
        found = invert(lab, image, prompt, kind, steps=10, guidance=4.0)
        errors[kind] = apart(redrawn(lab, found)[0], kept)
    assert errors["direct"] == 0 and errors["negative_prompt"] < 0.6 * errors["ddim"] and errors["ddim"] < 0.6
    exact = invert(lab, image, prompt, "negative_prompt", steps=10, guidance=4.0, refine=3)
    assert apart(redrawn(lab, exact)[0], kept) < errors["negative_prompt"]
    target = prompt.replace("green", "blue")
    assert target != prompt
    drawn = edit(lab, found, target, progress=False)
    assert apart(drawn.latents[1], drawn.latents[0]) > 0.02 and drawn.source.size == (128, 128)


def test_pictures_and_tensors_alike_and_batches_do_not_mix(labs):
    lab = labs["sd15"]
    pil = to_pil(PICTURES)
    assert torch.equal(ours(lab, images=pil).path, ours(lab, images=from_pil(pil)).path)
    assert apart(ours(lab, images=PICTURES[1:]).path[:, 0], ours(lab).path[:, 1]) < 1e-5
    assert list(ddim(lambda x, t: x, ours(lab).z, lab.schedule, T))[-1].i == T - 1


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(kind="exact"), "'exact': use one of direct"), (dict(images="x.png"), "There is no picture"), (dict(sampler="euler"), "inverted by DDIM"), (dict(height=32), "at its own size"),
        (dict(told="now"), "'later'"), (dict(seed=[1, 2, 3]), "3 pictures are asked for and 2 given"), (dict(steps=0), "steps is 0"), (dict(kind="null_text", rescale=0.5), "guidance alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_inverted_is_told_in_one_line(change, says, labs):
    with pytest.raises(LabkitError, match=says) as error:
        ours(labs["sd15"], **change)
    assert "\n" not in str(error.value)


def test_what_an_inversion_cannot_be_asked(labs):
    lab = labs["sd15"]
    with pytest.raises(LabkitError, match="steps: an inversion was made for its own"):
        edit(lab, ours(lab), OTHER, steps=7)
    null = replace(ours(lab), uncond=torch.zeros(T, 2, 77, 24), kind="null_text")
    with pytest.raises(LabkitError, match="guidance: an inversion"):
        edit(lab, null, OTHER, guidance=3.0)
    assert edit(lab, ours(lab), OTHER, guidance=3.0, progress=False).recipe["guidance"] == 3.0
    with pytest.raises(LabkitError, match="float32"):
        room.null_text(SimpleNamespace(dtype=torch.float16), ours(lab))
    with pytest.raises(LabkitError, match="no gradients"):
        ours(labkit.optimize(tiny.build()), "null_text")
