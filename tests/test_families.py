"""Every Stable Diffusion: opened from folders that diffusers wrote, equal to diffusers network by network and picture by picture, and saved back."""

import json
import shutil

import pytest
import torch
from families import FULL, narrow, write
from safetensors.torch import load_file, save_file

import labkit
from labkit.checkpoint import load_pipeline, save_pipeline
from labkit.diffusion import LatentDiffusion
from labkit.errors import CheckpointError, LabkitError
from labkit.models import condition, config, formats, sources
from labkit.models.clip import CLIPText
from labkit.models.condition import Condition
from labkit.models.unet import UNet
from labkit.recipe import complete

from labkit.tap import taps

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS, NEGATIVE = ["a red ball", "a blue cube left of a ball"], ["blue", "a red cube"]
DRAWN = ("sd15", "sd21", "sdxl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: write(family, tmp_path_factory.mktemp("families") / family) for family in FULL}


@pytest.fixture(scope="module")
def labs(folders):
    return {family: LatentDiffusion(**vars(load_pipeline(folder))) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def pipes(folders):
    return {family: opened(family, folder) for family, folder in folders.items()}


def opened(family, folder):
    """The same folder opened by diffusers, sampling with DDIM as labkit does."""
    pipe = getattr(diffusers, FULL[family][0]).from_pretrained(folder)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def relative(a, b):
    assert a.shape == b.shape and b.std() > 1e-3
    return ((a - b).abs().max() / b.abs().max()).item()


# --- architectures ------------------------------------------------------------------------------------------------------------

PRESETS = {
    "sd15": (config.SD15_UNET, config.SD15_VAE, 859_520_964),
    "sd21": (config.SD21_UNET, config.SD21_VAE, 865_910_724),
    "sdxl": (config.SDXL_UNET, config.SDXL_VAE, 2_567_463_684),
    "refiner": (config.SDXL_REFINER_UNET, config.SDXL_VAE, None),
    "inpaint": (config.replace(config.SD15_UNET, in_channels=9), config.SD15_VAE, 859_535_364),
}
TEXTS = {
    ("sd21", "text_encoder"): (config.SD21_TEXT, 340_387_840),
    ("sdxl", "text_encoder"): (config.SDXL_TEXT, 123_060_480),
    ("sdxl", "text_encoder_2"): (config.SDXL_TEXT_2, 694_659_840),
}


def shapes(network):
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


@pytest.mark.parametrize("family", PRESETS)
def test_published_configs_are_the_presets_with_every_parameter(family):
    unet, vae, count = PRESETS[family]
    raw = FULL[family][1]
    assert formats.unet_config(raw["unet"]) == unet and formats.vae_config(raw["vae"]) == vae
    with torch.device("meta"):
        ours, theirs = shapes(UNet(unet)), shapes(diffusers.UNet2DConditionModel.from_config(raw["unet"]))
    assert ours == theirs
    total = sum(torch.Size(shape).numel() for shape in ours.values())
    assert count is None or total == count
    assert formats.unet_config(formats.unet_to_diffusers(unet)) == unet and formats.vae_config(formats.vae_to_diffusers(vae)) == vae


@pytest.mark.parametrize("family, part", TEXTS)
def test_published_text_encoders_are_the_presets_with_every_parameter(family, part):
    (preset, count), raw = TEXTS[family, part], FULL[family][1][part]
    assert formats.text_config(raw, raw["architectures"][0]) == preset
    with torch.device("meta"):
        ours = shapes(CLIPText(preset))
        theirs = shapes(getattr(transformers, raw["architectures"][0])(transformers.CLIPTextConfig(**raw)))
    assert ours == {name.removeprefix("text_model."): shape for name, shape in theirs.items()}
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == count


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel"])
def test_every_field_of_todays_libraries_is_known(kind):
    if kind == "CLIPTextModel":
        formats.text_config(transformers.CLIPTextConfig().to_dict())
    else:
        saved = json.loads(getattr(diffusers, kind)(**({"block_out_channels": (32,) * 4} if kind[0] == "U" else {})).to_json_string())
        {"U": formats.unet_config, "A": formats.vae_config}[kind[0]](saved)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers
@pytest.mark.parametrize("kind", sorted(formats.SCHEDULERS))
def test_every_kin_of_ddim_gives_its_noise_schedule(kind):
    if not hasattr(diffusers, kind):
        pytest.skip(f"this diffusers has no {kind}")
    try:
        theirs = getattr(diffusers, kind)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    except ImportError as error:
        pytest.skip(str(error))
    ours = formats.schedule_config(json.loads(theirs.to_json_string()))
    assert (ours.beta_start, ours.beta_end, ours.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    expected = getattr(theirs, "alphas_cumprod", None)
    assert expected is not None and torch.allclose(labkit.schedule.Schedule(ours).alpha_bar.float(), expected.float(), rtol=1e-4)


# --- network by network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FULL)
def test_opened_with_every_weight_under_its_name(family, labs, folders):
    lab, (kind, parts, said) = labs[family], narrow(family)
    assert lab.unet.config == formats.unet_config(parts["unet"]) and lab.force_zeros == said.get("force_zeros_for_empty_prompt", False)
    stored = load_file(folders[family] / "unet" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == lab.unet.state_dict().keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in lab.unet.state_dict().items())
    assert len(lab.texts) == 1 + (parts.keys() > {"text_encoder", "text_encoder_2"})
    cross = {"sd15": 3 + 1 + 3 * 2, "sdxl": 2 + 3 + 3 + 3 * 2 + 2 * 2}  # down, middle, up
    assert len(taps(lab.unet, "*.attn2.probs")) == cross.get(family, len([n for n in stored if n.endswith("attn2.to_q.weight")]))


@pytest.mark.parametrize("family", FULL)
@torch.no_grad()
def test_unets_equal_diffusers(family, labs, pipes):
    ours, theirs = labs[family].unet, pipes[family].unet
    g, n = torch.Generator().manual_seed(0), theirs.config.cross_attention_dim
    x, states, t = torch.randn(2, ours.config.in_channels, 8, 16, generator=g), torch.randn(2, 7, n, generator=g), torch.tensor([5, 940])
    if not ours.config.addition_time_embed_dim:
        assert relative(ours(x, t, states), theirs(x, t, states).sample) < 1e-5
        return
    sizes = torch.tensor([[512.0, 768, 0, 3, 1024, 1023], [64, 64, 8, 0, 64, 128]])[:, : 5 if family == "refiner" else 6]
    pooled = torch.randn(2, 20, generator=g)
    expected = theirs(x, t, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    assert relative(ours(x, t, Condition(states, pooled, sizes)), expected) < 1e-5
    for wrong in (Condition(states, pooled, sizes.flip(1)), Condition(states, pooled.flip(1), sizes)):
        assert relative(ours(x, t, wrong), expected) > 1e-3, "sizes and pooled text are heard, each in its place"


@pytest.mark.parametrize("family", ("sd15", "sd21", "sdxl", "refiner"))
@torch.no_grad()
def test_text_conditions_equal_diffusers(family, labs, pipes):
    lab, pipe = labs[family], pipes[family]
    c = lab.encode_text(["a red ball!", "a blue cube"])
    expected = pipe.encode_prompt(["a red ball!", "a blue cube"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    if family in ("sd15", "sd21"):
        assert isinstance(c, torch.Tensor) and relative(c, expected[0]) < 1e-5
        return
    assert relative(c.states, expected[0]) < 1e-5 and relative(c.pooled, expected[2]) < 1e-5
    side = lab.unet.config.sample_size * lab.vae.config.factor
    assert c.sizes.tolist() == [[side, side, 0, 0, 6.0] if family == "refiner" else [side, side, 0, 0, side, side]] * 2


def last_not_penultimate(self, ids):
    h = CLIP_HIDDEN(self, ids)
    return [*h[:-1], h[-1], h[-1]]


def with_the_final_norm(self, ids):
    h = CLIP_HIDDEN(self, ids)
    return [*h[:-2], self.final_layer_norm(h[-2]), h[-1]]


def pooled_at_the_last_place(self, h, ids, eos):
    return self.text_projection(self.final_layer_norm(h[:, -1]))


def pooled_without_norm(self, h, ids, eos):
    return self.text_projection(h[torch.arange(len(h)), (ids == eos).int().argmax(1)])


CLIP_HIDDEN = CLIPText.hidden
TWINS = {
    "the last states": ("states", "hidden", last_not_penultimate),
    "states after the final norm": ("states", "hidden", with_the_final_norm),
    "pooled where the padding is": ("pooled", "pooled", pooled_at_the_last_place),
    "pooled before the final norm": ("pooled", "pooled", pooled_without_norm),
}


@pytest.mark.parametrize("twin", TWINS)
@torch.no_grad()
def test_wrong_twins_of_the_text_condition(twin, labs, pipes, monkeypatch):
    field, method, wrong = TWINS[twin]
    expected = pipes["sdxl"].encode_prompt("a red ball", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    expected = expected[0] if field == "states" else expected[2]
    assert relative(getattr(labs["sdxl"].encode_text("a red ball"), field), expected) < 1e-5
    monkeypatch.setattr(CLIPText, method, wrong)
    assert relative(getattr(labs["sdxl"].encode_text("a red ball"), field), expected) > 1e-2


def test_an_encoder_without_projection_says_so(labs):
    with pytest.raises(LabkitError, match="no projection"):
        labs["sd15"].text_encoder.pooled(torch.zeros(1, 77, 24), torch.zeros(1, 77, dtype=torch.long), 0)


# --- picture by picture -------------------------------------------------------------------------------------------------------


def both(family, labs, pipes, steps=4, **ours):
    """The pictures and latents of labkit and diffusers, from the same seeds."""
    theirs = {key: value for key, value in ours.items() if key not in ("sizes",)}
    if sizes := ours.get("sizes"):
        theirs |= {"original_size": tuple(sizes[:2]), "crops_coords_top_left": tuple(sizes[2:4]), "target_size": tuple(sizes[4:])}
    drawn = labs[family].generate(PROMPTS, steps=steps, guidance=7.5, seed=[0, 7], height=32, width=16, progress=False, **ours)
    expected = {}
    for kind in ("latent", "pt"):
        streams = [torch.Generator().manual_seed(seed) for seed in (0, 7)]
        call = dict(num_inference_steps=steps, guidance_scale=7.5, height=32, width=16, output_type=kind, generator=streams)
        expected[kind] = pipes[family](PROMPTS, **call, **theirs).images
    return drawn.latents, expected["latent"], labs[family].decode(drawn.latents), expected["pt"]


CASES = {
    **{family: (family, {}) for family in DRAWN},
    **{f"{family}, negative prompt": (family, {"negative_prompt": NEGATIVE}) for family in DRAWN},
    "sdxl, other sizes": ("sdxl", {"sizes": (512, 768, 16, 8, 32, 16)}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_picture_as_diffusers(case, labs, pipes):
    family, options = CASES[case]
    latents, expected, pictures, theirs = both(family, labs, pipes, **options)
    assert relative(latents, expected) < 1e-4
    assert (pictures - theirs).abs().max() < 1 / 255 and 0.02 < ((theirs > 0) & (theirs < 1)).float().mean(), "and not all black and white"


def test_twenty_steps_of_v_prediction(labs, pipes):
    latents, expected, pictures, theirs = both("sd21", labs, pipes, steps=20)
    assert labs["sd21"].schedule_config.prediction_type == "v_prediction"
    assert relative(latents, expected) < 1e-3 and (pictures - theirs).abs().max() <= 1 / 255


ZERO_SNR = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpm_solver": "DPMSolverMultistepScheduler"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers
@pytest.mark.parametrize("sampler", ZERO_SNR)
def test_zero_terminal_snr_through_a_whole_pipeline(sampler, tmp_path):
    """As its paper has it: v, betas that end in noise alone, trailing timesteps, rescaled guidance; saved and drawn by diffusers."""
    folder, near = write("sd21", tmp_path / "m"), 2e-3  # alpha_bar ends at 2^-24 here, in diffusers' DDIM at 0
    pipe = opened("sd21", folder)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipe.save_pretrained(tmp_path / "zero")
    lab = LatentDiffusion(**vars(load_pipeline(tmp_path / "zero")))
    assert lab.schedule_config.rescale_betas_zero_snr and lab.schedule.alpha_bar[-1] < 1e-7 and lab.schedule.timesteps(5)[0] == 999
    pipe.scheduler = getattr(diffusers, ZERO_SNR[sampler]).from_config(pipe.scheduler.config)
    draw = dict(height=32, width=16, guidance=7.5, rescale=0.7, steps=5, sampler=sampler, progress=False)
    call = dict(height=32, width=16, guidance_scale=7.5, guidance_rescale=0.7, num_inference_steps=5)

    def theirs(kind):
        return pipe(PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in (0, 7)], output_type=kind, **call).images

    ours = lab.generate(PROMPTS, seed=[0, 7], **draw)
    assert relative(ours.latents, theirs("latent")) < near
    assert (lab.decode(ours.latents) - theirs("pt")).abs().max() <= 1 / 255
    for change in ({"rescale_betas_zero_snr": False}, {"timestep_spacing": "leading"}):
        other = LatentDiffusion(**{**vars(load_pipeline(folder)), "schedule_config": config.replace(lab.schedule_config, **change)})
        assert relative(other.generate(PROMPTS, seed=[0, 7], **draw).latents, theirs("latent")) > 10 * near


def test_the_refiner_draws_as_diffusers_does(labs, pipes):
    noise = torch.cat([torch.randn(1, 4, 16, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 7)])
    drawn = labs["refiner"].generate(PROMPTS, steps=4, guidance=7.5, seed=[0, 7], height=32, width=16, progress=False).latents
    # from the very first step on, with latents as they are: the pipeline adds no noise of its own then
    call = dict(image=noise, denoising_start=1e-4, num_inference_steps=4, guidance_scale=7.5, output_type="latent", negative_prompt=["", ""])
    expected = pipes["refiner"](PROMPTS, original_size=(32, 16), target_size=(32, 16), **call).images
    assert relative(drawn, expected) < 1e-4
    call |= dict(aesthetic_score=3.0)
    assert relative(drawn, pipes["refiner"](PROMPTS, original_size=(32, 16), target_size=(32, 16), **call).images) > 1e-3
    mine = labs["refiner"].generate(PROMPTS, 4, 7.5, [0, 7], height=32, width=16, progress=False, sizes=(32, 16, 0, 0, 3.0)).latents
    assert relative(mine, pipes["refiner"](PROMPTS, original_size=(32, 16), target_size=(32, 16), **call).images) < 1e-4


def test_sdxls_empty_negative_prompt_is_zeros_and_no_empty_text(labs, pipes, monkeypatch):
    draw = dict(steps=2, guidance=7.5, height=16, width=16, progress=False)
    lab = labs["sdxl"]
    c, uncond = lab.conditions(complete(lab, "a ball", seed=[0, 1], negative_prompt=["", "blue"], **{k: v for k, v in draw.items() if k != "progress"}))
    assert not uncond.states[0].any() and not uncond.pooled[0].any() and uncond.states[1].any() and uncond.sizes.equal(c.sizes)
    zeros = lab.generate("a ball", **draw).latents
    empty = pipes["sdxl"]("a ball", negative_prompt="", num_inference_steps=2, guidance_scale=7.5, height=16, width=16, output_type="latent",
                          generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    assert relative(zeros, empty) > 1e-3
    monkeypatch.setattr(lab, "force_zeros", False)
    assert relative(lab.generate("a ball", **draw).latents, empty) < 1e-4


def test_a_picture_does_not_depend_on_its_batch_and_recipes_draw_it_again(labs):
    lab = labs["sdxl"]
    many = lab.generate(PROMPTS, 2, [2.0, 7.5], [3, 4], NEGATIVE, 16, 16, progress=False, sizes=[64, 64, 0, 0, 16, 16])
    one = lab.generate(PROMPTS[1], 2, 7.5, 4, NEGATIVE[1], 16, 16, progress=False, sizes=(64, 64, 0, 0, 16, 16))
    assert relative(many.latents[1:], one.latents) < 1e-5
    assert json.loads(json.dumps(many.recipe))["sizes"] == [64, 64, 0, 0, 16, 16]
    assert torch.equal(lab.generate(**many.recipe, progress=False).latents, many.latents)
    assert "sizes" not in lab.generate("a ball", 2, height=16, width=16, progress=False).recipe


@pytest.mark.parametrize("family", ("sdxl", "sd21"))
def test_recording_works_on_all_of_them(family, labs):
    with labkit.record(labs[family]) as trace:
        labs[family].generate("a red ball", steps=2, height=16, width=16, progress=False)
    assert trace.heatmap("ball").map.shape == (8, 8) and trace.branches == ("uncond", "cond")


@pytest.mark.parametrize("family", ("sd21", "sdxl", "refiner"))
def test_optimized_they_draw_the_same(family, labs):
    from labkit.packing import available, optimize

    if not available():
        pytest.skip("this build of torch lacks the kernels")
    draw = dict(prompt=PROMPTS, steps=2, seed=[0, 7], negative_prompt=NEGATIVE, height=32, width=16, progress=False)
    assert relative(optimize(labs[family]).generate(**draw).latents, labs[family].generate(**draw).latents) < 1e-4


@pytest.mark.parametrize(
    "family, sizes, says",
    [
        ("sd15", (1, 2, 3, 4, 5, 6), "only SDXL"),
        ("sdxl", (1, 2, 3), "6 numbers"),
        ("sdxl", "big", "6 numbers"),
        ("sdxl", (1, 2, 3, 4, 5, float("nan")), "6 numbers"),
        ("sdxl", (1, 2, 3, 4, 5, -6), "6 numbers"),
        ("refiner", (1,) * 6, "5 numbers"),
    ],
)
def test_sizes_that_cannot_be(family, sizes, says, labs):
    with pytest.raises(LabkitError, match=says):
        labs[family].generate("a ball", steps=1, height=16, width=16, sizes=sizes, progress=False)
    with pytest.raises(LabkitError, match=says):
        labs[family].encode_text("a ball", sizes)


def test_conditions_that_do_not_fit(labs):
    x, lab = torch.zeros(1, 4, 8, 8), labs["sdxl"]
    c, plain = lab.encode_text("a ball"), labs["sd15"].encode_text("a ball")
    for network, given in ((lab.unet, c.states), (labs["sd15"].unet, c), (lab.unet, Condition(c.states, c.pooled, c.sizes[:, :5]))):
        with pytest.raises(LabkitError, match="expected|reads"):
            network(x, 1, given)
    with pytest.raises(LabkitError, match="of one kind|same model"):
        condition.joined(c, plain)
    with pytest.raises(LabkitError, match="2 conditions for a batch of 3"):
        condition.for_batch(condition.joined(c, c), 3)
    with pytest.raises(LabkitError, match="B alike"):
        Condition(c.states, c.pooled, c.sizes[0])
    assert torch.equal(c[0, 3], c.states[0, 3]) and c.shape == (1, 77, 64) and len(c) == 1
    half = c.to(torch.bfloat16)
    assert half.states.dtype == half.pooled.dtype == torch.bfloat16 and half.sizes.dtype == torch.float32


@pytest.mark.parametrize("family", ("inpaint", "sdxl-inpaint"))
def test_inpainting_says_what_it_can(family, labs):
    lab = labs[family]
    with pytest.raises(LabkitError, match="inpainting.*9 channels.*lab.unet"):
        lab.generate("a ball", steps=1, progress=False)
    assert lab.unet(torch.randn(1, 9, 8, 8), 5, lab.encode_text("a ball")).shape == (1, 4, 8, 8)


# --- and back -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FULL)
def test_round_trip_through_labkit_is_bit_identical_in_diffusers(family, labs, pipes, folders, tmp_path):
    where = save_pipeline(labs[family], tmp_path / family)
    again = opened(family, where)
    assert type(again).__name__ == FULL[family][0]
    for part, network in pipes[family].components.items():
        if not isinstance(network, torch.nn.Module):
            assert (network is None) == (again.components[part] is None), part
            continue
        before, after = network.state_dict(), again.components[part].state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before), part
        theirs, ours = network.config.to_dict() if hasattr(network.config, "to_dict") else dict(network.config), again.components[part].config
        ours = ours.to_dict() if hasattr(ours, "to_dict") else dict(ours)
        differ = {k for k in theirs.keys() | ours.keys() if not k.startswith("_") and tuple_of(theirs.get(k)) != tuple_of(ours.get(k))}
        # ids that name the same token (transformers takes 2 for "the largest"), a width of no projection, training
        unimportant = {"bos_token_id", "eos_token_id", "pad_token_id", "projection_dim", "dropout"} if "text" in part else set()
        assert differ <= unimportant, (part, differ)
    assert pipes[family].scheduler.config["prediction_type"] == again.scheduler.config["prediction_type"]
    for field in ("requires_aesthetics_score", "force_zeros_for_empty_prompt"):
        assert pipes[family].config.get(field) == again.config.get(field)
    parts = load_pipeline(where)
    assert parts.unet.config == labs[family].unet.config and parts.force_zeros == labs[family].force_zeros


def tuple_of(value):
    """Lists and tuples alike, one number for all levels as the number, and what is off as None."""
    if value is False:
        return None
    value = tuple(value) if isinstance(value, (list, tuple)) else value
    return value[0] if isinstance(value, tuple) and value and len(set(value)) == 1 else value


def test_shards_and_variants_of_sdxl(tmp_path):
    folder = write("sdxl", tmp_path / "m", max_shard_size="100KB", variant="fp16")
    assert len(list((folder / "unet").glob("*fp16*-of-*.safetensors"))) > 1
    lab = labkit.load(folder, "cpu", variant="fp16")
    assert lab.unet.config.addition_time_embed_dim == 8 and lab.dtype == torch.float32
    with pytest.raises(CheckpointError, match="no weights called variant 'ema'; there is variant='fp16'"):
        load_pipeline(folder, variant="ema")
    with pytest.raises(CheckpointError, match="variant is '../x'"):
        load_pipeline(folder, variant="../x")


def published(*names):
    """File names of a repository as SDXL's is on the hub."""
    there = ["model_index.json", "sd_xl_base_1.0.safetensors", "scheduler/scheduler_config.json"]
    there += [f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")]
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model"), ("text_encoder_2", "model")):
        there += [f"{part}/{stem}.safetensors", f"{part}/{stem}.fp16.safetensors", f"{part}/{stem}.onnx"]
    return {*there, *names}


def test_the_weights_of_a_hub_repository_that_are_needed():
    full = ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"]
    assert sources._needed(published(), "org/xl", torch.float32, None) == [f"{stem}.safetensors" for stem in full]
    assert sources._needed(published(), "org/xl", torch.bfloat16, "fp16") == [f"{stem}.fp16.safetensors" for stem in full]
    shards = {f"unet/diffusion_pytorch_model{mark}-0000{i}-of-00002.safetensors" for mark in ("", ".fp16") for i in (1, 2)}
    index = {"unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.safetensors.index.fp16.json"}
    sharded = published(*shards, *index) - {"unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"}
    for variant, mark in ((None, ""), ("fp16", ".fp16")):
        needed = sources._needed(sharded, "org/xl", torch.float32, variant)
        assert needed[:2] == [f"unet/diffusion_pytorch_model{mark}-0000{i}-of-00002.safetensors" for i in (1, 2)] and len(needed) == 6
    for lost in ("text_encoder_2/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        with pytest.raises(CheckpointError, match="there is variant='fp16'|no .*safetensors there"):
            sources._needed(published() - {lost, lost.replace(".safe", ".fp16.safe")}, "org/xl", torch.float32, None)
    with pytest.raises(CheckpointError, match="no weights called variant 'bf16'; there is variant=None, variant='fp16'"):
        sources._needed(published(), "org/xl", torch.float32, "bf16")
    refiner = {name for name in published() if not name.startswith("text_encoder/")}
    assert [name.split("/")[0] for name in sources._needed(refiner, "org/refiner", None, None)] == ["unet", "vae", "text_encoder_2"]


def test_a_download_that_was_cut_short_is_seen_by_its_index(folders, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    base = tmp_path / "models--org--xl"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("a" * 40)
    where = shutil.copytree(folders["sdxl"], base / "snapshots" / ("a" * 40))
    assert sources.resolve("org/xl") == where
    shutil.rmtree(where / "text_encoder_2")
    with pytest.raises(CheckpointError, match="not in this machine's cache"):
        sources.resolve("org/xl")


def test_variant_is_taken_where_both_are(folders, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(folders["sdxl"], folder)
    write("sdxl", tmp_path / "half", variant="fp16")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for path in (tmp_path / "half" / part).glob("*.safetensors"):
            shutil.copy(path, folder / part)
    path = next((folder / "unet").glob("*.fp16.safetensors"))
    tensors = {name: torch.zeros_like(t) for name, t in load_file(path).items()}
    save_file(tensors, path)
    assert load_pipeline(folder).unet.conv_in.weight.any() and not load_pipeline(folder, variant="fp16").unet.conv_in.weight.any()


# --- precision ----------------------------------------------------------------------------------------------------------------


def test_the_vae_stays_in_float32_where_its_config_asks_for_it(folders, tmp_path):
    half = load_pipeline(folders["sdxl"], dtype=torch.float16)
    assert half.unet.conv_in.weight.dtype == half.text_encoder_2.text_projection.weight.dtype == torch.float16
    assert half.vae.post_quant_conv.weight.dtype == torch.float32
    assert load_pipeline(folders["sdxl"], dtype=torch.bfloat16).vae.post_quant_conv.weight.dtype == torch.bfloat16
    folder = shutil.copytree(folders["sdxl"], tmp_path / "m")
    for says in (False, "gone"):  # a VAE that was mended, and files older than the field
        edit(folder / "vae" / "config.json", force_upcast=says)
        assert load_pipeline(folder, dtype=torch.float16).vae.post_quant_conv.weight.dtype == torch.float16


def test_half_precision_sdxl_draws(folders):
    full, half = (LatentDiffusion(**vars(load_pipeline(folders["sdxl"], dtype=d))) for d in (torch.float32, torch.bfloat16))
    call = dict(prompt="a red ball", steps=2, guidance=3.0, height=16, width=16, progress=False)
    a, b = half.generate(**call).latents, full.generate(**call).latents
    assert a.dtype == torch.float32 and 0 < (a - b).norm() < 0.2 * b.norm()


# --- what can be wrong --------------------------------------------------------------------------------------------------------


def edit(path, **changes):
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "gone"}))


@pytest.mark.parametrize(
    "file, changes, says",
    [
        ("model_index.json", {"text_encoder_2": [None, None]}, "names no text_encoder_2"),
        ("model_index.json", {"tokenizer": [None, None]}, "names no tokenizer;"),
        ("model_index.json", {"tokenizer_2": "gone"}, "names no tokenizer_2"),
        ("model_index.json", {"text_encoder_2": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
        ("model_index.json", {"text_encoder": [None, None], "tokenizer": [None, None]}, "different models"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "different models"),
        ("unet/config.json", {"addition_embed_type": "text_image"}, "addition_embed_type is 'text_image'"),
        ("unet/config.json", {"addition_embed_type": None}, "unknown (add_embedding"),
        ("unet/config.json", {"addition_time_embed_dim": None}, "addition_time_embed_dim"),
        ("unet/config.json", {"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block is [1, 2]"),
        ("unet/config.json", {"transformer_layers_per_block": [1, 2, 10**6]}, "from 1 to 64"),
        ("unet/config.json", {"use_linear_projection": "yes"}, "use_linear_projection is 'yes'"),
        ("unet/config.json", {"a_new_switch": False}, "a_new_switch"),
        ("vae/config.json", {"latents_mean": [0.1] * 4}, "latents_mean"),
        ("vae/config.json", {"force_upcast": "no"}, "force_upcast is 'no'"),
        ("vae/config.json", {"a_new_field": 1}, "a_new_field"),
        ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask"),
        ("text_encoder/config.json", {"a_new_field": 1}, "a_new_field"),
        ("text_encoder_2/config.json", {"architectures": ["CLIPTextModel"]}, "CLIPTextModelWithProjection"),
        ("text_encoder_2/config.json", {"projection_dim": 24}, "of another shape"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ("scheduler/scheduler_config.json", {"a_new_field": 1}, "a_new_field"),
        ("scheduler/scheduler_config.json", {"set_alpha_to_one": "no"}, "set_alpha_to_one is 'no'"),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 20}, "different lengths"),
    ],
)
def test_what_does_not_fit_is_named(file, changes, says, folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "m")
    edit(folder / file, **changes)
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(folder)
    assert says in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
