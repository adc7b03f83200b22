"""The memory that decoding takes: diffusers', labkit's plain, optimised and in strips.

    python tests/benchmarks/decode_memory.py [SIDE ...]              pixels; 512, 1024 and 2048 unless said
    python tests/benchmarks/decode_memory.py --measure [SIDE ...]    512 and 1024

The first counts bytes of live tensors without computing them, on the meta device: plain and in strips, without the weights and without what
kernels need for themselves. The second decodes, each in a fresh process, and asks the system for the largest resident memory the
process ever had: Python, torch, weights, packing and the kernels' scratch included. Stable Diffusion 1.5's geometry, random weights, float32, batch 1.
"""

import os
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit.device import keep_freed_memory
from labkit.models.config import SD15_VAE
from labkit.models.formats import vae_to_diffusers
from labkit.models.vae import VAE
from labkit.packing import pack
from labkit.strips import decode_in_strips


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that tensors made inside it hold, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.holders, self.now, self.peak = Counter(), 0, 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.now += size * (self.holders[key] == 0)
                self.holders[key] += 1
                weakref.finalize(tensor, self.let_go, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def let_go(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        self.now -= size * (self.holders[key] == 0)


@torch.no_grad()
def peak(decode: Callable, side: int) -> int:
    """Bytes at the peak of decoding one picture of side x side pixels."""
    with torch.device("meta"):
        vae, z = VAE(SD15_VAE), torch.empty(1, 4, side // 8, side // 8)
    vae.decoder.mid_block.attentions[0].attend = lambda q, k, v: q.clone()  # the fused kernel: nothing but the answer
    with Live() as live:
        assert decode(vae, z).shape == (1, 3, side, side)
    return live.peak


WAYS = ("diffusers", "plain", "strips", "optimised", "optimised, strips")


@torch.no_grad()
def decoded(way: str, side: int, folder: str) -> None:
    """Decode in this process, and print its largest resident memory in MiB: before decoding, and in all."""
    if way == "diffusers":
        from diffusers import AutoencoderKL

        decode = AutoencoderKL.from_pretrained(folder).decode
    else:
        vae = plain_vae(folder)
        if way.startswith("optimised"):
            vae = pack(vae, but="encoder")
            keep_freed_memory()
        decode = partial(decode_in_strips if way.endswith("strips") else VAE.decode, vae)
    z = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    before = largest()
    decode(z)
    print(before, largest())


def plain_vae(folder: str) -> VAE:
    """The VAE of a folder, its weights mapped, as checkpoints are opened."""
    with torch.device("meta"):
        vae = VAE(SD15_VAE)
    vae.load_state_dict(load_file(Path(folder, "diffusion_pytorch_model.safetensors")), assign=True)
    return vae.eval().requires_grad_(False)


def largest() -> int:
    """The largest resident memory of this process so far, in MiB (Linux counts in KiB)."""
    import resource  # here, because Windows has none, and counting needs none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def measure(sides: list[int]) -> None:
    """Every way and size in a process of its own, all with the same weights."""
    from diffusers import AutoencoderKL

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoencoderKL.from_config(vae_to_diffusers(SD15_VAE)).save_pretrained(folder)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        for side in sides:
            for way in WAYS:
                call = [sys.executable, __file__, "--one", way, str(side), folder]
                done = subprocess.run(call, env=environment, check=True, capture_output=True, text=True)
                before, peak = done.stdout.split()
                print(f"{side:5} pixels, {way:18} {peak:>6} MiB in all, {before:>5} before decoding", flush=True)


def count(sides: list[int]) -> None:
    for side in sides:
        plain, strips = peak(VAE.decode, side), peak(decode_in_strips, side)
        print(f"{side:5} pixels: plain {plain / 2**20:6.0f} MiB, in strips {strips / 2**20:6.0f} MiB, {strips / plain:.2f} of it")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--one", way, side, folder]:
            decoded(way, int(side), folder)
        case ["--measure", *sides]:
            measure([int(side) for side in sides or (512, 1024)])
        case sides:
            count([int(side) for side in sides or (512, 1024, 2048)])
