"""Opening and saving: both ways with diffusers and transformers, every kind of broken file, and nothing half-written."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from labkit import checkpoint
from labkit.checkpoint import Parts, load_pipeline, resolve, save_pipeline, verify_sums, write_sums
from labkit.diffusion import LatentDiffusion
from labkit.errors import CheckpointError
from labkit.guidance import classifier_free
from labkit.models import formats, sources
from labkit.models.clip import CLIPText
from labkit.models.files import read_safetensors, write_safetensors
from labkit.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from labkit.models.tokenizer import Tokenizer, build_vocabulary
from labkit.models.unet import UNet
from labkit.models.vae import VAE
from labkit.samplers.ddim import ddim
from labkit.schedule import Schedule, ScheduleConfig
from safetensors.torch import load_file, save_file

import labkit

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

UNET = UNetConfig((32, 64), (True, False), (2, 4), 1, 48, norm_num_groups=8, sample_size=8)
VAE_ = VAEConfig((16, 32), 1, norm_num_groups=4, scaling_factor=0.31, sample_size=16)
TEXT = CLIPTextConfig(700, 32, 48, 96, 2, 4)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, norms and biases too, so that a wrong assignment cannot hide behind ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.05 if p.ndim > 1 else 0.2) + (p.ndim == 1) * 0.5)
    return module.eval()


@pytest.fixture(scope="module")
def tiny() -> Parts:
    tok = Tokenizer(*build_vocabulary("a red blue ball cube left of".split()), max_length=32)
    unet, vae, text = randomised(UNet(UNET)), randomised(VAE(VAE_)), randomised(CLIPText(TEXT))
    return Parts(unet, vae, text, tok, ScheduleConfig(), "tiny", {"name": "tiny", "guidance": 5.0})


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    return save_pipeline(tiny, tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def theirs(saved):
    """The same model opened by diffusers, which must say that nothing is missing."""
    return diffusers.StableDiffusionPipeline.from_pretrained(saved, safety_checker=None, feature_extractor=None, image_encoder=None)


def same_weights(a: torch.nn.Module, b: dict, rename=lambda n: n):
    b = {rename(n): t for n, t in b.items()}
    assert a.state_dict().keys() == b.keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b[name]), name


# --- both ways ----------------------------------------------------------------------------------------------------------------


def test_what_labkit_saves_diffusers_opens_with_every_weight(tiny, saved, theirs):
    same_weights(tiny.unet, theirs.unet.state_dict())
    same_weights(tiny.vae, theirs.vae.state_dict())
    same_weights(tiny.text_encoder, theirs.text_encoder.state_dict(), lambda n: n.removeprefix("text_model."))
    for kind, part in ((diffusers.UNet2DConditionModel, "unet"), (diffusers.AutoencoderKL, "vae"), (transformers.CLIPTextModel, "text_encoder")):
        _, info = kind.from_pretrained(saved / part, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (part, info)
    assert type(theirs.scheduler).__name__ == "DDIMScheduler"
    assert {k: theirs.scheduler.config[k] for k in vars(tiny.schedule_config)} == vars(tiny.schedule_config)


def test_weights_are_saved_under_the_names_of_published_files(saved):
    names = load_file(saved / "text_encoder" / "model.safetensors")
    assert all(n.startswith("text_model.") for n in names) and "text_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert sorted(p.name for p in saved.iterdir()) == sorted(
        ["labkit.json", "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    )


def test_a_seed_means_the_same_picture_in_diffusers(tiny, theirs, tmp_path):
    lab = LatentDiffusion(**vars(load_pipeline(save_pipeline(LatentDiffusion(**vars(tiny)), tmp_path / "lab"))))
    ours = lab.generate(["a red ball", "a blue cube"], steps=3, guidance=5.0, seed=[0, 7], height=16, width=16, progress=False).latents
    theirs.set_progress_bar_config(disable=True)
    streams = [torch.Generator().manual_seed(s) for s in (0, 7)]
    call = dict(num_inference_steps=3, guidance_scale=5.0, height=16, width=16, output_type="latent")
    torch.testing.assert_close(ours, theirs(["a red ball", "a blue cube"], generator=streams, **call).images, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_same_picture_as_diffusers(tiny, saved, theirs):
    prompt, w, steps = "a red ball left of a blue cube", 5.0, 3
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=steps, guidance_scale=w, latents=noise.clone(), height=16, width=16)
    expected = theirs(prompt, output_type="latent", **call).images
    parts = load_pipeline(saved)
    states = parts.text_encoder(parts.tokenizer([prompt, ""]))
    denoise = classifier_free(parts.unet, states[:1], states[1:], w)
    *_, last = ddim(denoise, noise, Schedule(parts.schedule_config), steps)
    torch.testing.assert_close(last.x, expected, rtol=1e-4, atol=1e-5)
    picture = theirs(prompt, output_type="pt", **call).images
    ours = (parts.vae.decode(last.x / parts.vae.config.scaling_factor) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, picture, rtol=1e-4, atol=1e-5)


def test_what_labkit_saves_labkit_opens(tiny, saved):
    parts = load_pipeline(str(saved))
    assert (parts.unet.config, parts.vae.config, parts.text_encoder.config) == (UNET, VAE_, TEXT)
    assert parts.schedule_config == tiny.schedule_config and parts.name == "tiny" and parts.metadata == tiny.metadata
    assert parts.tokenizer.vocab == tiny.tokenizer.vocab and parts.tokenizer.max_length == 32
    for part in ("unet", "vae", "text_encoder"):
        same_weights(getattr(parts, part), getattr(tiny, part).state_dict())
        module = getattr(parts, part)
        assert not module.training and not any(p.is_meta for p in module.parameters())


def test_what_diffusers_saves_labkit_opens(tiny, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    parts = load_pipeline(tmp_path / "theirs")
    vae = replace(VAE_, force_upcast=True)  # where a file does not say, diffusers' default is true, and it writes its defaults down
    assert (parts.unet.config, parts.vae.config, parts.text_encoder.config) == (UNET, vae, TEXT)
    for part in ("unet", "vae", "text_encoder"):
        same_weights(getattr(parts, part), getattr(tiny, part).state_dict())
    assert parts.schedule_config == tiny.schedule_config and parts.name == "theirs"
    assert torch.equal(parts.tokenizer(["a red ball", "zebra!"]), tiny.tokenizer(["a red ball", "zebra!"]))


def test_shards_and_half_precision_variants_of_diffusers(tiny, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))) > 1
    parts = load_pipeline(tmp_path / "shards")
    for part in ("unet", "vae", "text_encoder"):
        same_weights(getattr(parts, part), getattr(tiny, part).state_dict())
    theirs.save_pretrained(tmp_path / "half", variant="fp16")
    same_weights(load_pipeline(tmp_path / "half").unet, tiny.unet.state_dict())
    half = load_pipeline(tmp_path / "half", dtype=torch.float16)
    assert all(p.dtype == torch.float16 for p in half.unet.parameters())


def test_the_half_precision_file_is_taken_only_when_asked_for(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({n: torch.zeros_like(t) for n, t in load_file(path).items()}, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert load_pipeline(folder).unet.conv_in.weight.any()
    assert not load_pipeline(folder, dtype=torch.float16).unet.conv_in.weight.any()


def test_saving_in_half_precision(tiny, tmp_path):
    where = save_pipeline(tiny, tmp_path / "half", dtype=torch.float16)
    assert {t.dtype for t in load_file(where / "vae" / "diffusion_pytorch_model.safetensors").values()} == {torch.float16}
    weight = load_pipeline(where).unet.conv_in.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, tiny.unet.conv_in.weight.half().float())
    assert load_pipeline(where, dtype=None).unet.conv_in.weight.dtype == torch.float16
    assert tiny.unet.conv_in.weight.dtype == torch.float32, "what was saved is left as it is"


def test_a_repository_as_published_in_2022(tiny, folder):
    """Stable Diffusion 1.5's own quirks: old names in the VAE, position_ids in the text encoder, PNDM, fields missing from configs."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    new_to_old = {f".attentions.0.{new}.": f".attentions.0.{old}." for old, new in formats.VAE_OLD_NAMES.items()}
    tensors = {}
    for name, tensor in load_file(path).items():
        for new, old in new_to_old.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, path)
    path = folder / "text_encoder" / "model.safetensors"
    save_file({**load_file(path), "text_model.embeddings.position_ids": torch.arange(32)[None]}, path)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,'
        '"num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null, "clip_sample": false}'
    )
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "labkit.json").unlink()
    config = json.loads((folder / "unet" / "config.json").read_text())
    for field in ("attention_type", "conv_in_kernel", "use_linear_projection", "resnet_time_scale_shift", "mid_block_type"):
        del config[field]
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    parts = load_pipeline(folder)
    same_weights(parts.vae, tiny.vae.state_dict())
    same_weights(parts.text_encoder, tiny.text_encoder.state_dict())
    assert parts.schedule_config == ScheduleConfig() and parts.unet.config == UNET and parts.name == "tiny"
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)  # the stand-in is a faithful one
    same_weights(tiny.vae, theirs.vae.state_dict())


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_schedules_are_read_as_diffusers_ddim_reads_them(kind):
    theirs = getattr(diffusers, kind)()
    for raw in ({"_class_name": kind}, json.loads(theirs.to_json_string()), {"_class_name": kind, "beta_end": 0.012, "rescale_betas_zero_snr": True}):
        as_ddim = diffusers.DDIMScheduler.from_config(raw)
        ours = formats.schedule_config(raw)
        assert vars(ours) == {field: as_ddim.config[field] for field in vars(ours)}


def test_configs_of_stable_diffusion_2(tmp_path):
    raw = {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": [5, 10, 20, 20], "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False, "class_embed_type": None, "cross_attention_dim": 1024, "dual_cross_attention": False, "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "only_cross_attention": False, "sample_size": 96, "upcast_attention": True,
        "use_linear_projection": True, "num_class_embeds": None, "norm_eps": 1e-05, "norm_num_groups": 32, "in_channels": 4, "out_channels": 4,
    }  # fmt: skip
    config = formats.unet_config(raw)
    assert config.num_attention_heads == (5, 10, 20, 20) and config.use_linear_projection and config.sample_size == 96
    text = formats.text_config({"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096, "hidden_act": "gelu"})
    assert (text.num_hidden_layers, text.hidden_act, text.vocab_size) == (23, "gelu", 49408)
    with torch.device("meta"):
        theirs = {n: t.shape for n, t in diffusers.UNet2DConditionModel.from_config(raw).state_dict().items()}
        assert {n: t.shape for n, t in UNet(config).state_dict().items()} == theirs


# --- what can be wrong --------------------------------------------------------------------------------------------------------


def edit_json(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def fails(folder, *parts_of_the_message):
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700, message
    assert "weights_only=False" not in message
    for part in parts_of_the_message:
        assert part in message, message
    return message


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3438167534\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"\x80\x02}q\x00." + bytes(100), "pickle"),
        (b"\x00\x00\x00\x00\x00\x01\x00\x00" + bytes(100), "not a safetensors file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00" + b"{broken json}   " + bytes(100), "its header is not JSON"),
        (b"abc", "not a safetensors file"),
    ],
)
def test_files_that_are_not_what_they_are_called(folder, content, says):
    (folder / UNET_FILE).write_bytes(content)
    fails(folder, "diffusion_pytorch_model.safetensors", says)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_reads_like_a_pickle(length, tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + n].rstrip().ljust(length)  # filled up with spaces, as the format has it
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + header + data[8 + n :])
    assert read_safetensors(tmp_path / "w.safetensors")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("keep", [0.001, 0.3, 0.999])
def test_truncated_weights(folder, keep):
    path = folder / UNET_FILE
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    fails(folder, str(path), "fetch it again")


def test_missing_files_and_folders(folder):
    for name in ("tokenizer/merges.txt", "tokenizer/vocab.json", "scheduler/scheduler_config.json", UNET_FILE, "vae/config.json"):
        where = folder / name
        content = where.read_bytes()
        where.unlink()
        fails(folder, str(where.parent), "fetch it again" if "tokenizer/vocab" not in name else "no vocab.json")
        where.write_bytes(content)
    shutil.rmtree(folder / "vae")
    fails(folder, "vae", "fetch it again")
    (folder / "model_index.json").unlink()
    fails(folder, "no model_index.json")


def test_one_part_given_instead_of_the_whole(folder):
    fails(folder / "unet", "give the folder above it", str(folder))


def test_an_empty_folder(tmp_path):
    fails(tmp_path, "no model_index.json")


def test_pickles_are_refused_and_never_opened(folder, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    (folder / UNET_FILE).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    fails(folder, "diffusion_pytorch_model.bin", "can run code", "safe_serialization=True")
    for name in ("sd-v1-4.ckpt", "model.pt", "weights.bin"):
        (folder / name).write_bytes(b"PK\x03\x04")
        fails(folder / name, name, "can run code", "labkit convert")
    (folder / "one.safetensors").write_bytes(b"x")
    fails(folder / "one.safetensors", "1 bytes that are not a safetensors file")


def change_weights(path: Path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_missing_extra_and_misshaped_weights_are_named_and_counted(folder):
    def change(tensors):
        for name in sorted(tensors)[:5]:
            del tensors[name]
        tensors["something.else"] = torch.zeros(1)
        tensors["mid_block.resnets.0.conv1.bias"] = torch.zeros(7)

    change_weights(folder / UNET_FILE, change)
    message = fails(folder, str(folder / UNET_FILE), "5 missing", "1 unknown (something.else)", "1 of another shape", "expected (64,), found (7,)")
    assert message.count("conv_in") + message.count("conv_norm_out") <= 3


def test_every_single_weight_is_needed(folder):
    change_weights(folder / "text_encoder" / "model.safetensors", lambda t: t.pop("text_model.final_layer_norm.bias"))
    fails(folder, "1 missing (final_layer_norm.bias)")


def test_integer_weights(folder):
    change_weights(folder / UNET_FILE, lambda t: t.update({"conv_in.bias": torch.zeros(32, dtype=torch.int32)}))
    fails(folder, "not floating point", "conv_in.bias")
    change_weights(folder / UNET_FILE, lambda t: t.update({"conv_in.bias": torch.zeros(32).to(torch.float8_e4m3fn)}))
    fails(folder, "conv_in.bias", "float8_e4m3fn")


def test_weights_that_are_no_numbers(folder):
    change_weights(folder / UNET_FILE, lambda t: t["conv_in.weight"].view(-1)[3:4].fill_(float("nan")))
    assert load_pipeline(folder).unet.conv_in.weight.isnan().sum() == 1  # not asked to look
    with pytest.raises(CheckpointError, match="conv_in.weight holds NaN or infinity as torch.float32"):
        labkit.load(folder, "cpu", check=True)
    with pytest.raises(CheckpointError, match="conv_in.weight holds NaN or infinity as torch.float64"):
        load_pipeline(folder, dtype=torch.float64)
    change_weights(folder / UNET_FILE, lambda t: t["conv_in.weight"].view(-1)[3:4].fill_(1e5))
    load_pipeline(folder, check=True)
    with pytest.raises(CheckpointError, match="conv_in.weight holds NaN or infinity as torch.float16"):
        load_pipeline(folder, dtype=torch.float16)


# --- weights that are mapped, not copied ------------------------------------------------------------------------------------------


def kilobytes_read(path: Path) -> list[int]:
    """How much of each mapping of a file has been read, in kB (Linux)."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return [int(next(line for line in lines if line.startswith("Rss:")).split()[1]) for line in lines if line.endswith(f" {path}")]


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="Linux only")
def test_weights_are_not_read_before_they_are_used(folder, tmp_path):
    path, size = tmp_path / "w.safetensors", 8192  # kB
    save_file({"a": torch.ones(2**20), "b": torch.ones(2**20)}, path)
    tensors = read_safetensors(path)
    assert sum(kilobytes_read(path)) < 0.05 * size and kilobytes_read(path)
    tensors["a"].sum()
    assert 0.5 * size <= sum(kilobytes_read(path)) < 0.55 * size
    del tensors
    half = read_safetensors(path, dtype=torch.float16)
    assert half["a"].dtype == torch.float16 and kilobytes_read(path) == []  # converted, and the file closed
    tensors = read_safetensors(path, check=True)
    assert sum(kilobytes_read(path)) >= size and tensors["a"].sum() == 2**20
    parts = load_pipeline(folder)
    assert kilobytes_read(folder / UNET_FILE) and parts.unet.conv_in.weight.isfinite().all()


def test_what_is_trained_does_not_reach_the_file(tiny, folder):
    before, parts = (folder / UNET_FILE).read_bytes(), load_pipeline(folder)
    optimizer = torch.optim.SGD(parts.unet.parameters(), lr=1.0)
    parts.unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 48)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(parts.unet.conv_in.weight, tiny.unet.conv_in.weight)
    assert (folder / UNET_FILE).read_bytes() == before
    same_weights(load_pipeline(folder).unet, tiny.unet.state_dict())


@pytest.mark.skipif(os.name == "nt", reason="Windows does not let go of a mapped file")
def test_a_loaded_model_outlives_its_files(tiny, folder):
    first, second, third = (load_pipeline(folder) for _ in range(3))
    with torch.no_grad():
        first.unet.conv_in.weight.zero_()
    save_pipeline(first, folder, overwrite=True)  # over what it is mapped from, itself and the two others
    assert load_pipeline(folder).unet.conv_in.weight.eq(0).all() and first.unet.conv_in.weight.eq(0).all()
    same_weights(second.unet, tiny.unet.state_dict())
    write_safetensors({"a": torch.zeros(3)}, folder / UNET_FILE)  # a single file, as small as can be
    shutil.rmtree(folder)
    same_weights(third.unet, tiny.unet.state_dict())
    same_weights(third.vae, tiny.vae.state_dict())


def test_a_folder_that_cannot_be_replaced(tiny, folder, monkeypatch):
    """Windows keeps a mapped file where it is: nothing is lost, and the message says so."""
    rename, before = Path.rename, (folder / UNET_FILE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, to: (_ for _ in ()).throw(PermissionError(13, "Access is denied")) if self == folder else rename(self, to))
        with pytest.raises(CheckpointError, match=r"cannot be replaced \(Access is denied\); nothing was changed there.*choose another name"):
            save_pipeline(tiny, folder, overwrite=True)
    assert os.listdir(folder.parent) == [folder.name] and (folder / UNET_FILE).read_bytes() == before
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)  # set aside, but not to be removed
    with pytest.warns(UserWarning, match=r"is replaced, but .* delete .*\.old later"):
        save_pipeline(tiny, folder, overwrite=True)
    same_weights(load_pipeline(folder).unet, tiny.unet.state_dict())


@pytest.mark.parametrize("spaces", range(4))
def test_numbers_that_do_not_lie_at_multiples_of_their_size(spaces, tmp_path):
    save_file({"a": torch.arange(5.0), "n": torch.arange(3)}, tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    (tmp_path / "w.safetensors").write_bytes((n + spaces).to_bytes(8, "little") + data[8 : 8 + n] + b" " * spaces + data[8 + n :])
    read = read_safetensors(tmp_path / "w.safetensors")
    assert read["a"].tolist() == [0, 1, 2, 3, 4] and read["n"].tolist() == [0, 1, 2]
    assert all(t.data_ptr() % t.element_size() == 0 for t in read.values())


def test_loading_imports_neither_diffusers_nor_torchs_compiler(folder):
    code = f"import sys, labkit; labkit.load({str(folder)!r}, 'cpu'); print([m for m in ('diffusers', 'transformers', 'sympy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_original_one_file_layout_is_recognised(folder):
    path = folder / UNET_FILE
    save_file({f"model.diffusion_model.{n}": t for n, t in load_file(path).items()}, path)
    fails(folder, "original one-file layout")


def test_weights_of_another_architecture(folder):
    edit_json(folder / "unet" / "config.json", block_out_channels=[32, 96])
    fails(folder, UNET_FILE, "of another shape", "different models")


@pytest.mark.parametrize(
    "file, changes, says",
    [
        ("unet/config.json", {"class_embed_type": "timestep"}, ["class_embed_type", "'timestep'"]),
        ("unet/config.json", {"act_fn": "mish"}, ["act_fn", "'silu'"]),
        ("unet/config.json", {"from_the_future": 3}, ["from_the_future"]),
        ("unet/config.json", {"transformer_layers_per_block": [1, 2, 3]}, ["transformer_layers_per_block", "2 integers"]),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, ["UNet2DModel"]),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, ["AttnDownBlock2D"]),
        ("unet/config.json", {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, ["up_block_types", "mirror"]),
        ("unet/config.json", {"block_out_channels": [32, "64"]}, ["block_out_channels"]),
        ("unet/config.json", {"layers_per_block": 10**9}, ["layers_per_block"]),
        ("unet/config.json", {"norm_num_groups": 7}, ["unet", "no network can be built"]),
        ("unet/config.json", {"in_channels": 9}, ["conv_in.weight", "of another shape"]),
        ("vae/config.json", {"shift_factor": 0.1}, ["shift_factor"]),
        ("vae/config.json", {"use_quant_conv": False}, ["use_quant_conv"]),
        ("vae/config.json", {"scaling_factor": 0}, ["scaling_factor"]),
        ("vae/config.json", {"down_block_types": ["DownEncoderBlock2D"]}, ["down_block_types"]),
        ("text_encoder/config.json", {"model_type": "t5"}, ["t5", "clip_text_model"]),
        ("text_encoder/config.json", {"hidden_act": "relu"}, ["relu"]),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ("text_encoder/config.json", {"layer_norm_eps": 1e-3}, ["layer_norm_eps"]),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, ["beta_schedule", "sigmoid"]),
        ("scheduler/scheduler_config.json", {"thresholding": True}, ["thresholding"]),
        ("scheduler/scheduler_config.json", {"beta_start": "small"}, ["scheduler_config.json"]),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, ["StableDiffusion3Pipeline"]),
        ("model_index.json", {"vae": [None, None]}, ["names no vae"]),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, ["AutoencoderTiny"]),
        ("tokenizer/vocab.json", {"extra</w>": 5000}, ["tokenizer goes up to token 5000"]),
    ],
)
def test_configs_that_labkit_does_not_have(folder, file, changes, says):
    edit_json(folder / file, **changes)
    fails(folder, *says)


def test_parts_of_different_models(tiny, folder):
    other = replace(tiny, unet=randomised(UNet(replace(UNET, cross_attention_dim=40))))
    save_pipeline(other, folder.parent / "other")
    fails(folder.parent / "other", "40", "48", "different models")


@pytest.mark.parametrize("content", ["", "<html></html>", "{", "[1, 2]", "\ud800"])
def test_broken_json(folder, content):
    (folder / "unet" / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    fails(folder, str(folder / "unet" / "config.json"))


def test_a_shard_is_missing_or_lies_elsewhere(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    index = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    shards = sorted((tmp_path / "m" / "unet").glob("*-of-*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].unlink()
    fails(tmp_path / "m", shards[1].name, "no such file")
    shards[1].write_bytes(content)
    where = json.loads(index.read_text())["weight_map"]
    for evil in ("../../secret.safetensors", "/etc/passwd", "..\\x", 3):
        edit_json(index, weight_map={**where, "conv_in.weight": evil})
        fails(tmp_path / "m", "must name files of this folder")
    edit_json(index, weight_map={**where, "conv_in.weight": shards[-1].name})
    fails(tmp_path / "m", "lacks conv_in.weight")


# --- names and the hub --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tabletopp", "no/such/folder/anywhere", "./nothing", "data/nothing", "", "  ", None, 7, "C:\\models\\x", "x" * 5000])
def test_unknown_names_list_what_is_possible(name, monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="Possible are 'tabletop'"):
        resolve(name)


def test_folders_with_spaces_and_accents(saved, tmp_path):
    where = Path(shutil.copytree(saved, tmp_path / "mein Modell é 模型"))
    assert resolve(str(where)) == where and load_pipeline(str(where)).name == "tiny"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_into_cache(cache: Path, folder: Path, repo: str) -> Path:
    base = cache / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("a" * 40)
    return Path(shutil.copytree(folder, base / "snapshots" / ("a" * 40)))


def test_a_hub_id_in_the_cache_needs_no_network(cache, saved, monkeypatch):
    where = put_into_cache(cache, saved, "org/tiny")
    (where / "labkit.json").unlink()
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("asked the network"))
    assert resolve("org/tiny") == where
    assert load_pipeline("org/tiny").name == "org/tiny"


def test_a_hub_id_that_is_not_cached_is_refused_at_once_offline(cache, saved):
    for repo in ("org/nothing", "org/half"):
        if repo == "org/half":  # an interrupted download
            (put_into_cache(cache, saved, repo) / UNET_FILE).unlink()
        with pytest.raises(CheckpointError) as caught:
            resolve(repo)
        message = str(caught.value)
        assert "HF_HUB_OFFLINE is set" in message and f"hf download {repo}" in message and "tabletop" in message and "\n" not in message


def test_no_network_is_found_out_without_the_hubs_retries(cache, monkeypatch):
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def no_route(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", no_route)
    with pytest.raises(CheckpointError, match="there is no connection to"):
        resolve("org/nothing")


def test_only_what_is_needed_is_fetched(cache, saved, monkeypatch):
    import huggingface_hub

    asked = {}
    files = [p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()]
    files += ["v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors"]
    files += ["unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors"]

    def download(repo, allow_patterns, local_files_only=False):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no")
        asked[repo] = [f for f in files if any(Path(f).match(p) if "*" in p else f == p for p in allow_patterns)]
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: files)
    monkeypatch.setattr(sources, "_no_network", lambda hub: None)
    assert resolve("org/full") == saved and load_pipeline("org/full").name == "tiny"
    assert sorted(f for f in asked["org/full"] if f.endswith(".safetensors")) == [
        "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert {"model_index.json", "labkit.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"} <= set(asked["org/full"])
    resolve("org/half", torch.float16)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in asked["org/half"] and UNET_FILE not in asked["org/half"]
    files[:] = [f for f in files if not f.startswith("unet/") or f.endswith(".bin")]
    with pytest.raises(CheckpointError, match="can run code"):
        resolve("org/old")


# --- checksums ----------------------------------------------------------------------------------------------------------------


def test_sums(folder):
    sums = write_sums(folder.parent)
    assert "  tiny/unet/diffusion_pytorch_model.safetensors\n" in sums.read_text()
    verify_sums(folder)
    path = folder / UNET_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    load_pipeline(folder)  # nobody can see it ...
    with pytest.raises(CheckpointError, match="diffusion_pytorch_model.safetensors: its SHA-256 is .* was changed"):
        verify_sums(folder)  # ... but here
    path.unlink()
    with pytest.raises(CheckpointError, match="listed in SHA256SUMS but missing"):
        verify_sums(folder)
    sums.write_text("")
    with pytest.raises(CheckpointError, match="lists no file of tiny"):
        verify_sums(folder)
    sums.unlink()
    with pytest.raises(CheckpointError, match="SHA256SUMS is missing"):
        verify_sums(folder)


def test_the_shipped_model_is_checked_when_it_is_opened(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "tabletop")
    monkeypatch.setattr(sources, "DATA", tmp_path)
    monkeypatch.setattr(checkpoint, "DATA", tmp_path)
    fails("tabletop", "SHA256SUMS")
    write_sums(tmp_path)
    assert load_pipeline("tabletop").name == "tiny"
    with open(tmp_path / "tabletop" / UNET_FILE, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    fails("tabletop", "was changed")
    fails(tmp_path / "tabletop", "was changed")
    shutil.rmtree(tmp_path / "tabletop")
    fails("tabletop", "the shipped model is not there")


# --- nothing half-written -----------------------------------------------------------------------------------------------------


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_that_exists_is_replaced_only_when_asked_for(tiny, tmp_path):
    where = save_pipeline(tiny, tmp_path / "m")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save_pipeline(tiny, where)
    save_pipeline(replace(tiny, name="second"), where, overwrite=True)
    assert load_pipeline(where).name == "second" and listing(tmp_path) == ["m"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a model"):
        save_pipeline(tiny, tmp_path / "photos", overwrite=True)
    assert listing(tmp_path / "photos") == ["holiday.jpg"]
    (tmp_path / "empty").mkdir()
    save_pipeline(tiny, tmp_path / "empty")
    assert load_pipeline(tmp_path / "empty").name == "tiny"


def test_a_disk_that_fills_up_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    save_pipeline(tiny, tmp_path / "m")
    real, calls = checkpoint.write_safetensors, []

    def full(tensors, path, dtype):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(tensors, path, dtype)

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    for where, overwrite in (("new", False), ("m", True)):
        calls.clear()
        with pytest.raises(CheckpointError, match="No space left on device.*nothing was changed"):
            save_pipeline(replace(tiny, name="other"), tmp_path / where, overwrite=overwrite)
    assert listing(tmp_path) == ["m"] and load_pipeline(tmp_path / "m").name == "tiny"


def test_an_interrupt_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pipeline(tiny, tmp_path / "m")
    assert listing(tmp_path) == []


def test_a_renaming_that_fails_puts_the_old_one_back(tiny, tmp_path, monkeypatch):
    where, rename = save_pipeline(tiny, tmp_path / "m"), Path.rename

    def refuse(self, target):
        if self.name.endswith(".unfinished"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save_pipeline(replace(tiny, name="other"), where, overwrite=True)
    assert listing(tmp_path) == ["m"] and load_pipeline(where).name == "tiny"


def test_places_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        save_pipeline(tiny, tmp_path / "file")
    with pytest.raises(CheckpointError, match="not a model"):
        save_pipeline(tiny, tmp_path / "file", overwrite=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_pipeline(tiny, tmp_path / "file" / "m")
    if hasattr(os, "geteuid") and os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_pipeline(tiny, tmp_path / "locked" / "m")
        assert listing(tmp_path / "locked") == []
