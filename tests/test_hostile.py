"""Broken and hostile files: each is named, in one line that says what it is and what to do; nothing is half-loaded, run, or waited for.

Every case is a whole model in which one thing is wrong. Pickles and what converts them are in test_convert.py, files that are a whole
but another model in test_single_file.py.
"""

import errno
import json
import os
import shutil
import signal
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from labkit import checkpoint
from labkit.checkpoint import load_pipeline, save_pipeline
from labkit.errors import CheckpointError
from labkit.models import files
from labkit.models.header import LIMIT, disguise, read_header
from safetensors.torch import load_file, save_file
from tiny import build

import labkit

UNET = "unet/diffusion_pytorch_model.safetensors"
NAME = "conv_in.bias"
posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_pipeline(build(), tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture(autouse=True)
def in_time():
    """Nothing here may take long or wait for anybody: after a minute, it has failed."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_):
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(name, *says, **options) -> str:
    """The message with which a model is refused: one printable line, no advice to run code, and no file is opened that was not before."""
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(name, **options)
    message = str(caught.value)
    caught.value.__traceback__ = None
    assert message.isprintable() and len(message) < 1300 and "weights_only" not in message and "Traceback" not in message, message
    assert all(part in message for part in says), message
    assert len(os.listdir("/proc/self/fd") if before else []) <= len(before)
    return message


def sealed(header: bytes, numbers: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + numbers


def table(**entries) -> bytes:
    return json.dumps(entries).encode()


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# --- what is under a weights' name -----------------------------------------------------------------------------------------------

CONTENTS = {
    "empty": (b"", "it is empty"),
    "seven bytes": (b"1234567", "7 bytes that are not a safetensors file"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3438167534\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "error in XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    "error in JSON": (b'{"error": "Repository not found"}', "not a safetensors file"),
    "pickle": (b"\x80\x02}q\x00." + bytes(99), "pickle"),
    "zip, as torch's pickles": (b"PK\x03\x04" + bytes(99), "zip archive"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(99), "GGUF"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "gzip"),
    "7z": (b"7z\xbc\xaf'\x1c" + bytes(99), "7z"),
    "zeros": (bytes(1000), "not JSON"),
    "header of 2^40 bytes": (struct.pack("<Q", 2**40) + b"{" + bytes(99), "not a safetensors file"),
    "header of 2^64 - 1 bytes": (b"\xff" * 8 + b"{}" + bytes(99), "not a safetensors file"),
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", "the beginning of one"),
    "header not UTF-8": (sealed(b'{"\xff\xfe": 1}'), "not JSON"),
    "header not JSON": (sealed(b"{nothing}"), "not JSON"),
    "header with a byte-order mark": (sealed(b"\xef\xbb\xbf{}"), "not JSON"),
    "header nested without end": (sealed(b'{"a":' * 10**5 + b"1" + b"}" * 10**5), "not JSON"),
    "header with a number of 10^5 digits": (sealed(b'{"a": ' + b"9" * 10**5 + b"}"), "not JSON"),
    "header a list": (sealed(b"[1, 2]"), "is a list"),
    "header a number": (sealed(b"12"), "is a int"),
    "header empty": (sealed(b"{}"), "missing"),
    "metadata a text": (sealed(b'{"__metadata__": "x"}'), "__metadata__"),
    "entry a number": (sealed(table(a=1)), "what its header says of a"),
    "no shape": (sealed(table(a={"dtype": "F32", "data_offsets": [0, 8]}), bytes(8)), "what its header says of a"),
    "negative shape": (sealed(table(a=entry(shape=(-2,))), bytes(8)), "what its header says of a"),
    "broken shape": (sealed(table(a=entry(shape=(2.0,))), bytes(8)), "what its header says of a"),
    "a shape of truth": (sealed(table(a=entry(shape=(True,), offsets=(0, 4))), bytes(4)), "what its header says of a"),
    "shape of many axes": (sealed(table(a=entry(shape=(1,) * 99, offsets=(0, 4))), bytes(4)), "what its header says of a"),
    "shape that overflows": (sealed(table(a=entry(shape=(2**62, 4), offsets=(0, 0)))), "takes"),
    "shape that overflows to nothing": (sealed(table(a=entry(shape=(2**33, 2**31), offsets=(0, 0)))), "takes"),
    "shape larger than its bytes": (sealed(table(a=entry(shape=(3,))), bytes(8)), "takes 12 bytes, its header gives it 8"),
    "terabytes": (sealed(table(a=entry(shape=(2**38,), offsets=(0, 2**40)))), "not all of it is there"),
    "offsets backwards": (sealed(table(a=entry(shape=(0,), offsets=(8, 0))), bytes(8)), "its header gives it -8"),
    "offsets overlapping": (sealed(table(a=entry(), b=entry(offsets=(4, 12))), bytes(12)), "b overlaps the tensor before it"),
    "offsets the same": (sealed(table(a=entry(), b=entry()), bytes(8)), "overlaps"),
    "a gap": (sealed(table(a=entry(), b=entry(offsets=(12, 20))), bytes(20)), "b leaves a gap before it"),
    "a gap in front": (sealed(table(a=entry(offsets=(4, 12))), bytes(12)), "leaves a gap"),
    "bytes behind": (sealed(table(a=entry()), bytes(9)), "1 bytes lie behind its last tensor"),
    "bytes lacking": (sealed(table(a=entry()), bytes(7)), "not all of it is there, 8 bytes of weights are expected, 7 found"),
    "unknown type": (sealed(table(a=entry("F4", (2,), (0, 1))), bytes(1)), "a is of type F4"),
    "type a list": (sealed(table(a=entry(["F32"])), bytes(8)), "is of type"),
    "the same name twice": (sealed(b'{"a": %b, "a": %b}' % (json.dumps(entry()).encode(), json.dumps(entry()).encode()), bytes(8)), "a is in its header twice"),
    "dtype twice": (sealed(b'{"a": {"dtype": "F32", "dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}', bytes(8)), "dtype is in its header twice"),
    "a name that writes to the terminal": (sealed(table(**{"\x1b[31mred\n\u202e": entry()}), bytes(8)), r"\x1b[31mred\n\u202e"),
    "a name of a megabyte": (sealed(table(**{"x" * 10**6: entry()}), bytes(8)), "xxx"),
}


@pytest.mark.parametrize("content, says", CONTENTS.values(), ids=CONTENTS)
def test_what_lies_under_a_weights_name(folder, content, says):
    (folder / UNET).write_bytes(content)
    refused(folder, str(folder / UNET), says)


@pytest.mark.parametrize("content, says", CONTENTS.values(), ids=CONTENTS)
def test_what_lies_under_the_name_of_a_one_file_checkpoint(tmp_path, content, says):
    (tmp_path / "m.safetensors").write_bytes(content)
    refused(tmp_path / "m.safetensors", str(tmp_path / "m.safetensors"), "holds no U-Net" if says == "missing" else says)


def test_a_header_that_is_all_of_a_large_file(tmp_path):
    with open(tmp_path / "m.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2**33) + b"{")
        file.truncate(2**33 + 8)  # sparse: takes no room on the disk, and must take none in memory
    refused(tmp_path / "m.safetensors", f"more than {LIMIT}")


def test_a_header_of_640_bytes_is_no_pickle(tmp_path):
    """Its length in little endian is 80 02, with which pickles begin."""
    header = table(a=entry())
    (tmp_path / "m.safetensors").write_bytes(sealed(header + b" " * (640 - len(header)), bytes(8)))
    assert list(read_header(tmp_path / "m.safetensors")) == ["a"] and disguise(b"\x80\x02}q\x00.aaa") is not None


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_other_types(folder, dtype):
    save_file(load_file(folder / UNET) | {NAME: torch.ones(32).to(dtype)}, folder / UNET)
    refused(folder, str(folder / UNET), NAME, str(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_none(folder, value, dtype):
    tensors = load_file(folder / UNET)
    tensors[NAME] = tensors[NAME].to(dtype)
    tensors[NAME][3] = value
    save_file(tensors, folder / UNET)
    refused(folder, str(folder / UNET), f"{NAME} holds NaN or infinity", check=True)
    if dtype == torch.float32:  # nothing to convert, so nothing is read
        assert not load_pipeline(folder).unet.conv_in.bias.isfinite().all()
        refused(folder, f"{NAME} holds NaN or infinity as torch.bfloat16", dtype=torch.bfloat16)
    else:
        refused(folder, str(folder / UNET), f"{NAME} holds NaN or infinity as torch.float32")
    if dtype == torch.float16:
        assert not load_pipeline(folder, dtype=None).unet.conv_in.bias.isfinite().all()


@posix
def test_a_pipe_is_not_waited_for(folder, tmp_path):
    for path in (folder / UNET, folder / "unet/config.json", folder / "tokenizer/vocab.json", tmp_path / "one.safetensors"):
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        refused(path if path.name == "one.safetensors" else folder, str(path), "is a pipe")
        path.unlink()
        if kept:
            path.write_bytes(kept)
    load_pipeline(folder)


@posix
def test_a_device_is_not_read_without_end(folder):
    (folder / "unet/config.json").unlink()
    (folder / "unet/config.json").symlink_to("/dev/zero")
    refused(folder, "unet/config.json", "/dev/zero")


@pytest.mark.parametrize("name", [UNET, "unet/config.json", "model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"])
def test_a_folder_under_a_files_name(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, str(folder / name), "is a folder")


def test_a_folder_called_like_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path / "model.safetensors", "no model_index.json")
    (tmp_path / "model.txt").write_text("x")
    refused(tmp_path / "model.txt", "is no model", ".safetensors")


# --- the wrong weights ------------------------------------------------------------------------------------------------------------


def test_weights_of_another_model_are_refused_before_they_are_read(folder, monkeypatch):
    """Ten gigabytes of SDXL under the config of SD 1.5 are not read only to be refused; here, they would be terabytes."""
    monkeypatch.setattr(files, "safe_open", lambda *a, **k: pytest.fail("weights were read"))
    tensors = {n: t for n, t in load_file(folder / UNET).items() if n != NAME}
    start, entries = 0, {}
    for name, tensor in (tensors | {NAME: torch.empty(2**39, device="meta"), "add_embedding.linear_1.weight": torch.empty(1280, 2816, device="meta")}).items():
        entries[name] = entry("F32", tensor.shape, (start, start := start + tensor.numel() * 4))
    with open(folder / UNET, "wb") as file:
        file.write(sealed(table(**entries)))
        file.truncate(file.tell() + start)
    refused(folder, str(folder / UNET), "1 unknown (add_embedding.linear_1.weight)", f"{NAME}: expected (32,), found ({2**39},)", "different models")


@pytest.mark.parametrize("part, name", [("unet", "conv_in.weight"), ("vae", "quant_conv.bias"), ("text_encoder", "text_model.final_layer_norm.weight")])
@pytest.mark.parametrize("how", ["missing", "unknown", "of another shape"])
def test_weights_that_do_not_fit(folder, part, name, how):
    path = next((folder / part).glob("*.safetensors"))
    tensors = load_file(path)
    if how == "unknown":
        tensors["another.weight"] = torch.zeros(1)
    elif how == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(5)
    save_file(tensors, path)
    refused(folder, str(path), f"1 {how}", "another.weight" if how == "unknown" else name.removeprefix("text_model."))


def test_a_million_names_are_not_all_listed(folder):
    save_file(load_file(folder / UNET) | {f"extra.{i}": torch.zeros(0) for i in range(5000)}, folder / UNET)
    assert refused(folder, "5000 unknown").count("extra.") == 3


# --- shards -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(folder):
    """The U-Net in two files and an index; returns a function that edits the index."""
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    where, names = {}, sorted(tensors)
    for i, some in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n] for n in some}, folder / "unet" / file)
        where |= dict.fromkeys(some, file)

    def index(weight_map=where, **changes):
        path = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": {**weight_map, **changes} if isinstance(weight_map, dict) else weight_map}))

    index()
    return index


def test_whole_shards_open(folder, shards):
    load_pipeline(folder)


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "../../../etc/passwd", "/etc/passwd", "/dev/zero", "..\\x.safetensors", "C:\\x.safetensors", "a\0b.safetensors", "", ".", "..",
     "a\nb.safetensors", "sub/x.safetensors", "weights.bin", 7, None, ["x"], {"a": 1}, "file:///etc/passwd"],
)  # fmt: skip
def test_shards_that_are_no_files_of_the_folder(folder, shards, file):
    shards(**{NAME: file})
    refused(folder, "diffusion_pytorch_model.safetensors.index.json", "must name files of this folder")


@pytest.mark.parametrize("weight_map", [[], "x", 3, None, {}])
def test_an_index_that_is_none(folder, shards, weight_map):
    shards(weight_map)
    refused(folder, "diffusion_pytorch_model.safetensors.index.json", "missing" if weight_map == {} else "must name files")


def test_a_shard_that_is_missing_or_lacks_what_it_should_hold(folder, shards):
    shards(**{NAME: "diffusion_pytorch_model-00003-of-00002.safetensors"})
    refused(folder, "diffusion_pytorch_model-00003-of-00002.safetensors", "there is no such file")
    shards(**{NAME: "x" * 300 + ".safetensors"})
    refused(folder, "cannot be read", "too long")
    shards(**{"not.there": "diffusion_pytorch_model-00001-of-00002.safetensors"})
    refused(folder, "00001-of-00002", "lacks not.there")
    shards()
    first, second = sorted((folder / "unet").glob("*-of-*.safetensors"))
    save_file(load_file(second) | {NAME: torch.zeros(32)}, second)
    save_file(load_file(first) | {NAME: torch.zeros(32)}, first)
    refused(folder, "00002-of-00002", NAME, "another shard holds too")


def test_a_shard_that_is_cut(folder, shards):
    path = sorted((folder / "unet").glob("*-of-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, str(path), "not all of it is there")


# --- links ----------------------------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("name", [UNET, "unet/config.json", "model_index.json", "labkit.json", "tokenizer/merges.txt", "unet", "tokenizer"])
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(folder, str(folder / name), "is a link out of the model's folder", "put the file itself there")


@posix
def test_links_that_are_followed(folder, tmp_path):
    (folder / "unet" / "real.data").write_bytes((folder / UNET).read_bytes())
    (folder / UNET).unlink()
    (folder / UNET).symlink_to("real.data")  # inside
    (tmp_path / "mine").symlink_to(folder)  # what the user named
    load_pipeline(tmp_path / "mine")
    cache = tmp_path / "hub" / "models--org--tiny"  # the hub cache: every file is a link into blobs/
    shutil.copytree(folder, cache / "snapshots" / "abc", symlinks=False)
    (cache / "blobs").mkdir()
    for i, path in enumerate(sorted(p for p in (cache / "snapshots" / "abc").rglob("*") if p.is_file())):
        path.rename(cache / "blobs" / f"{i:040}")
        path.symlink_to(os.path.relpath(cache / "blobs" / f"{i:040}", path.parent))
    load_pipeline(cache / "snapshots" / "abc")
    config = cache / "snapshots" / "abc" / "unet" / "config.json"
    config.unlink()
    config.symlink_to(folder / "unet" / "config.json")  # another model's
    refused(cache / "snapshots" / "abc", "is a link out of the model's folder")
    config.unlink()
    config.symlink_to("../../../blobs/gone")
    refused(cache / "snapshots" / "abc", "a link to a file that is gone")


@posix
def test_links_in_a_circle(folder):
    (folder / UNET).unlink()
    (folder / UNET).symlink_to(Path(UNET).name)
    refused(folder, UNET, "cannot be read")
    (folder.parent / "loop").symlink_to("loop")
    refused(folder.parent / "loop", "No model called")


# --- configurations -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["unet/config.json", "model_index.json", "scheduler/scheduler_config.json", "labkit.json", "tokenizer/vocab.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"null", b"3", b'"x"', b"\xff\xfe{}", b"\x00" * 50, b"<html>", b'{"a":' * 10**5, b'{"in_channels": ' + b"9" * 10**5 + b"}"],
    ids=["empty", "cut", "list", "null", "number", "text", "not UTF-8", "zeros", "web page", "nested", "a number of 10^5 digits"],
)
def test_json_that_is_none(folder, file, content):
    (folder / file).write_bytes(content)
    refused(folder, str(folder / file))


def test_a_json_file_of_gigabytes(folder):
    os.truncate(folder / "unet/config.json", 2**33)  # sparse
    refused(folder, str(folder / "unet/config.json"), "too many")


def test_a_byte_order_mark_is_only_an_editors_habit(folder):
    for name in ("unet/config.json", "model_index.json", "tokenizer/merges.txt", "tokenizer/vocab.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert load_pipeline(folder).tokenizer.encode("a red ball").pieces[1] == "a</w>"


NUMBERS = ["3", True, -1, 0, 1.5, [], {}, float("nan"), 10**400]


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize(
    "file, field",
    [("unet/config.json", "in_channels"), ("unet/config.json", "layers_per_block"), ("vae/config.json", "latent_channels"),
     ("vae/config.json", "scaling_factor"), ("text_encoder/config.json", "hidden_size"), ("scheduler/scheduler_config.json", "num_train_timesteps"), ("scheduler/scheduler_config.json", "beta_end")],
)  # fmt: skip
def test_numbers_that_are_none_in_a_config(folder, file, field, value):
    if value == 1.5 and field == "scaling_factor":
        value = float("inf")
    edit(folder / file, **{field: value})
    refused(folder, str(folder / file))


def edit(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "file, changes, says",
    [
        ("model_index.json", {"_class_name": "RunsCodePipeline"}, ["RunsCodePipeline", "labkit opens"]),
        ("model_index.json", {"_class_name": ["my_module", "Pipeline"]}, ["my_module"]),
        ("model_index.json", {"_class_name": None}, ["None"]),
        ("model_index.json", {"unet": ["my_module", "MyUNet"]}, ["MyUNet"]),
        ("model_index.json", {"unet": {"a": 1}}, ["names no unet"]),
        ("model_index.json", {"scheduler": None}, ["names no scheduler"]),
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, ["UNet3DConditionModel"]),
        ("unet/config.json", {"num_attention_heads": [5, 5]}, ["5 attention heads cannot share 32 channels"]),
        ("unet/config.json", {"norm_num_groups": 7}, ["no network can be built"]),
        ("unet/config.json", {"layers_per_block": 10**6}, ["layers_per_block", "1000000"]),
        ("unet/config.json", {"transformer_layers_per_block": 64, "layers_per_block": 16}, ["4224 transformers"]),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 1000, "up_block_types": ["UpBlock2D"] * 1000, "block_out_channels": 32}, ["eight at most"]),
        ("unet/config.json", {"down_block_types": [["CrossAttnDownBlock2D"]]}, ["unet/config.json"]),
        ("unet/config.json", {"use_linear_projection": "no"}, ["use_linear_projection"]),
        ("unet/config.json", {"block_out_channels": [32, "64"]}, ["block_out_channels"]),
        ("unet/config.json", {"\x1b]0;title\x07": 1}, [r"\x1b]0;title\x07"]),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}, ["num_hidden_layers", "1000000"]),
        ("text_encoder/config.json", {"num_attention_heads": 5}, ["5 attention heads cannot share 48 channels"]),
        ("text_encoder/config.json", {"hidden_act": 7}, ["7"]),
        ("vae/config.json", {"block_out_channels": [1] * 1000, "down_block_types": ["DownEncoderBlock2D"] * 1000, "up_block_types": ["UpDecoderBlock2D"] * 1000},
         ["eight at most"]),
        ("scheduler/scheduler_config.json", {"prediction_type": ["epsilon"]}, ["prediction_type"]),
        ("scheduler/scheduler_config.json", {"set_alpha_to_one": "no"}, ["set_alpha_to_one"]),
        ("labkit.json", {"defaults": "x"}, ["defaults is 'x'"]),
        ("labkit.json", {"vocabulary": 5}, ["vocabulary is 5"]),
        ("labkit.json", {"vocabulary": [{}]}, ["a list of words"]),
        ("tokenizer/vocab.json", {"a</w>": "b"}, ["a</w>", "'b'"]),
        ("tokenizer/vocab.json", {"a</w>": -1}, ["-1"]),
        ("tokenizer/vocab.json", {"a</w>": 650.0}, ["650.0"]),
        ("tokenizer/vocab.json", {"a</w>": True}, ["True"]),
        ("tokenizer/tokenizer_config.json", {"pad_token": 5}, ["tokenizer", "5"]),
        ("tokenizer/tokenizer_config.json", {"pad_token": ["x"]}, ["tokenizer"]),
        ("tokenizer/tokenizer_config.json", {"pad_token": {}}, ["tokenizer"]),
        ("tokenizer/tokenizer_config.json", {"added_tokens_decoder": {}, "pad_token": {"text": "x"}}, ["tokenizer"]),
        ("tokenizer/tokenizer_config.json", {"model_max_length": float("nan")}, ["tokenizer"]),
        ("tokenizer/tokenizer_config.json", {"model_max_length": -5}, ["max_length is -5"]),
    ],
)  # fmt: skip
def test_configs_of_something_else(folder, file, changes, says):
    edit(folder / file, **changes)
    (folder / "tokenizer/special_tokens_map.json").unlink()
    if changes.get("pad_token") == {}:  # as good as none
        load_pipeline(folder)
        return
    refused(folder, str(folder / file if "tokenizer_config" not in file else folder / "tokenizer"), *says)


@pytest.mark.parametrize("content", ["[]", "{}", '{"model": []}', '{"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}',
                                     '{"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {"a": "b"}, "merges": 3}}'])  # fmt: skip
def test_a_tokenizer_of_one_file_that_is_none(folder, content):
    (folder / "tokenizer/vocab.json").unlink()
    (folder / "tokenizer/tokenizer.json").write_text(content)
    refused(folder, str(folder / "tokenizer"))


def test_sdxl_under_the_name_of_stable_diffusion_1(folder):
    edit(folder / "unet/config.json", addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
    refused(folder, UNET, "add_embedding", "missing")


# --- variants, the hub, places ------------------------------------------------------------------------------------------------------------


def test_a_variant_that_is_not_there(folder):
    refused(folder, str(folder / "unet"), "no weights called variant 'fp16'", "variant=None", variant="fp16")
    refused(folder, "variant is '../x'", variant="../x")
    (folder / UNET).rename(folder / UNET.replace(".safetensors", ".non_ema.safetensors"))
    refused(folder, "diffusion_pytorch_model.non_ema.safetensors", "variant='non_ema'")


def test_a_hub_id_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("nobody/nothing", "HF_HUB_OFFLINE is set", "hf download nobody/nothing", "tabletop")
    snapshot = tmp_path / "models--nobody--nothing" / "snapshots" / ("a" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    snapshot.mkdir(parents=True)
    for content in (b"[" * 10**5, b"[]", b"\xff"):  # a cache that somebody has spoilt
        (snapshot / "model_index.json").write_bytes(content)
        refused("nobody/nothing", "HF_HUB_OFFLINE is set")


@pytest.fixture
def nobody():
    """A user who may do nothing here, and a folder of root's that all may look into."""
    if not hasattr(os, "geteuid"):
        pytest.skip("POSIX only")
    place, user = Path(tempfile.mkdtemp()), os.geteuid()
    place.chmod(0o755)
    if user == 0:
        os.seteuid(65534)
    else:
        place.chmod(0o555)
    yield place
    os.seteuid(user)
    place.chmod(0o755)
    shutil.rmtree(place)


def as_root(action):
    """Prepare what the test's user may not; if we are not root, the place is ours to open for a moment."""
    user = os.geteuid()
    if user == 65534:
        os.seteuid(0)
    try:
        return action()
    finally:
        if user == 65534:
            os.seteuid(user)


@posix
def test_a_folder_that_may_not_be_written_to(saved, nobody):
    if os.geteuid() != 65534:
        pytest.skip("needs root, to become somebody else")
    lab = as_root(lambda: load_pipeline(saved))
    with pytest.raises(CheckpointError, match="cannot be written.*Permission denied.*nothing was changed"):
        save_pipeline(lab, nobody / "deep" / "m")
    as_root(lambda: (shutil.copy(saved / UNET, nobody / "m.safetensors"), (nobody / "m.safetensors").chmod(0o644)))
    with pytest.raises(CheckpointError, match="cannot be written.*Permission denied"):
        labkit.convert.convert_checkpoint(nobody / "m.safetensors", nobody / "n.safetensors")
    assert sorted(p.name for p in nobody.iterdir()) == ["m.safetensors"]


@posix
def test_a_cache_that_may_only_be_read(saved, nobody, monkeypatch):
    if os.geteuid() != 65534:
        pytest.skip("needs root, to become somebody else")

    def prepare():
        base = nobody / "models--org--tiny"
        (base / "refs").mkdir(parents=True)
        (base / "refs" / "main").write_text("a" * 40)
        shutil.copytree(saved, base / "snapshots" / ("a" * 40))

    as_root(prepare)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(nobody))
    assert load_pipeline("org/tiny").name == "tiny"
    refused("org/other", "HF_HUB_OFFLINE is set")


@posix
def test_files_that_may_not_be_read(saved, nobody):
    if os.geteuid() != 65534:
        pytest.skip("needs root, to become somebody else")
    as_root(lambda: (shutil.copytree(saved, nobody / "m"), (nobody / "m" / UNET).chmod(0o600)))
    as_root(lambda: (shutil.copytree(saved, nobody / "c"), (nobody / "c").chmod(0o600)))
    refused(nobody / "m", UNET, "cannot be read (Permission denied)")
    refused(nobody / "c", "cannot be read (Permission denied)")
    refused(nobody / "c" / "unet" / "x.safetensors", "cannot be read (Permission denied)")


@posix
def test_a_disk_that_fills_while_saving(saved, tmp_path):
    """A real failure of the kernel: no file of this process may grow beyond 50 kB. safetensors reports it by an error of its own."""
    import resource

    lab = load_pipeline(saved)
    save_pipeline(lab, tmp_path / "there")
    before = (tmp_path / "there" / UNET).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("new", "deep/er/new", "there"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(CheckpointError, match="cannot be written.*too large.*nothing was changed") as caught:
                save_pipeline(lab, tmp_path / name, overwrite=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["there"] and (tmp_path / "there" / UNET).read_bytes() == before


@posix
def test_what_is_saved_may_be_read_by_whom_the_umask_lets(saved, tmp_path):
    before = os.umask(0o027)
    try:
        save_pipeline(load_pipeline(saved), tmp_path / "m")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "m").rglob("*") if p.is_file()} == {0o640}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_other_ways_in_which_saving_fails(saved, tmp_path, monkeypatch, code):
    def fails(self, *args, **kwargs):
        raise OSError(code, os.strerror(code))

    lab = load_pipeline(saved)
    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(CheckpointError, match=f"cannot be written .{os.strerror(code)}"):
        save_pipeline(lab, tmp_path / "new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["mein Modell é 模型", "a'b\"c", "100%{x}$HOME", "-rf", "spaces  at the end "])
def test_odd_names_of_folders(saved, tmp_path, name):
    where = Path(shutil.copytree(saved, tmp_path / name))
    assert load_pipeline(str(where)).text_encoder is not None
    (where / UNET).write_bytes(b"")
    refused(where, UNET, "it is empty")


@posix
def test_names_that_would_break_the_line(saved, tmp_path):
    where = Path(shutil.copytree(saved, tmp_path / "two\nlines \x1b[31m"))
    (where / UNET).write_bytes(b"")
    refused(where, r"two\nlines \x1b[31m", "it is empty")
    raw = os.fsencode(tmp_path) + b"/caf\xe9"  # not UTF-8
    os.mkdir(raw)
    refused(os.fsdecode(raw), r"caf\udce9", "no model_index.json")


@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 300, "x/" * 400, "~nobody-of-that-name/x", "\udcff", "org/" + "x" * 300, "../../..", "org/../x", "https://huggingface.co/a/b"]
)
def test_names_of_no_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(name)


def test_a_pickle_is_converted_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    for name in ("v1-5.ckpt", "V1-5.CKPT", "m.pt", "m.bin", "m.pth"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        refused(tmp_path / name, name, "can run code", "python -m labkit convert")


def test_nothing_is_half_loaded(folder, monkeypatch):
    """The last part is broken: no earlier one is left behind in memory."""
    import gc

    (folder / "scheduler/scheduler_config.json").write_text("{")
    gc.collect()
    before = sum(type(o) is checkpoint.UNet for o in gc.get_objects())
    refused(folder, "scheduler_config.json")
    gc.collect()
    assert sum(type(o) is checkpoint.UNet for o in gc.get_objects()) == before
