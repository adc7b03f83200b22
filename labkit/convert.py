"""Original one-file checkpoints, pickled or not, made into a diffusers folder or a safetensors file.

    model.ckpt (pickle) | model.safetensors  ->  folder in the diffusers layout | model.safetensors

The one place where labkit opens a pickle, and only because it was asked to: with `torch.load(weights_only=True)`, which knows how to make
tensors and plain containers and refuses everything else. Before that the archive itself is looked at (nothing compressed, nothing that
unpacks to more than the file has), after it each tensor (no view that is larger than what it looks at). weights_only is not a sandbox; it
had holes in torch before 2.10, so better take a safetensors file where there is one.
"""

import math
import os
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from labkit.errors import CheckpointError
from labkit.models.files import PICKLES, read_safetensors, sound, write_json, write_safetensors
from labkit.models.header import disguise, regular_size
from labkit.models.original_layout import OneFile
from labkit.models.original_names import ema_name
from labkit.models.single_file import open_one_file, recognise
from labkit.models.sources import STEMS
from labkit.models.whole import whole_file, whole_folder

LONGEST_PICKLE = 64 * 2**20  # bytes of the program in a checkpoint; Stable Diffusion's have 0.3 MB, its numbers are kept apart from it


def convert_checkpoint(
    source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False,
    ema: bool = False, prediction_type: str | None = None, tokenizer: str | Path | None = None,
) -> Path:  # fmt: skip
    """Write a checkpoint as a diffusers folder, or, if `target` ends in .safetensors, as one file with the names it had; returns the path.

    Weights as `dtype`, or as they are, none of them NaN or infinite; the other options are those of `open_one_file`. Of one file, only `ema`
    matters: the average takes the weights' names. What is there already is replaced only with `overwrite`. Raises CheckpointError; the
    target is complete or absent.
    """
    source, target = Path(os.path.expanduser(source)), Path(os.path.expanduser(target)).absolute()
    tensors = read_pickle(source) if source.suffix.lower() in PICKLES else None
    if tensors is None and source.suffix.lower() != ".safetensors":
        regular_size(source)
        raise CheckpointError(f"{source}: is neither .safetensors nor {', '.join(PICKLES)}; give an original one-file checkpoint.")
    if target.suffix.lower() in PICKLES:
        raise CheckpointError(f"{target}: labkit writes no pickles; give a name ending in .safetensors, or a folder.")
    one = _opened(source, tensors, ema, prediction_type, tokenizer) if ema or target.suffix != ".safetensors" else None
    if target.suffix != ".safetensors":
        with whole_folder(target, overwrite) as folder:
            _write_folder(one, folder, dtype)
        return target
    tensors = read_safetensors(source, check=True) if tensors is None else {n: sound(t, n, source, check=True) for n, t in tensors.items()}
    if ema:
        tensors = {n: tensors[ema_name(n)] if n.startswith("model.diffusion_model.") else t for n, t in tensors.items() if not n.startswith("model_ema.")}
    with whole_file(target, overwrite) as path:
        write_safetensors(_apart(tensors), path, dtype)
    return target


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch checkpoint by name (those of its "state_dict", and "global_step"); raises CheckpointError, runs nothing."""
    size = regular_size(path)
    with open(path, "rb") as file:
        start = file.read(200)
    if not start.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise CheckpointError(f"{path}: not a torch checkpoint; {disguise(start) or 'if it is a safetensors file, give it that name'}.")
    archive = start.startswith(b"PK")
    if archive:
        _check_archive(path, size)
    try:
        with torch.serialization.safe_globals([(_Unused, name) for name in NAMED_ONLY]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # the unpickler fails in many ways; what it advises, to switch the check off, is not passed on
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise CheckpointError(f"{path}: asks for {named[1]}, which is no weight and may be code; it was not run. Get the safetensors file.") from None
        raise CheckpointError(f"{path}: is damaged, or holds more than weights; nothing of it was run. Fetch it again, or get a safetensors file.") from None
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    tensors = {n: t for n, t in state.items() if isinstance(n, str) and isinstance(t, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no table of weights; give a checkpoint of Stable Diffusion.")
    for name, tensor in tensors.items():
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or math.prod(tensor.shape) * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} is no plain tensor, or larger than what is stored of it; get a safetensors file.")
    if type(step := found.get("global_step")) is int and 0 <= step < 2**62:
        tensors.setdefault("global_step", torch.tensor(step))
    return {name: tensor.detach() for name, tensor in tensors.items()}


class _Unused:
    """Stands for a class that a checkpoint of pytorch-lightning mentions and that is not wanted; it has nothing to run."""


NAMED_ONLY = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint")


def _check_archive(path: Path, size: int) -> None:
    """torch stores its numbers as they are, one after the other; what is packed could unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError):  # what zipfile says of an archive that it cannot read
        raise CheckpointError(f"{path}: begins like a torch checkpoint, but not all of it is there; fetch it again.") from None
    if any(f.compress_type != zipfile.ZIP_STORED for f in files) or sum(f.file_size for f in files) > size:
        raise CheckpointError(f"{path}: is a packed archive, torch's checkpoints are not; unpack it, or fetch the checkpoint again.")
    programs = [f for f in files if f.filename.endswith("data.pkl")]
    if len(programs) != 1 or programs[0].file_size > LONGEST_PICKLE:
        raise CheckpointError(f"{path}: is a zip archive, but not of torch's kind; give a checkpoint of Stable Diffusion.")


def _opened(path: Path, tensors: dict[str, Tensor] | None, ema, prediction_type, tokenizer) -> OneFile:
    if tensors is None:
        return open_one_file(path, ema, prediction_type, tokenizer, check=True)
    table = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}

    def read(names, device, dtype):
        return {n: table[n] if torch.device(device).type == "meta" else sound(tensors[n], n, path, device, dtype, check=True) for n in names}

    return recognise(path, table, read, tensors.get("global_step"), ema, prediction_type, tokenizer)


def _write_folder(one: OneFile, folder: Path, dtype: torch.dtype | None) -> None:
    """The diffusers layout, part by part, so that one part at a time is held."""
    tokens = {}
    for part in one.family.texts:  # first what may be missing
        tokenizer = one.tokenizer(part, one.config(part)["max_position_embeddings"])
        tokenizer.save_folder(folder / part.replace("text_encoder", "tokenizer"))
        tokens[part] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}  # SDXL's pooled text is the state at EOS
    for part in one.parts:
        write_json({**one.config(part), **tokens.get(part, {})}, folder / part / "config.json")
        write_safetensors(_apart(one.tensors(part, "cpu", None)[0]), folder / part / f"{STEMS.get(part, 'model')}.safetensors", dtype)
    write_json(one.config("scheduler"), folder / "scheduler" / "scheduler_config.json")
    write_json(one.index(), folder / "model_index.json")


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory, which a safetensors file cannot say."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return out
