"""The table at the start of a safetensors file: read, checked and explained before a single weight is.

    file = n (8 bytes, little endian) | header (n bytes of JSON) | numbers
    header = {name: {"dtype": "F16", "shape": [320, 4, 3, 3], "data_offsets": [start, end]}, ..., "__metadata__": {str: str}}

The numbers of all tensors follow each other from 0 to the end of the file: no gap, no overlap, nothing behind them. All of it is
checked here (format: github.com/huggingface/safetensors), so what a file claims to hold is known, and known to be there, before
memory is asked for. What is no safetensors file at all is called by its name.
"""

import json
import math
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from labkit.errors import CheckpointError

AGAIN = "the file is damaged, fetch it again"
LIMIT = 25 * 2**20  # bytes of a header; the largest of Stable Diffusion's has 0.4 MB
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip

DISGUISES = (
    (b"version https://git-lfs", "it is a git-lfs pointer, a note where the real file lies; run `git lfs pull` in its folder"),
    (b"GGUF", "it is a GGUF file, quantised weights for other programs; get the safetensors file"),
    (b"\x89HDF", "it is an HDF5 file; get the safetensors file"),
    (b"\x1f\x8b", "it is compressed (gzip); unpack it first"),
    (b"7z\xbc\xaf", "it is compressed (7z); unpack it first"),
    (b"Rar!", "it is compressed (rar); unpack it first"),
    (b"PK\x03\x04", "it is a zip archive, as torch's pickles are (.bin, .ckpt, .pt), and those can run code when opened; get the safetensors file"),
    *((b"\x80" + bytes([v]), "it is a pickle (.bin, .ckpt, .pt), which can run code when opened; get the safetensors file") for v in range(2, 6)),
)


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor, checked."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape without memory; of `dtype` if it is one of fractions."""
        return torch.empty(self.shape, dtype=dtype if dtype and self.dtype.is_floating_point else self.dtype, device="meta")


def disguise(start: bytes) -> str | None:
    """What a file really is when it is none of ours, told by its first bytes, and what to do; None if nothing is known against it."""
    if not start:
        return f"it is empty; {AGAIN}"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, probably an error message of the server; fetch it again"
    if start[8:9] == b"{":  # a header's length and its first sign: one of 640 bytes begins like a pickle
        return None
    return next((what for magic, what in DISGUISES if start.startswith(magic)), None)


def regular_size(path: str | Path) -> int:
    """Bytes of an ordinary file; CheckpointError for whatever else goes by that name: a folder, a pipe (opening it would wait for ever)."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        gone = " (a link to a file that is gone)" if os.path.islink(path) else ""
        raise CheckpointError(f"{path}: there is no such file{gone}; the model is not complete, fetch it again.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise CheckpointError(f"{path}: is {kind}, a file is expected; fetch the model again.")
    return found.st_size


def read_header(path: str | Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name: their types and shapes; CheckpointError unless the whole file is as its header says."""
    size = regular_size(path)
    try:
        with open(path, "rb") as file:
            start = file.read(200)
            if sort := disguise(start):
                raise CheckpointError(f"{path}: not a safetensors file; {sort}.")
            n = int.from_bytes(start[:8], "little")
            if size < 10 or n > size - 8:
                raise CheckpointError(f"{path}: {size} bytes that are not a safetensors file, or the beginning of one; {AGAIN}.")
            if n > LIMIT:
                raise CheckpointError(f"{path}: its header is said to have {n} bytes, more than {LIMIT}; not a safetensors file of a model, {AGAIN}.")
            file.seek(8)
            raw = file.read(n)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    entries = {name: _entry(path, name, said) for name, said in _json(path, raw).items()}
    _check_places(path, entries, size - 8 - n)
    return entries


def _json(path, raw: bytes) -> dict:
    def once(pairs: list) -> dict:
        found = dict(pairs)
        if len(pairs) != len(found):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{path}: {twice} is in its header twice; {AGAIN}.")
        return found

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except CheckpointError:
        raise
    except (ValueError, RecursionError):  # not UTF-8, not JSON, numbers of thousands of digits, nested without end
        raise CheckpointError(f"{path}: its header is not JSON, so this is not a safetensors file or it is damaged; fetch it again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: its header is a {type(found).__name__}, a table of tensors is expected; {AGAIN}.")
    if not isinstance(found.pop("__metadata__", {}), dict):
        raise CheckpointError(f"{path}: the __metadata__ of its header is no table; {AGAIN}.")
    return found


def _entry(path, name: str, said) -> Entry:
    """One line of the header, every number in it looked at; Python's integers do not overflow."""
    said = said if isinstance(said, dict) else {}
    dtype, shape, offsets = said.get("dtype"), said.get("shape"), said.get("data_offsets")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: what its header says of {name} is no type, shape and place; {AGAIN}.")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} is of type {dtype}, which labkit does not read; get float16, bfloat16 or float32 weights.")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(f"{path}: {name} of shape {tuple(shape)} takes {expected} bytes, its header gives it {offsets[1] - offsets[0]}; {AGAIN}.")
    return Entry(DTYPES[dtype], tuple(shape), *offsets)


def _naturals(numbers) -> bool:
    return isinstance(numbers, list) and len(numbers) < 17 and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _check_places(path, entries: dict[str, Entry], there: int) -> None:
    """The tensors follow each other from the first byte behind the header to the last one of the file."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: {name} {what} (begins at {entry.start}, expected {end}); {AGAIN}.")
        end = entry.end
    if end > there:
        raise CheckpointError(f"{path}: not all of it is there, {end} bytes of weights are expected, {there} found; {AGAIN}.")
    if end < there:
        raise CheckpointError(f"{path}: {there - end} bytes lie behind its last tensor; {AGAIN}.")
