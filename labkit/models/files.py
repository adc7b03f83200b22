"""Reading and writing the files that models are kept in: JSON, text, safetensors; and filling a module with what was read.

    file -> {name: tensor} -> every parameter of the module, by name, none missing, none left over, every shape right

Weights are read from safetensors only. A safetensors file is a table of names, types and offsets followed by plain numbers:
opening one runs nothing, whoever wrote it. Pickled weights (.bin, .ckpt, .pt) can run any code on opening and are refused.
Every failure is a CheckpointError of one line: which file, which parameter, what was expected, what to do.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from labkit.errors import CheckpointError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
AGAIN = "the file is damaged, fetch it again"


def read_text(path: str | Path) -> str:
    """A UTF-8 text file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; the folder is not complete, fetch it again.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not UTF-8 text; {AGAIN}.") from None


def read_json(path: str | Path) -> dict:
    """A JSON file that holds an object."""
    text = read_text(path)
    if sort := _disguise(text[:200].encode()):
        raise CheckpointError(f"{path}: JSON is expected, but {sort}.")
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON (line {getattr(error, 'lineno', 1)}); {AGAIN}.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, this is a {type(found).__name__}.")
    return found


def choose_weights(names: set[str], stem: str, dtype: torch.dtype | None = None, variant: str | None = None) -> str:
    """Which of a folder's files to read: `stem`.safetensors or a sharded index, the fp16 variant first if float16 is asked for.

    With `variant` ("fp16", "non_ema"), that one and no other. Raises CheckpointError (a phrase, to be put behind the folder's name)
    if there is none, and says why if only pickles are there.
    """
    full = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    half = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"]
    wanted = half + full if dtype == torch.float16 else full + half
    for name in wanted if variant is None else [f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json"]:
        if name in names:
            return name
    if variant is not None:
        found = {m[1] or m[2] for n in names if (m := re.fullmatch(rf"{stem}(?:\.(\w+))?\.safetensors|{stem}\.safetensors\.index\.(\w+)\.json", n))}
        there = ", ".join(f"variant={v!r}" if v else "variant=None" for v in sorted(found, key=str)) or "no safetensors at all"
        raise CheckpointError(f"no weights called variant {variant!r}; there is {there}.")
    if pickled := sorted(n for n in names if n.endswith(PICKLES)):
        raise CheckpointError(
            f"only pickled weights ({pickled[0]}), which can run code when opened; labkit reads safetensors: take another revision "
            "of the model, or save it again with diffusers' save_pretrained(folder, safe_serialization=True)."
        )
    raise CheckpointError(f"no {stem}.safetensors there; the folder is not complete, fetch it again.")


def read_tensors(
    folder: Path, stem: str, device="cpu", dtype: torch.dtype | None = None, variant: str | None = None
) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a part's folder, in one file or in shards, as floating point `dtype` on `device`; and the file's name."""
    try:
        names = {p.name for p in folder.iterdir()}
    except OSError:
        raise CheckpointError(f"{folder}: there is no such folder; the model is not complete, fetch it again.") from None
    try:
        path = folder / choose_weights(names, stem, dtype, variant)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if path.suffix != ".json":
        return read_safetensors(path, device, dtype), path
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) and f == Path(f).name and "\\" not in f for f in where.values()):
        raise CheckpointError(f"{path}: its weight_map must name files of this folder; {AGAIN}.")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(where.values())):
        part = read_safetensors(folder / shard, device, dtype)
        if lacking := [key for key, file in where.items() if file == shard and key not in part]:
            raise CheckpointError(f"{folder / shard}: lacks {_few(lacking)}, which {path.name} puts there; {AGAIN}.")
        tensors |= part
    return tensors, path


def read_safetensors(path: Path, device="cpu", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of one safetensors file, converted one by one, so that no second copy of the whole is held."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(200)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; the folder is not complete, fetch it again.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    if sort := _disguise(start):
        raise CheckpointError(f"{path}: not a safetensors file; {sort}.")
    if size < 8 or int.from_bytes(start[:8], "little") > size - 8:
        raise CheckpointError(f"{path}: {size} bytes that are not a safetensors file, or the beginning of one; {AGAIN}.")
    tensors = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():
                tensor = file.get_tensor(key)
                if tensor.is_floating_point():
                    if tensor.element_size() == 1:
                        raise CheckpointError(f"{path}: {key} is {tensor.dtype}; labkit reads float16, bfloat16, float32 and float64.")
                    # a copy: what was read would be a view of the file, and break if the file is replaced or cut
                    tensor = tensor.to(device, dtype or tensor.dtype, copy=True)
                    if not torch.isfinite(tensor.sum(dtype=torch.float32)):
                        raise CheckpointError(f"{path}: {key} holds NaN or infinity as {tensor.dtype}; {AGAIN}, or load it as float32.")
                tensors[key] = tensor
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not all of it is there ({size} bytes; {' '.join(str(error).split())}); {AGAIN}.") from None
    return tensors


def fill(build: Callable[[], nn.Module], tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """The module that `build` makes, its parameters being `tensors` themselves (no copy); raises unless all names and shapes agree.

    The module is built without memory, on the meta device, so nothing is allocated or initialised only to be thrown away.
    """
    try:
        with torch.device("meta"):
            module = build()
    except (ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path.parent / 'config.json'}: no network can be built of it ({' '.join(str(error).split())}).") from None
    expected = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    shapes = [f"{n}: expected {expected[n]}, found {found[n]}" for n in expected if n in found and expected[n] != found[n]]
    types = [f"{n}: {t.dtype}" for n, t in tensors.items() if n in expected and not t.is_floating_point()]
    complaints = [
        f"{len(some)} {what} ({_few(some)})"
        for some, what in (
            ([n for n in expected if n not in found], "missing"),
            ([n for n in found if n not in expected], "unknown"),
            (shapes, "of another shape"),
            (types, "not floating point"),
        )
        if some
    ]
    if complaints:
        advice = "config.json and the weights are of different models: fetch the folder again, or check which model this is"
        if any(n.startswith(("model_ema.", "model.diffusion_model.", "cond_stage_model.", "first_stage_model.")) for n in found):
            advice = "this is a checkpoint in the original one-file layout: convert it to a diffusers folder first"
        raise CheckpointError(f"{path}: does not fit its architecture: {'; '.join(complaints)}. {advice[0].upper() + advice[1:]}.")
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval()


def write_safetensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors to one safetensors file, as `dtype` or as they are."""
    tensors = {name: t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})  # transformers will not open a file that does not say so


def write_json(content: dict, path: Path) -> None:
    """Write JSON the way diffusers does: indented, sorted by name, one line break at the end on every system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _disguise(start: bytes) -> str | None:
    """What a file really is when it is none of ours, told by its first bytes, and what to do; None if nothing is known against it."""
    if not start:
        return f"it is empty; {AGAIN}"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, a note where the real file lies; run `git lfs pull` in its folder"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, probably an error message of the server; fetch it again"
    # a safetensors file begins with its header's length and "{": a header of 640 bytes reads like the beginning of a pickle
    if start[8:9] != b"{" and start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "it is a pickle (.bin, .ckpt, .pt) under another name, which can run code when opened; get the safetensors file"
    return None


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
