"""Conversion: the same weights on the other side, all of them or nothing, and no code of a pickle is run."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import originals as o
import pytest
import torch
from labkit import __main__ as cli
from labkit import checkpoint
from labkit.convert import convert_checkpoint, read_pickle
from labkit.errors import CheckpointError
from safetensors.torch import load_file, save_file
from test_single_file import assert_draws_the_same, assert_same, networks, save, sd1, sd2, words  # noqa: F401

import labkit

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def ckpt(sd1, tmp_path_factory):  # noqa: F811
    """As it was published in 2022: weights, their average, counters."""
    path = tmp_path_factory.mktemp("ckpt") / "sd-v1-4 é.ckpt"
    torch.save({"state_dict": sd1[1] | o.ema_original(sd1[1]), "global_step": 470000, "epoch": 6}, path)
    return path


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_a_folder_that_diffusers_and_labkit_open(sd1, words, ckpt, tmp_path, kind):  # noqa: F811
    source = ckpt if kind == "ckpt" else save(sd1[1], tmp_path / "m.safetensors")
    folder = convert_checkpoint(source, tmp_path / "models" / "sd", tokenizer=words)
    assert_draws_the_same(checkpoint.load_pipeline(folder), sd1[0])
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    for part, network in zip(("unet", "vae", "text_encoder"), sd1[0]):
        assert_same(getattr(theirs, part).state_dict(), network.state_dict())
    assert theirs.vae.config.scaling_factor == 0.18215 and theirs.scheduler.config.beta_end == 0.012 and theirs.scheduler.config.steps_offset == 1
    assert theirs.tokenizer("a red ball").input_ids == list(checkpoint.load_pipeline(folder).tokenizer.encode("a red ball").ids)
    assert theirs.unet.config.attention_head_dim == 8 and listing(folder.parent) == ["sd"]


def test_stable_diffusion_2_as_a_folder(sd2, words, tmp_path):  # noqa: F811
    folder = convert_checkpoint(save(sd2[1], tmp_path / "m.safetensors"), tmp_path / "sd2", tokenizer=words)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    for part, network in zip(("unet", "vae", "text_encoder"), sd2[0]):
        assert_same(getattr(theirs, part).state_dict(), network.state_dict())
    assert theirs.scheduler.config.prediction_type == "v_prediction" and theirs.tokenizer.pad_token == "!"
    assert_draws_the_same(checkpoint.load_pipeline(folder), sd2[0])


@pytest.mark.parametrize("family", ["SDXL", "the SDXL refiner"])
def test_sdxl_from_one_file_draws_the_picture_of_diffusers(words, tmp_path, family):  # noqa: F811
    """labkit from the file, diffusers from the folder it is converted to; both text encoders, pooled text and sizes."""
    base = family == "SDXL"
    narrow = {"block_out_channels": [32, 64, 64], "attention_head_dim": [1, 1, 1], "transformer_layers_per_block": [1, 1, 2], "layers_per_block": 1,
              "cross_attention_dim": 128 if base else 64, "projection_class_embeddings_input_dim": 64 + (6 if base else 5) * 256, "sample_size": 8}  # fmt: skip
    unet, vae, second = networks({**o.SDXL_UNET, **narrow}, {**o.SMALL_CLIP, "hidden_act": "gelu", "projection_dim": 64, "eos_token_id": 49407}, projected=True)
    texts = {"conditioner.embedders.1.model." if base else "conditioner.embedders.0.model.": second}
    original = o.unet_original(unet.state_dict(), unet.config) | o.vae_original(vae.state_dict(), 2) | {"denoiser.sigmas": torch.ones(1000)}
    original |= o.openclip_original(second.state_dict(), *texts)
    if base:
        first = o.randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**o.SMALL_CLIP)), 7)
        original |= o.clip_original(first.state_dict(), "conditioner.embedders.0.transformer.")
    path = save(original, tmp_path / "sd_xl.safetensors")
    folder = convert_checkpoint(path, tmp_path / "sdxl", tokenizer=words)
    theirs = (diffusers.StableDiffusionXLPipeline if base else diffusers.StableDiffusionXLImg2ImgPipeline).from_pretrained(folder)
    assert_same(theirs.unet.state_dict(), unet.state_dict())
    assert_same(theirs.text_encoder_2.state_dict(), second.state_dict())
    assert theirs.vae.config.scaling_factor == 0.13025 and theirs.vae.config.force_upcast and theirs.tokenizer_2.pad_token == "!"
    for opened in (checkpoint.load_pipeline(path, tokenizer=words), checkpoint.load_pipeline(folder)):
        assert_same(opened.unet.state_dict(), unet.state_dict())
        assert_same((opened.text_encoder_2 if base else opened.text_encoder).state_dict(), second.state_dict())
    if not base:
        assert theirs.text_encoder is None and theirs.config.requires_aesthetics_score
        return
    assert theirs.config.force_zeros_for_empty_prompt
    lab = labkit.load(path, "cpu", tokenizer=words)
    ours = lab.generate("a red ball", steps=3, guidance=5.0, height=64, width=64, progress=False).latents
    theirs.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=3, guidance_scale=5.0, height=64, width=64, output_type="latent", generator=torch.Generator().manual_seed(0))
    theirs.vae_scale_factor = lab.vae.config.factor
    torch.testing.assert_close(ours, theirs("a red ball", **call).images, rtol=1e-3, atol=1e-3)


def test_a_pickle_as_one_safetensors_file(sd1, ckpt, words, tmp_path):  # noqa: F811
    path = convert_checkpoint(ckpt, tmp_path / "m.safetensors")
    found = load_file(path)
    expected = torch.load(ckpt, weights_only=True)["state_dict"]
    assert found.keys() - {"global_step"} == expected.keys() and int(found["global_step"]) == 470000
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    assert_draws_the_same(checkpoint.load_pipeline(path, tokenizer=words), sd1[0])
    assert listing(tmp_path) == ["m.safetensors"]


def test_the_average_and_half_precision(sd1, ckpt, tmp_path):  # noqa: F811
    found = load_file(convert_checkpoint(ckpt, tmp_path / "ema.safetensors", ema=True, dtype=torch.float16))
    name = "model.diffusion_model.out.2.bias"
    assert torch.equal(found[name], (sd1[1][name] + 1).half()) and not any(n.startswith("model_ema") for n in found)
    assert found["cond_stage_model.transformer.text_model.embeddings.position_ids"].dtype == torch.int64 and found["global_step"].dtype == torch.int64


def test_what_the_average_of_a_file_without_one_says(sd1, tmp_path):  # noqa: F811
    with pytest.raises(CheckpointError, match="no moving average"):
        convert_checkpoint(save(sd1[1], tmp_path / "m.safetensors"), tmp_path / "ema.safetensors", ema=True)
    assert listing(tmp_path) == ["m.safetensors"]


def test_the_old_format_of_torch(sd1, tmp_path):  # noqa: F811
    torch.save(sd1[1], tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == sd1[1].keys()


def test_weights_that_share_memory_are_written_apart(tmp_path):
    t = torch.randn(3, 4)
    torch.save({"a": t, "b": t, "c": t.T, "d": t[1]}, tmp_path / "m.ckpt")
    found = load_file(convert_checkpoint(tmp_path / "m.ckpt", tmp_path / "m.safetensors"))
    assert torch.equal(found["b"], t) and torch.equal(found["c"], t.T) and torch.equal(found["d"], t[1])


# --- what is there ------------------------------------------------------------------------------------------------------------


def test_nothing_is_replaced_unless_asked_for(ckpt, words, tmp_path):  # noqa: F811
    target = tmp_path / "m.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert_checkpoint(ckpt, target)
    assert target.read_bytes() == b"mine"
    assert len(load_file(convert_checkpoint(ckpt, target, overwrite=True))) > 100
    folder = convert_checkpoint(ckpt, tmp_path / "sd", tokenizer=words)
    with pytest.raises(CheckpointError, match="exists already"):
        convert_checkpoint(ckpt, folder, tokenizer=words)
    convert_checkpoint(ckpt, folder, tokenizer=words, overwrite=True, ema=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.jpg").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a model"):
        convert_checkpoint(ckpt, tmp_path / "photos", tokenizer=words, overwrite=True)
    with pytest.raises(CheckpointError, match="is a folder"):
        (tmp_path / "d.safetensors").mkdir()
        convert_checkpoint(ckpt, tmp_path / "d.safetensors", overwrite=True)
    with pytest.raises(CheckpointError, match="writes no pickles"):
        convert_checkpoint(ckpt, tmp_path / "again.ckpt")
    assert listing(tmp_path) == ["d.safetensors", "m.safetensors", "photos", "sd"]


def test_a_file_converted_onto_itself_is_complete(sd1, tmp_path):  # noqa: F811
    path = save(sd1[1], tmp_path / "m.safetensors")
    convert_checkpoint(path, path, dtype=torch.float16, overwrite=True)
    assert {t.dtype for n, t in load_file(path).items() if "position_ids" not in n} == {torch.float16} and listing(tmp_path) == ["m.safetensors"]


def test_without_a_tokenizer_nothing_is_written(ckpt, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)
    with pytest.raises(CheckpointError, match="tokenizer=FOLDER"):
        convert_checkpoint(ckpt, tmp_path / "a" / "b" / "sd")
    assert listing(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
def test_a_disk_that_fills_up(ckpt, words, tmp_path):  # noqa: F811
    """A real failure of the kernel: no file of this process may grow beyond 100 kB."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for target in ("m.safetensors", "deep/er/sd"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(CheckpointError, match="cannot be written.*nothing was changed") as caught:
                convert_checkpoint(ckpt, tmp_path / target, tokenizer=words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value) and listing(tmp_path) == []


# --- pickles --------------------------------------------------------------------------------------------------------------------


class Evil:
    """What a pickle can do on opening: here, make a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def zipped(program: bytes, compress=zipfile.ZIP_STORED, more: dict | None = None) -> bytes:
    """An archive as torch writes it, with a program of our own."""
    with zipfile.ZipFile(out := io.BytesIO(), "w", compress) as archive:
        for name, content in {"data.pkl": program, "version": b"3\n", "byteorder": b"little", **(more or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def test_the_pickle_of_these_tests_is_dangerous_in_other_hands(tmp_path):
    pickle.loads(pickle.dumps({"state_dict": {"x": Evil(tmp_path / "marker")}}, protocol=2))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("form", ["zip", "plain", "torch", "old torch"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, form):
    marker, path = tmp_path / "marker", tmp_path / "evil.ckpt"
    content = {"state_dict": {"model.diffusion_model.x": torch.zeros(2), "y": Evil(marker)}}
    if form in ("zip", "plain"):
        program = pickle.dumps({"state_dict": {"y": Evil(marker)}}, protocol=2)
        path.write_bytes(zipped(program) if form == "zip" else program)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    for target in ("out.safetensors", "out"):
        with pytest.raises(CheckpointError) as caught:
            convert_checkpoint(path, tmp_path / target)
        message = str(caught.value)
        assert not marker.exists() and str(path) in message and "\n" not in message and "weights_only" not in message, message
        assert ("posix.mkdir" in message or "nt.mkdir" in message or "nothing of it was run" in message) and "safetensors" in message, message
    assert listing(tmp_path) == ["evil.ckpt"]
    with pytest.raises(CheckpointError, match="labkit convert"):
        checkpoint.load_pipeline(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "empty"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"<html>", "web page"),
        (bytes(100), "not a torch checkpoint"),
        (b"PK\x03\x04" + bytes(100), "not all of it is there"),
        (zipped(b"\x80\x02}.")[:-30], "not all of it is there"),
        (zipped(b"\x80\x02}.", zipfile.ZIP_DEFLATED, {"data/0": bytes(10**7)}), "packed archive"),
        (zipped(b"\x80\x02}."), "no table of weights"),
        (zipped(b"\x80\x02K\x01."), "no table of weights"),
        (zipped(b"\x80\x02"), "damaged, or holds more than weights"),
        (zipped(b"\x80\x02" + b"(" * 10**5 + b"."), "damaged, or holds more than weights"),
        (zipped(b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x00x\x85R."), "asks for numpy.load"),
        (zipped(b"\x80\x02}.").replace(b"data.pkl", b"dada.pkl"), "not of torch's kind"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, says):
    (tmp_path / "m.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(tmp_path / "m.ckpt", tmp_path / "out.safetensors")
    assert says in str(caught.value) and "m.ckpt" in str(caught.value) and listing(tmp_path) == ["m.ckpt"], str(caught.value)


@pytest.mark.parametrize("tensor", [torch.zeros(1).expand(10**6, 10**6), torch.eye(3).to_sparse()])
def test_tensors_that_are_not_what_they_seem(tmp_path, tensor):
    torch.save({"x": tensor}, tmp_path / "m.ckpt")  # the first: four terabytes made of one number
    with pytest.raises(CheckpointError, match="x is no plain tensor|holds more than weights|asks for"):
        convert_checkpoint(tmp_path / "m.ckpt", tmp_path / "out.safetensors")
    assert listing(tmp_path) == ["m.ckpt"]


def test_a_checkpoint_of_lightning_that_names_a_class(tmp_path):
    """sd-v1-4-full-ema.ckpt has a callback's class among its keys; it is read without that class being there."""
    program = (
        b"\x80\x02}(X\x0b\x00\x00\x00global_stepK\x05X\x09\x00\x00\x00callbacks}cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
        b"}sX\x0a\x00\x00\x00state_dict}u."
    )
    (tmp_path / "m.ckpt").write_bytes(zipped(program))
    with pytest.raises(CheckpointError, match="no table of weights"):  # got as far as that
        read_pickle(tmp_path / "m.ckpt")
    (tmp_path / "m.ckpt").write_bytes(zipped(program.replace(b"ModelCheckpoint", b"Anything")))
    with pytest.raises(CheckpointError, match="asks for pytorch_lightning.callbacks.model_checkpoint.Anything"):
        read_pickle(tmp_path / "m.ckpt")


def test_weights_that_are_no_numbers(sd1, tmp_path):  # noqa: F811
    torch.save({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match="a holds NaN or infinity"):
        convert_checkpoint(tmp_path / "m.ckpt", tmp_path / "out.safetensors")
    save_file({"a": torch.tensor([float("inf")])}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="a holds NaN or infinity"):
        convert_checkpoint(tmp_path / "m.safetensors", tmp_path / "out.safetensors")
    assert listing(tmp_path) == ["m.ckpt", "m.safetensors"]


# --- the command ----------------------------------------------------------------------------------------------------------------


def test_the_command(ckpt, words, tmp_path, capsys):  # noqa: F811
    assert cli.main(["convert", str(ckpt), str(tmp_path / "sd"), "--tokenizer", str(words), "--ema", "--half", "--predicts", "v_prediction"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'sd'} is complete\n"
    parts = checkpoint.load_pipeline(tmp_path / "sd", dtype=None)
    assert parts.unet.conv_in.weight.dtype == torch.float16 and parts.schedule_config.prediction_type == "v_prediction"
    for wrong in ([str(ckpt)], [str(ckpt), str(tmp_path / "sd")], ["nothing.ckpt", "x"], ["nothing.safetensors", "x"], ["nothing", "x"]):
        assert cli.main(["convert", *wrong]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("labkit: ") and err.count("\n") == 1, err
