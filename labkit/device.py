"""Where the numbers live (device, dtype) and where the noise comes from.

Noise is always drawn on the CPU, in float32, from one generator per image: x_T[b] ~ N(0, I) depends on seed b and on
nothing else, neither on the device nor on the other images of the batch. This is also what diffusers does with a list
of CPU generators, so a seed means the same picture here and there.
"""

import ctypes
import sys
from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from labkit.errors import LabkitError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1", "mps"), or for None the best one there is.

    Raises LabkitError if the name is unknown or this machine has no such device.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise LabkitError(f"Unknown device {name!r}: use 'cpu', 'cuda', 'cuda:0', 'mps' or None for the best.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise LabkitError(f"Device {name!r} is not there (torch sees {count} CUDA devices): use device='cpu' or None.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise LabkitError(f"Device {name!r} is not there (no Apple GPU that torch can use): use device='cpu' or None.")
    if device.type not in ("cpu", "cuda", "mps"):
        raise LabkitError(f"Device {name!r} is not one labkit runs on: use 'cpu', 'cuda', 'mps' or None for the best.")
    return device


def pick_dtype(device: str | torch.device, dtype: str | torch.dtype | None = None) -> torch.dtype:
    """The floating-point type of the weights: `dtype`, or for None a half one on CUDA and float32 elsewhere.

    The half one is bfloat16 where the GPU computes with it (Ampere, 2020, and later): it has float32's range, so that no
    activation becomes infinite, as some of SD 2's attention and SDXL's VAE do in float16. Older GPUs get float16. Raises
    LabkitError if the type is unknown or the device cannot compute with it.
    """
    device = torch.device(device)
    if dtype is None:
        # half is never the default off CUDA: slow on a CPU, and a source of black images on MPS
        return _half(device) if device.type == "cuda" else torch.float32
    known = DTYPES.get(str(dtype).removeprefix("torch."))
    if known is None:
        raise LabkitError(f"Unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}.")
    if known is torch.float64 and device.type == "mps":
        raise LabkitError("The device 'mps' has no float64: use dtype='float32'.")
    return known


def has_bfloat16(device: str | torch.device) -> bool:
    """Whether a device has units for products of bfloat16 matrices, so that training in it is faster than in float32; of processors those with AMX or AVX-512's dot products.

    One that emulates bfloat16 takes many times as long.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return any(getattr(torch.cpu, f"_is_{unit}_supported", lambda: False)() for unit in ("amx_tile", "avx512_bf16"))
    return device.type != "cuda" or _half(device) is torch.bfloat16


def keep_freed_memory() -> None:
    """Tell glibc, where it is the allocator, to keep big blocks for the next layer: returned to the kernel, they are faulted in again.

    Holds for the whole process. Worth a quarter of the time and more on a CPU; other systems do nothing here. The largest blocks, a VAE's maps,
    are returned all the same: few are made and each takes long to fill, but holes of their size would stay.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**26)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def vae_dtype(dtype: torch.dtype | None, force_upcast: bool | None) -> torch.dtype | None:
    """The type of the VAE's weights in a model of type `dtype`: float32 in place of float16 where its config asks for it.

    SDXL's activations exceed 65504, the end of float16, and the picture is NaN; bfloat16 has float32's range and stays.
    """
    return torch.float32 if force_upcast and dtype is torch.float16 else dtype


def _half(device: torch.device) -> torch.dtype:
    """bfloat16 or float16, whichever this CUDA device is made for; compute capability 8.0 is Ampere."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


class Noise:
    """Standard normal noise, one stream per image: successive draws continue the streams.

    `seeds`: one int per image; `shape`: (C, h, w) of one image. Raises LabkitError on anything else.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int]):
        self.seeds = tuple(_seed(seed) for seed in _sequence(seeds))
        self.shape = tuple(shape)
        if not self.seeds:
            raise LabkitError("No seeds: noise needs one seed for each image.")
        if len(self.shape) != 3 or not all(isinstance(n, int) and n > 0 for n in self.shape):
            raise LabkitError(f"The noise's shape is {self.shape}: give (C, h, w), three positive integers.")
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]

    def draw(self) -> Tensor:
        """The next noise of every image, (B, C, h, w) float32 on the CPU."""
        # image by image: what one image gets cannot depend on how many others there are
        return torch.cat([torch.randn((1, *self.shape), generator=g) for g in self._generators])  # (B, C, h, w)


def _sequence(seeds) -> list:
    try:
        return list(seeds)
    except TypeError:
        raise LabkitError(f"Seeds are {seeds!r}: give a list with one integer for each image.") from None


def _seed(seed) -> int:
    try:
        seed = index(seed)
    except TypeError:
        raise LabkitError(f"The seed {seed!r} is not an integer: give one such as 0.") from None
    if not 0 <= seed < 2**64:
        raise LabkitError(f"The seed {seed} is out of range: give an integer from 0 to 2**64 - 1.")
    return seed
