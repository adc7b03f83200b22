"""Original one-file checkpoints: the same networks as diffusers and its converters make of them, at full size by name and shape."""

import hashlib
import os
import re
import shutil
import time

import originals as o
import pytest
import torch
from labkit import checkpoint
from labkit.errors import CheckpointError
from labkit.models import formats, original_names, single_file
from labkit.models.files import few
from labkit.models.single_file import open_one_file, recognise
from labkit.models.tokenizer import Tokenizer, build_vocabulary
from safetensors.torch import load_file, save_file

import labkit

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from diffusers.loaders import single_file_utils as theirs_utils  # noqa: E402

WORDS = "a red blue ball cube left of".split()


def networks(unet: dict, text: dict, projected=False) -> tuple:
    """diffusers' and transformers' networks with random weights."""
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    made = diffusers.UNet2DConditionModel.from_config(unet), diffusers.AutoencoderKL.from_config(o.SMALL_VAE), kind(transformers.CLIPTextConfig(**text))
    return tuple(o.randomised(network, seed) for seed, network in enumerate(made))


@pytest.fixture(scope="module")
def sd1():
    """(the three networks, the whole checkpoint under its original names)."""
    unet, vae, text = networks({**o.SD1_UNET, **o.SMALL}, o.SMALL_CLIP)
    original = o.unet_original(unet.state_dict(), unet.config) | o.vae_original(vae.state_dict(), 2) | o.clip_original(text.state_dict()) | o.TABLES
    return (unet, vae, text), original


@pytest.fixture(scope="module")
def sd2():
    unet, vae, text = networks({**o.SD2_UNET, **o.SMALL, "attention_head_dim": [1, 1]}, {**o.SMALL_CLIP, "hidden_act": "gelu"})
    original = o.unet_original(unet.state_dict(), unet.config) | o.vae_original(vae.state_dict(), 2)
    return (unet, vae, text), original | o.openclip_original(text.state_dict(), last=True) | o.TABLES


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer's folder; pad "!" is token 0, as in CLIP."""
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    Tokenizer(*build_vocabulary(WORDS), max_length=77).save_folder(folder)
    return folder


def save(tensors: dict, path):
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path)
    return path


def in_memory(table: dict, **options):
    """`recognise` on tensors that need no file."""
    return recognise("model.safetensors", table, lambda names, device, dtype: {n: table[n] for n in names}, **options)


def assert_same(ours: dict, theirs: dict):
    theirs = {n.removeprefix("text_model."): t for n, t in theirs.items()}
    ours = {n.removeprefix("text_model."): t for n, t in ours.items()}
    assert ours.keys() == theirs.keys(), few(sorted(ours.keys() ^ theirs.keys()))
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape and (tensor.is_meta or torch.equal(tensor, theirs[name])), name


@torch.no_grad()
def assert_draws_the_same(parts, theirs):
    """Outputs of the three networks, equal to rounding."""
    unet, vae, text = theirs
    g = torch.Generator().manual_seed(3)
    x, image = torch.randn(2, unet.config.in_channels, 8, 8, generator=g), torch.randn(1, 3, 16, 16, generator=g)
    ids = torch.randint(0, 400, (2, 77), generator=g)
    c = text(ids).last_hidden_state
    torch.testing.assert_close(parts.text_encoder(ids), c, rtol=1e-4, atol=1e-5)
    expected = unet(x, torch.tensor(500), encoder_hidden_states=c).sample
    torch.testing.assert_close(parts.unet(x, 500, c), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.vae.encode(image).mean, vae.encode(image).latent_dist.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.vae.decode(x[:, :4]), vae.decode(x[:, :4]).sample, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1 and c.std() > 0.1


# --- the same as diffusers ----------------------------------------------------------------------------------------------------


def test_the_way_back_that_these_tests_build_on_is_the_one_of_diffusers(sd1, sd2):
    for (unet, vae, text), original in (sd1, sd2):
        assert_same(theirs_utils.convert_ldm_unet_checkpoint(dict(original), unet.config), unet.state_dict())
        assert_same(theirs_utils.convert_ldm_vae_checkpoint(dict(original), vae.config), vae.state_dict())
    assert_same(theirs_utils.convert_ldm_clip_checkpoint(o.clip_original(sd1[0][2].state_dict())), o_text(sd1))
    whole = o.openclip_original(sd2[0][2].state_dict())
    assert_same(theirs_utils.convert_open_clip_checkpoint(sd2[0][2], whole), sd2[0][2].state_dict())


def o_text(model) -> dict:
    return {**model[0][2].state_dict(), "embeddings.position_ids": torch.arange(77)[None]}


def test_stable_diffusion_1_opens_and_computes_the_same(sd1, words, tmp_path):
    path = save(sd1[1], tmp_path / "v1-5 pruned é.safetensors")
    lab = labkit.load(str(path), "cpu", tokenizer=words)
    assert_draws_the_same(lab, sd1[0])
    assert lab.name == "v1-5 pruned é" and lab.schedule_config == labkit.schedule.ScheduleConfig() and lab.vae.config.scaling_factor == 0.18215
    assert lab.unet.config.num_attention_heads == (8, 8) and lab.unet.config.sample_size == 64
    assert lab.generate("a red ball", steps=2, height=16, width=16, progress=False).image.size == (16, 16)
    for part, network in zip(("unet", "vae", "text_encoder"), sd1[0]):
        assert_same(getattr(lab, part).state_dict(), network.state_dict())


def test_stable_diffusion_2_opens_and_computes_the_same(sd2, words, tmp_path):
    parts = checkpoint.load_pipeline(save(sd2[1], tmp_path / "v2.safetensors"), tokenizer=words)
    assert_draws_the_same(parts, sd2[0])
    assert parts.text_encoder.config.num_hidden_layers == 2  # of three
    assert parts.schedule_config.prediction_type == "v_prediction" and parts.tokenizer.pad == "!"


def test_weights_are_read_as_the_type_that_is_asked_for(sd1, words, tmp_path):
    path = save({n: t.half() if t.is_floating_point() else t for n, t in sd1[1].items()}, tmp_path / "half.safetensors")
    assert checkpoint.load_pipeline(path, tokenizer=words).unet.conv_in.weight.dtype == torch.float32
    assert checkpoint.load_pipeline(path, dtype=None, tokenizer=words).unet.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("rule", ["the decoder's levels", "query and key", "the last layer", "the projection", "two resnets", "layers per level"])
def test_wrong_twins_of_the_rules_are_seen(sd1, sd2, rule, monkeypatch):
    """Each is a mistake under which names or shapes still fit, or nearly so."""
    (unet, vae, text), original = sd1 if rule in ("the decoder's levels", "two resnets", "layers per level") else sd2
    if rule == "the decoder's levels":
        twin = tuple((old, new.replace("{up}", "{level}")) for old, new in original_names.VAE)
        monkeypatch.setattr(original_names, "VAE", twin)
        got, expected = in_memory(original).tensors("vae")[0], vae.state_dict()
    elif rule == "two resnets":
        swap = {"mid_block.resnets.0.": "mid_block.resnets.1.", "mid_block.resnets.1.": "mid_block.resnets.0."}
        twin = tuple((old, swap.get(new, new)) for old, new in original_names.UNET)
        monkeypatch.setattr(original_names, "UNET", twin)
        got, expected = in_memory(original).tensors("unet")[0], unet.state_dict()
    elif rule == "layers per level":
        stripped = {n.removeprefix("model.diffusion_model."): t for n, t in original.items() if n.startswith("model.diffusion_model.")}
        got, expected = original_names.unet_tensors(stripped, 2), unet.state_dict()
    else:
        stripped = {n.removeprefix("cond_stage_model.model."): t for n, t in original.items() if n.startswith("cond_stage_model.model.")}
        expected = text.state_dict()
        if rule == "query and key":
            swapped = {n: torch.cat([t.chunk(3)[i] for i in (1, 0, 2)]) if "in_proj" in n else t for n, t in stripped.items()}
            got = original_names.openclip_tensors(swapped, 2, projection=False)
        elif rule == "the last layer":
            got = original_names.openclip_tensors(stripped, 3, projection=False)
        else:
            projected = {**text.state_dict(), "text_projection.weight": torch.randn(64, 64)}
            expected, got = projected, original_names.openclip_tensors(
                {n.removeprefix("p."): t.T if n.endswith("text_projection") else t for n, t in o.openclip_original(projected, "p.").items()})  # fmt: skip
    with pytest.raises(AssertionError):
        assert_same(got, expected)


# --- full size, by name and shape -----------------------------------------------------------------------------------------------


def full_size(unet: dict, texts: list) -> tuple[dict, dict]:
    """(parts under diffusers' names, the original), on the meta device."""
    with torch.device("meta"):
        parts = {"unet": diffusers.UNet2DConditionModel.from_config(unet).state_dict(), "vae": diffusers.AutoencoderKL.from_config(o.VAE).state_dict()}
        original = o.unet_original(parts["unet"], unet) | o.vae_original(parts["vae"], 4)
        for part, config, prefix in texts:
            kind = transformers.CLIPTextModelWithProjection if part.endswith("_2") else transformers.CLIPTextModel
            parts[part] = kind(transformers.CLIPTextConfig(**config)).state_dict()
            made = o.clip_original(parts[part], prefix) if prefix.endswith("transformer.") else o.openclip_original(parts[part], prefix, config is o.CLIP_H)
            original |= made
    return parts, original


FULL = {
    "Stable Diffusion 1.x": (o.SD1_UNET, [("text_encoder", o.CLIP_L, "cond_stage_model.transformer.")], "StableDiffusionPipeline"),
    "Stable Diffusion 2.x": (o.SD2_UNET, [("text_encoder", o.CLIP_H, "cond_stage_model.model.")], "StableDiffusionPipeline"),
    "SDXL": (o.SDXL_UNET, [("text_encoder", o.CLIP_L, "conditioner.embedders.0.transformer."),
                           ("text_encoder_2", o.CLIP_G, "conditioner.embedders.1.model.")], "StableDiffusionXLPipeline"),
    "the SDXL refiner": (o.REFINER_UNET, [("text_encoder_2", o.CLIP_G, "conditioner.embedders.0.model.")], "StableDiffusionXLImg2ImgPipeline"),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_full_size_by_name_and_shape(name):
    unet, texts, pipeline = FULL[name]
    parts, original = full_size(unet, texts)
    one = in_memory(original)
    assert (one.family.name, one.index()["_class_name"], one.parts) == (name, pipeline, list(parts))
    for part, expected in parts.items():
        assert_same(one.tensors(part, "meta")[0], expected)
    config = one.config("unet")
    for field in set(unet) - {"transformer_layers_per_block", "upcast_attention"}:
        assert config[field] == unet[field], field
    with torch.device("meta"):  # the configuration describes the published network, also where it says so in other words
        again = diffusers.UNet2DConditionModel.from_config(config)
        heads = {n: m.heads for n, m in again.named_modules() if hasattr(m, "heads")}
        assert heads == {n: m.heads for n, m in diffusers.UNet2DConditionModel.from_config(unet).named_modules() if hasattr(m, "heads")}
    assert_same(again.state_dict(), parts["unet"])
    assert {k: v for k, v in one.config("vae").items() if k in o.VAE and k not in ("sample_size", "scaling_factor")} == {
        k: v for k, v in o.VAE.items() if k not in ("sample_size", "scaling_factor")
    }
    assert one.config("vae")["scaling_factor"] == (0.13025 if "XL" in name else 0.18215)
    for part, text, _ in texts:
        assert {k: one.config(part)[k] for k in text} == text


def test_the_pipeline_of_diffusers_for_each_family():
    for name, (unet, texts, pipeline) in FULL.items():
        assert hasattr(diffusers, pipeline)
        _, original = full_size({**unet, "in_channels": 9}, texts)
        kind = in_memory(original).index()["_class_name"]
        assert kind == pipeline.replace("Img2Img", "").replace("Pipeline", "InpaintPipeline") and hasattr(diffusers, kind), name


# --- what shapes do not tell ----------------------------------------------------------------------------------------------------


def test_the_moving_average_is_taken_when_asked_for(sd1, words, tmp_path):
    path = save(sd1[1] | o.ema_original(sd1[1]), tmp_path / "full.safetensors")
    plain, ema = (checkpoint.load_pipeline(path, tokenizer=words, ema=ema).unet.state_dict() for ema in (False, True))
    assert all(torch.equal(ema[name], tensor + 1) for name, tensor in plain.items())
    assert_same(ema, theirs_utils.convert_ldm_unet_checkpoint({**load_file(path), **dummies()}, sd1[0][0].config, extract_ema=True))
    assert_same(plain, sd1[0][0].state_dict())
    with pytest.raises(CheckpointError, match="no moving average"):
        open_one_file(save(sd1[1], tmp_path / "plain.safetensors"), ema=True)
    half = {n: t for n, t in (sd1[1] | o.ema_original(sd1[1])).items() if n != "model_ema.diffusion_modelout2bias"}
    with pytest.raises(CheckpointError, match="lacks 1 parameters .model_ema.diffusion_modelout2bias"):
        open_one_file(save(half, tmp_path / "half.safetensors"), ema=True)


def dummies() -> dict:
    return {f"model_ema.{n}": torch.zeros(1) for n in range(100)}  # diffusers takes no file with fewer for one with an average


@pytest.mark.parametrize(
    "extra, options, channels, expected, side",
    [
        ({}, {}, 4, "v_prediction", 96),
        ({}, {"prediction_type": "epsilon"}, 4, "epsilon", 64),
        ({"global_step": torch.tensor(875000)}, {}, 4, "epsilon", 64),
        ({"global_step": torch.tensor(140000)}, {}, 4, "v_prediction", 96),
        ({}, {}, 9, "epsilon", 64),
        ({}, {"prediction_type": "v_prediction"}, 9, "v_prediction", 96),
    ],
)
def test_what_stable_diffusion_2_predicts(sd2, tmp_path, extra, options, channels, expected, side):
    first = "model.diffusion_model.input_blocks.0.0.weight"
    one = open_one_file(save({**sd2[1], first: torch.zeros(32, channels, 3, 3), **extra}, tmp_path / "m.safetensors"), **options)
    assert (one.config("scheduler")["prediction_type"], one.config("unet")["sample_size"]) == (expected, side)
    assert formats.schedule_config(one.config("scheduler")).prediction_type == expected
    assert one.config("unet")["in_channels"] == channels


MARKS = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}  # as they are put into files: tensors of no number


@pytest.mark.parametrize(
    "marks, options, expected",
    [
        ((), {}, ("epsilon", "leading", False)),
        (("v_pred",), {}, ("v_prediction", "leading", False)),
        (("v_pred", "ztsnr"), {}, ("v_prediction", "trailing", True)),
        (("ztsnr",), {}, ("epsilon", "leading", False)),  # a network that says eps cannot begin at noise alone
        (("ztsnr",), {"prediction_type": "v_prediction"}, ("v_prediction", "trailing", True)),
        (("v_pred", "ztsnr"), {"prediction_type": "epsilon"}, ("epsilon", "leading", False)),
    ],
)
def test_marks_of_fine_tuned_models(sd1, words, tmp_path, marks, options, expected):
    path = save({**sd1[1], **{name: MARKS[name] for name in marks}}, tmp_path / "m.safetensors")
    found = checkpoint.load_pipeline(path, tokenizer=words, **options).schedule_config
    assert (found.prediction_type, found.timestep_spacing, found.rescale_betas_zero_snr) == expected


def test_a_marked_file_draws_as_diffusers_does_when_it_is_told(sd1, words, tmp_path):
    """diffusers opens the same networks, but has to be told of v and of zero terminal SNR."""
    lab = labkit.load(save({**sd1[1], **MARKS}, tmp_path / "m.safetensors"), "cpu", tokenizer=words)
    unet, vae, text = sd1[0]
    tokens = transformers.CLIPTokenizer.from_pretrained(words)
    told = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, clip_sample=False)
    told |= dict(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    pipe = diffusers.StableDiffusionPipeline(vae, text, tokens, unet, diffusers.DDIMScheduler(**told), None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=5, guidance_scale=7.5, height=16, width=16, output_type="latent")
    theirs = pipe("a red ball", generator=torch.Generator().manual_seed(0), **call).images
    ours = lab.generate("a red ball", steps=5, guidance=7.5, height=16, width=16, progress=False)
    assert (ours.latents - theirs).norm() < 1e-3 * theirs.norm()  # the first alpha_bar is 2^-24 here and 0 there
    pipe.scheduler = diffusers.DDIMScheduler(**{**told, "rescale_betas_zero_snr": False})
    without = pipe("a red ball", generator=torch.Generator().manual_seed(0), **call).images
    assert (ours.latents - without).norm() > 2e-2 * without.norm(), "and it matters"


def test_where_the_tokenizer_is_looked_for(sd1, words, tmp_path, monkeypatch):
    import huggingface_hub

    path = save(sd1[1], tmp_path / "m.safetensors")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)
    with pytest.raises(CheckpointError, match="tokenizer is not in such a file.*tokenizer=FOLDER.*hf download openai/clip"):
        checkpoint.load_pipeline(path)
    with pytest.raises(CheckpointError, match="nowhere: there is no such folder"):
        checkpoint.load_pipeline(path, tokenizer=tmp_path / "nowhere")
    assert checkpoint.load_pipeline(path, tokenizer=words.parent).tokenizer.encode("a red ball").pieces[1:4] == ("a</w>", "red</w>", "ball</w>")
    cached = {f"tokenizer/{name}": str(words / name) for name in ("vocab.json", "merges.txt")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: cached.get(file) if "xl-base" in repo else None)
    assert checkpoint.load_pipeline(path).tokenizer.max_length == 77
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: pytest.fail("looked into the cache"))
    shutil.copytree(words, tmp_path / "tokenizer")  # beside the file
    assert checkpoint.load_pipeline(path).tokenizer.pad == "<|endoftext|>"


def test_options_of_one_file_are_for_one_file(tmp_path):
    with pytest.raises(CheckpointError, match="ema is for a checkpoint of one file"):
        labkit.load("tabletop", "cpu", ema=True)


# --- what is none ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, says",
    [
        ({}, "holds no U-Net"),
        ({"a": 1}, "its names are a"),
        ({"lora_unet_down_blocks_0.lora_up.weight": 1}, "it is a LoRA"),
        ({"control_model.time_embed.0.weight": 1}, "it is a ControlNet"),
        ({"model.diffusion_model.joint_blocks.0.x": 1}, "it is Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": 1}, "it is Flux"),
        ({"down_blocks.0.resnets.0.conv1.weight": 1}, "load the folder that holds model_index.json"),
        ({"text_model.final_layer_norm.weight": 1}, "it is a text encoder by itself"),
        ({"encoder.down.0.block.0.conv1.weight": 1}, "it is a VAE by itself"),
        ({"model.diffusion_model.x": 1, "cond_stage_model.transformer.x": 1}, "holds no VAE"),
        ({"model.diffusion_model.x": 1, "first_stage_model.x": 1}, "no text encoder"),
        ({"model.diffusion_model.x": 1, "first_stage_model.encoder.down.0.x": 1}, "no text encoder"),
        ({"model.diffusion_model.x": 1, "first_stage_model.x": 1, "cond_stage_model.model.x": 1}, "input_blocks.0.0.weight is missing"),
    ],
)
def test_files_that_are_no_whole_model(tmp_path, content, says):
    save({name: torch.zeros(n) for name, n in content.items()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError) as caught:
        labkit.load(tmp_path / "m.safetensors", "cpu")
    assert says in str(caught.value) and str(tmp_path / "m.safetensors") in str(caught.value), str(caught.value)


UNET = "model.diffusion_model."


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"edm_mean": (1,)}, "EDM"),
        ({"edm_vpred.sigma_max": ()}, "EDM's noise (CosXL)"),
        ({"depth_model.x": (1,)}, "depth map"),
        ({"noise_augmentor.x": (1,)}, "unCLIP"),
        ({"low_scale_model.x": (1,)}, "upscaler"),
        ({"something.else": (1,)}, "something.else"),
        ({UNET + "input_blocks.0.0.weight": (32, 5, 3, 3)}, "reads 5 channels"),
        ({UNET + "label_emb.0.0.weight": (128, 99)}, "not its U-Net"),
        ({UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (64, 99)}, "mixture of two models"),
        ({UNET + "input_blocks.7.0.op.weight": (1,)}, "no regular U-Net"),
        ({UNET + "conv_in.weight": (32, 4, 3, 3)}, "are one parameter"),
        ({UNET + "new_part.weight": (1,)}, "1 unknown (new_part.weight)"),
        ({UNET + "out.2.bias": None}, "1 missing (conv_out.bias)"),
        ({UNET + "out.2.bias": (7,)}, "conv_out.bias: expected (4,), found (7,)"),
        ({"first_stage_model.decoder.up.1.block.0.norm1.bias": None}, "decoder.up_blocks.0.resnets.0.norm1.bias"),
        ({"cond_stage_model.transformer.text_model.final_layer_norm.bias": None}, "1 missing (final_layer_norm.bias)"),
        ({"first_stage_model.encoder.conv_in.weight": None}, "encoder.conv_in.weight is missing"),
    ],
)
def test_files_that_are_another_model_or_not_complete(sd1, words, tmp_path, changes, says):
    tensors = {n: t for n, t in sd1[1].items() if n not in changes}
    save(tensors | {n: torch.zeros(shape) for n, shape in changes.items() if shape is not None}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError) as caught:
        labkit.load(tmp_path / "m.safetensors", "cpu", tokenizer=words)
    message = str(caught.value)
    assert says in message and "m.safetensors" in message and "\n" not in message and "config.json and" not in message, message


def test_an_unknown_prediction_type(sd1):
    with pytest.raises(CheckpointError, match="prediction_type is 'noise'; give one of epsilon, v_prediction"):
        in_memory(sd1[1], prediction_type="noise")


def test_nothing_is_read_but_the_header_until_it_is_needed(sd1, tmp_path, monkeypatch):
    path = save(sd1[1], tmp_path / "m.safetensors")
    monkeypatch.setattr(single_file, "read_safetensors", lambda *a, **k: pytest.fail("weights were read"))
    assert open_one_file(path).family.name == "Stable Diffusion 1.x"


# --- one file of a hub repository -------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache as huggingface_hub lays it out; `put(repo, file, content)` puts a path there as its download does."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repo, name, source, revision="main"):
        base, commit = tmp_path / "hub" / f"models--{repo.replace('/', '--')}", "0123456789" * 4
        (base / "refs").mkdir(parents=True, exist_ok=True)
        (base / "refs" / revision).write_text(commit)
        blob = base / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(source, blob)
        link = base / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        return link

    return put


ADDRESSES = (
    "org/one/v1 5 (pruned).safetensors",
    "huggingface.co/org/one/v1 5 (pruned).safetensors",
    "https://huggingface.co/org/one/blob/main/v1 5 (pruned).safetensors",
    "https://hf.co/org/one/resolve/main/v1 5 (pruned).safetensors?download=true",
)


@pytest.mark.parametrize("name", ADDRESSES)
def test_a_file_of_a_hub_repository_in_the_cache_needs_no_network(name, cache, sd1, words, tmp_path):
    cache("org/one", "v1 5 (pruned).safetensors", save(sd1[1], tmp_path / "m.safetensors"))
    lab = labkit.load(name, "cpu", tokenizer=words)
    assert lab.name == "v1 5 (pruned)" and lab.generate("a red ball", steps=1, height=16, width=16, progress=False).image
    assert_same(lab.unet.state_dict(), sd1[0][0].state_dict())


def test_a_file_in_a_folder_of_a_hub_repository_with_its_tokenizer_beside_it(cache, sd1, words, tmp_path):
    file = save({n: t.half() if t.is_floating_point() else t for n, t in sd1[1].items()}, tmp_path / "m.safetensors")
    cache("org/one", "half/m.safetensors", file, "v2")
    for part in words.iterdir():
        cache("org/one", f"half/tokenizer/{part.name}", part, "v2")
    lab = labkit.load("org/one/resolve/v2/half/m.safetensors", "cpu", dtype="float16")
    assert lab.name == "m" and lab.dtype == torch.float16 and lab.tokenizer.encode("ball").pieces[1] == "ball</w>"


def test_a_file_that_is_not_cached_is_refused_at_once_offline(cache, sd1, tmp_path):
    cache("org/one", "m.safetensors", save(sd1[1], tmp_path / "m.safetensors"))
    for name, command in (
        ("org/one/other.safetensors", "`hf download org/one 'other.safetensors'`"),
        ("org/nothing/a/b.safetensors", "`hf download org/nothing 'a/b.safetensors'`"),
        ("org/one/blob/v3/m.safetensors", "`hf download org/one 'm.safetensors' --revision v3`"),
    ):
        begun = time.monotonic()
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as caught:
            labkit.load(name, "cpu")
        assert command in str(caught.value) and "\n" not in str(caught.value) and time.monotonic() - begun < 5


def test_a_repository_of_one_file_says_how_to_name_it(cache, sd1, tmp_path, monkeypatch):
    import huggingface_hub
    from labkit.models import sources

    cache("org/one", "m.safetensors", save(sd1[1], tmp_path / "m.safetensors"))
    advice = re.escape("so it is not a model in the diffusers layout; for a checkpoint of one file, name the file: load('org/one/m.safetensors')")
    with pytest.raises(CheckpointError, match=advice):  # offline, but the file is in the cache
        labkit.load("org/one", "cpu")
    monkeypatch.setattr(sources, "_no_network", lambda hub: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: ["README.md", "m.safetensors", "lora/x.safetensors"])
    with pytest.raises(CheckpointError, match=advice + r"\.$"):
        labkit.load("org/one", "cpu")
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: ["README.md", "lora/x.safetensors"])
    with pytest.raises(CheckpointError, match=r"diffusers layout\.$"):
        labkit.load("org/one", "cpu")


def test_a_file_of_the_hub_is_fetched_once_where_there_is_a_network(cache, sd1, words, tmp_path, monkeypatch):
    import huggingface_hub
    from labkit.models import sources

    path, asked, whole = save(sd1[1], tmp_path / "m.safetensors"), [], huggingface_hub.hf_hub_download

    def download(repo, file, revision=None, local_files_only=False):
        if local_files_only:
            return whole(repo, file, revision=revision, local_files_only=True)
        asked.append((repo, file, revision))
        return str(cache(repo, file, path))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(sources, "_no_network", lambda hub: None)
    for _ in range(2):
        assert labkit.load("org/one/m.safetensors", "cpu", tokenizer=words).name == "m"
    assert asked == [("org/one", "m.safetensors", None)]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, local_files_only=False, **k: lost(local_files_only))
    with pytest.raises(CheckpointError, match="org/one/n.safetensors: could not be fetched .404.; check the name"):
        labkit.load("org/one/n.safetensors", "cpu")


def lost(local):
    import huggingface_hub

    raise huggingface_hub.errors.LocalEntryNotFoundError("no") if local else OSError("404")


@pytest.mark.parametrize("name", ["org/one/m.ckpt", "https://huggingface.co/org/one/blob/main/a/m.ckpt"])
def test_a_pickle_of_the_hub_is_not_opened(name, cache):
    with pytest.raises(CheckpointError, match="can run code when opened.*hf download org/one '.*m.ckpt'.*labkit convert PATH m.safetensors"):
        labkit.load(name, "cpu")


NAMELESS = ("org/one/../../m.safetensors", "org/../m.safetensors", "a/b/c/.m.safetensors", "http://evil.org/a/b/m.safetensors", "org/m.safetensors")


@pytest.mark.parametrize("name", NAMELESS)
def test_what_is_no_name_of_a_file_of_the_hub(name, cache):
    with pytest.raises(CheckpointError, match="No model called|not in this machine's cache"):
        labkit.load(name, "cpu")


def test_a_file_has_no_variants(sd1, tmp_path):
    with pytest.raises(CheckpointError, match="m.safetensors: variant is for folders"):
        labkit.load(save(sd1[1], tmp_path / "m.safetensors"), "cpu", variant="fp16")
