"""Reading and writing the files that models are kept in: JSON, text, safetensors; and filling a module with what was read.

    file -> {name: tensor} -> every parameter of the module, by name, none missing, none left over, every shape right

Weights are read from safetensors only. A safetensors file is a table of names, types and offsets followed by plain numbers:
opening one runs nothing, whoever wrote it. Pickled weights (.bin, .ckpt, .pt) can run any code on opening and are refused.
Weights are not copied: where device and type are the file's own, a tensor is a private view of the mapped file, read when it is first used.
What is written to it stays in memory. The file may be removed or replaced by renaming, and the view is of the old one; a file that
is written over in place changes the model, and one that is cut short under it ends the process.
Every failure is a CheckpointError of one line: which file, which parameter, what was expected, what to do.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from labkit.errors import CheckpointError
from labkit.models.header import AGAIN, disguise, read_header, regular_size

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
LONGEST_TEXT = 64 * 2**20  # bytes; the largest of a published model, tokenizer.json, has 4 MB


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, with or without a byte-order mark."""
    if (size := regular_size(path)) > LONGEST_TEXT:
        raise CheckpointError(f"{path}: {size} bytes are too many for a text file of a model; {AGAIN}.")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not UTF-8 text; {AGAIN}.") from None


def read_json(path: str | Path) -> dict:
    """A JSON file that holds an object."""
    text = read_text(path)
    if sort := disguise(text[:200].encode()):
        raise CheckpointError(f"{path}: JSON is expected, but {sort}.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and what is nested without end
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
    if others := sorted(n for n in names if n.startswith(f"{stem}.") and n.endswith(".safetensors") and "-of-" not in n):
        there = others[0].removeprefix(f"{stem}.").split(".")[0]
        raise CheckpointError(f"no {stem}.safetensors there, but {others[0]}; say variant={there!r}, or fetch the other.")
    if pickled := sorted(n for n in names if n.endswith(PICKLES)):
        raise CheckpointError(
            f"only pickled weights ({pickled[0]}), which can run code when opened; labkit reads safetensors: take another revision "
            "of the model, or save it again with diffusers' save_pretrained(folder, safe_serialization=True)."
        )
    raise CheckpointError(f"no {stem}.safetensors there; the folder is not complete, fetch it again.")


def read_tensors(
    folder: Path, stem: str, device="cpu", dtype: torch.dtype | None = None, variant: str | None = None, check: bool = False
) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a part's folder, one file or shards, as `read_safetensors` reads them; and the file's name."""
    try:
        names = {p.name for p in folder.iterdir()}
    except OSError:
        raise CheckpointError(f"{folder}: there is no such folder; the model is not complete, fetch it again.") from None
    try:
        path = folder / choose_weights(names, stem, dtype, variant)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if path.suffix != ".json":
        return read_safetensors(path, device, dtype, check=check), path
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(_is_shard(file) for file in where.values()):
        raise CheckpointError(f"{path}: its weight_map must name files of this folder; {AGAIN}.")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(where.values())):
        part = read_safetensors(folder / shard, device, dtype, check=check)
        if lacking := [key for key, file in where.items() if file == shard and key not in part]:
            raise CheckpointError(f"{folder / shard}: lacks {few(lacking)}, which {path.name} puts there; {AGAIN}.")
        if twice := sorted(tensors.keys() & part.keys()):
            raise CheckpointError(f"{folder / shard}: holds {few(twice)}, which another shard holds too; {AGAIN}.")
        tensors |= part
    return tensors, path


def read_safetensors(path: Path, device="cpu", dtype: torch.dtype | None = None, names=None, check: bool = False) -> dict[str, Tensor]:
    """The tensors of one safetensors file (or those called `names`): views of the mapped file, converted one by one where they must be.

    What is converted, or all with `check`, is read and must be finite (`sound`). On the device "meta" they are told from the header
    alone: names, shapes and types, without memory. Raises CheckpointError.
    """
    entries = read_header(path)
    wanted = list(entries) if names is None else list(names)
    for key in wanted:
        if entries[key].dtype.is_floating_point and entries[key].dtype.itemsize == 1:
            raise CheckpointError(f"{path}: {key} is {entries[key].dtype}; labkit reads float16, bfloat16, float32 and float64.")
    if torch.device(device).type == "meta":
        return {key: entries[key].empty(dtype) for key in wanted}
    tensors = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in wanted:
                tensors[key] = sound(file.get_tensor(key), key, path, device, dtype, check)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not all of it can be read ({' '.join(str(error).split())}); {AGAIN}.") from None
    return tensors


def sound(tensor: Tensor, name: str, path: Path, device="cpu", dtype: torch.dtype | None = None, check: bool = False) -> Tensor:
    """A tensor on `device`, as `dtype` if it is one of fractions: itself, not read, where it is that already, else converted.

    Raises CheckpointError if what was converted (float32 can exceed float16), or any of it with `check`, holds NaN or infinity.
    """
    if tensor.data_ptr() % tensor.element_size():  # the header's length decides; kernels may rely on numbers lying at multiples of their size
        tensor = tensor.clone()
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.to(device, dtype or tensor.dtype)
    if (check or converted is not tensor) and not torch.isfinite(converted.sum(dtype=torch.float32)):
        raise CheckpointError(f"{path}: {name} holds NaN or infinity as {converted.dtype}; {AGAIN}, or load it as float32.")
    return converted


def check_links(root: Path) -> None:
    """Raise CheckpointError if a file of a model's folder, or of one in it, is a link that leads out of it; OSError if it cannot be looked into.

    A model from a stranger must not reach for files beside it. What may be elsewhere is the blobs/ of a hub cache, where the files of
    .../models--ORG--NAME/snapshots/REVISION really lie; and `root` itself may be a link, for that is what the user named.
    """
    real_root = Path(os.path.realpath(root))
    allowed = [real_root, real_root.parents[1] / "blobs"] if real_root.parent.name == "snapshots" else [real_root]
    inside = list(root.iterdir())
    for path in inside + [path for folder in inside if folder.is_dir() for path in folder.iterdir()]:
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(place) for place in allowed):
            raise CheckpointError(f"{path}: is a link out of the model's folder, to {real}, and is not followed; put the file itself there.")


def fill(build: Callable[[], nn.Module], table: dict[str, Tensor], read: Callable[[], dict[str, Tensor]], path: Path) -> nn.Module:
    """The module that `build` makes, its parameters being those of `read()` themselves (no copy); raises unless all names and shapes agree.

    The module is built without memory, on the meta device, and compared with `table`, what the file says that it holds: weights of
    another model are refused before a number of them is read, and nothing is allocated or initialised only to be thrown away.
    """
    try:
        with torch.device("meta"):
            module = build()
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError) as error:
        config = path.parent / "config.json"
        raise CheckpointError(f"{config if config.exists() else path}: no network can be built of it ({' '.join(str(error).split())}).") from None
    check_fit(module, table, path)
    module.load_state_dict(read(), strict=True, assign=True)
    return module.eval()


def check_fit(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless the tensors are the module's parameters, all of them and no more, in their shapes."""
    expected = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    shapes = [f"{n}: expected {expected[n]}, found {found[n]}" for n in expected if n in found and expected[n] != found[n]]
    types = [f"{n}: {t.dtype}" for n, t in tensors.items() if n in expected and not t.is_floating_point()]
    complaints = [
        f"{len(some)} {what} ({few(some)})"
        for some, what in (
            ([n for n in expected if n not in found], "missing"),
            ([n for n in found if n not in expected], "unknown"),
            (shapes, "of another shape"),
            (types, "not floating point"),
        )
        if some
    ]
    if complaints:
        advice = "The configuration and the weights are of different models: fetch it again, or check which model this is"
        if any(n.startswith(("model_ema.", "model.diffusion_model.", "cond_stage_model.", "first_stage_model.")) for n in found):
            advice = "This is a checkpoint in the original one-file layout: load the file itself, not a folder it was put into"
        raise CheckpointError(f"{path}: does not fit its architecture: {'; '.join(complaints)}. {advice}.")


def write_safetensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors to one safetensors file, those of fractions as `dtype` or as they are; OSError if it cannot be written."""
    tensors = {n: t.detach().to("cpu", dtype if dtype and t.is_floating_point() else t.dtype).contiguous() for n, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a file that is there may be mapped by a loaded model: that one keeps it, this is another
    path.touch()
    mode = path.stat().st_mode  # what the user's umask says; safetensors would let nobody else read it
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers will not open a file that does not say so
    except SafetensorError as error:  # what the library calls a full disk
        raise OSError(None, " ".join(str(error).split())) from None
    path.chmod(mode)


def write_json(content: dict, path: Path) -> None:
    """Write JSON the way diffusers does: indented, sorted by name, one line break at the end on every system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _is_shard(name) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors") and name.isprintable() and "\\" not in name


def few(names: list[str]) -> str:
    """The first three, for a message."""
    return ", ".join(n[:200] for n in names[:3]) + (", ..." if len(names) > 3 else "")
