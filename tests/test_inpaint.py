"""inpaint: the same pictures as diffusers' inpainting pipelines, with nine channels and with four; what is kept is kept."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from families import beside_diffusers
from PIL import Image

import labkit
from labkit.diffusion import Course
from labkit.generation import from_pil, to_pil
from labkit.editing import inpaint as room
from labkit.errors import LabkitError
from labkit.schedule import Schedule, q_sample

PIPELINES = {"inpaint": "", "sdxl-inpaint": "XL", "sd15": "", "sd21": "", "sdxl": "XL"}
PROMPTS, H, W = ["a red ball", "a blue cube left of a ball"], 32, 16
PICTURES = to_pil(torch.rand(2, 3, H, W, generator=torch.Generator().manual_seed(5)))
MASK = Image.new("L", (W, H), 0)
MASK.paste(255, (3, 9, 12, 26))  # no multiple of the latents' two pixels
MASK.putpixel((0, 0), 127)  # nearly half white is black


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return beside_diffusers(PIPELINES, "Inpaint", tmp_path_factory.mktemp("inpaint"))


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def ours(lab, **asked):
    call = dict(prompt=PROMPTS, image=PICTURES, mask=MASK, steps=4, guidance=7.5, seed=[0, 7], negative_prompt=["blue", "ball"], progress=False)
    return labkit.inpaint(lab, **{**call, **asked})


def theirs(pipe, kind="latent"):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 7)]
    call = dict(num_inference_steps=4, guidance_scale=7.5, height=H, width=W, negative_prompt=["blue", "ball"], strength=1.0)
    return pipe(PROMPTS, image=PICTURES, mask_image=MASK, generator=generators, output_type=kind, **call).images


@pytest.mark.parametrize("family", PIPELINES)
def test_the_same_picture_as_diffusers(family, pairs):
    lab, pipe = pairs[family]
    drawn = ours(lab)
    assert apart(drawn.latents, theirs(pipe)) < 1e-5
    assert (lab.decode(drawn.latents) - theirs(pipe, "pt")).abs().max() < 1 / 255
    assert [image.size for image in drawn.images] == [(W, H)] * 2


SAMPLERS = {
    "ddpm": ("DDPMScheduler", {}), "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}), "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm_solver": ("DPMSolverMultistepScheduler", {}), "dpm_solver_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", ["inpaint", "sd21"])
def test_with_every_sampler(family, sampler, pairs, monkeypatch):
    """Those that remember earlier steps remember what the network said of the blended latents; noisy ones draw on where diffusers does."""
    lab, pipe = pairs[family]
    kind, options = SAMPLERS[sampler]
    options = {"timestep_spacing": "leading", **options}  # which diffusers' schedulers do not all take for the default
    if options["timestep_spacing"] != "leading":
        monkeypatch.setattr(lab, "schedule", Schedule(replace(lab.schedule_config, **options)))
    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, kind).from_config(pipe.scheduler.config, **options))
    assert apart(ours(lab, sampler=sampler).latents, theirs(pipe)) < 2e-4


KEEP = room.keep


def blended_at(lab, pixels, m, noise, level):
    """`keep` with the known part at another level, to see that it matters."""
    course = KEEP(lab, pixels, m, noise)
    z0, m = lab.encode_image(pixels), room.at_latents(lab, m)
    return Course(course.z, after=lambda step: m * step.x + (1 - m) * level(step, z0, course.z))


TWINS = {
    "the level of the step that is over": lambda lab: lambda step, z0, z: q_sample(z0, step.t, z, lab.schedule),
    "no noise": lambda lab: lambda step, z0, z: z0,
    "noise in the end": lambda lab: lambda step, z0, z: q_sample(z0, step.next_t or 1, z, lab.schedule),
    "other noise": lambda lab: lambda step, z0, z: z0 if step.next_t is None else q_sample(z0, step.next_t, -z, lab.schedule),
}


@pytest.mark.parametrize("twin", TWINS)
def test_wrong_twins_of_the_blend(twin, pairs, monkeypatch):
    lab, pipe = pairs["sd15"]
    monkeypatch.setattr(room, "keep", lambda lab, pixels, m, noise: blended_at(lab, pixels, m, noise, TWINS[twin](lab)))
    assert apart(ours(lab).latents, theirs(pipe)) > 1e-2


def test_the_mask_is_taken_as_diffusers_takes_it(pairs, monkeypatch):
    lab, pipe = pairs["inpaint"]
    expected = theirs(pipe)
    assert apart(ours(lab, mask=(from_pil(MASK)[0, :1] >= 0.5)).latents, expected) < 1e-5
    assert apart(ours(lab, mask=from_pil(MASK)[0, 0].double()).latents, expected) < 1e-5
    assert apart(ours(lab, mask=255 - from_pil(MASK)[0, 0]).latents, expected) > 1e-3
    with monkeypatch.context() as m:  # black in the hole in place of grey
        m.setattr(room, "hole", lambda *_: from_pil(MASK)[:, :1].round())
        encode = lab.encode_image
        m.setattr(lab, "encode_image", lambda pixels, noise: encode(pixels - 0.5 * from_pil(MASK)[:, :1].round(), noise))
        assert apart(ours(lab).latents, expected) > 1e-3


def test_what_is_kept_is_the_latents_of_the_picture(pairs):
    """Four channels: in every step's latents at the level of the next one, in the end exactly."""
    lab, m = pairs["sd15"][0], room.at_latents(pairs["sd15"][0], room.hole(MASK, H, W))
    with labkit.record(lab, latents=True) as trace:
        drawn = ours(lab)
    noise = labkit.device.Noise([0, 7], (4, H // 2, W // 2))
    z0 = lab.encode_image(PICTURES, noise.draw())
    assert torch.equal((1 - m) * drawn.latents, (1 - m) * z0)
    first = trace.steps[0]
    assert first.next_t == trace.steps[1].t and trace.steps[-1].next_t is None
    torch.testing.assert_close((1 - m) * first.x, (1 - m) * q_sample(z0, first.next_t, noise.draw(), lab.schedule))
    assert trace.heatmap("ball").map.shape == (H // 2, W // 2)


def test_the_recipe_draws_it_again_and_pictures_do_not_mix(pairs):
    for family in ("inpaint", "sd15"):
        lab = pairs[family][0]
        many = ours(lab, rescale=0.5, interval=(100, 900))
        again = labkit.inpaint(lab, image=PICTURES, mask=MASK, progress=False, **json.loads(json.dumps(many.recipe)))
        assert torch.equal(again.latents, many.latents)
        one = ours(lab, prompt=PROMPTS[1], image=PICTURES[1], seed=7, negative_prompt="ball", rescale=0.5, interval=(100, 900))
        assert apart(one.latents, many.latents[1:]) < 1e-5


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(image="x.png"), "There is no picture"), (dict(image=torch.zeros(3, H, W)), r"tensor \(3, 32, 16\)"),
        (dict(image=torch.full((1, 3, H, W), 200, dtype=torch.uint8)), r"of torch.uint8.*in \[0, 1\]"),
        (dict(image=[PICTURES[0]] * 3), "3 images for 2 pictures"), (dict(image=Image.new("RGB", (15, 16))), "width is 15"),
        (dict(height=64), "32 rows and 16 columns, 64 and 16 are asked for"), (dict(mask=Image.new("L", (H, W))), r"mask is \(16, 32\)"),
        (dict(mask=torch.ones(5, 5)), r"mask is \(5, 5\)"), (dict(mask="white"), "mask is a str"), (dict(mask=Image.new("L", (W, H))), "Nothing is to be drawn"),
        (dict(mask=torch.eye(H)[:, :W] * 0.4), "Nothing is to be drawn"), (dict(prompt=""), "empty"), (dict(sampler="magic"), "ddim, ddpm"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_one_line(pairs, change, says):
    for family in ("inpaint", "sd15"):
        with pytest.raises(LabkitError, match=says) as error:
            ours(pairs[family][0], **change)
        assert "\n" not in str(error.value)


def test_a_latent_sent_back_is_where_the_sampler_goes_on(pairs):
    from labkit.samplers import SAMPLERS as ALL

    schedule, x, noise = pairs["sd15"][0].schedule, torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), []
    for name, sampler in ALL.items():
        seen = []
        run = sampler(lambda x, t: seen.append(x) or x * 0.1, x, schedule, 3, noise=lambda: torch.zeros(1, 4, 4, 4))
        step = next(run)
        assert step.next_t is not None
        calls = len(seen)
        run.send(torch.full_like(x, 0.25))
        assert torch.equal(seen[calls], torch.full_like(x, 0.25)), name
        with pytest.raises(LabkitError, match="sent back"):
            run.send(torch.zeros(2, 4, 4, 4))
        assert [s.next_t for s in sampler(lambda x, t: x * 0.1, x, schedule, 3, noise=lambda: torch.zeros(1, 4, 4, 4))][-1] is None
