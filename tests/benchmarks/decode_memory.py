"""The most that the VAE's decoder holds at once, plain and in strips: bytes of live tensors, counted without computing them.

    python tests/benchmarks/decode_memory.py [SIDE ...]      pixels; 512, 1024 and 2048 unless said

The geometry is that of Stable Diffusion 1.5 in float32, batch 1, on the meta device. Weights do not count, nor what kernels need for themselves:
the attention's scores (fused: none) and the convolutions' scratch memory.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit.models.config import SD15_VAE
from labkit.models.vae import VAE
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


if __name__ == "__main__":
    for side in map(int, sys.argv[1:] or (512, 1024, 2048)):
        plain, strips = peak(VAE.decode, side), peak(decode_in_strips, side)
        print(f"{side:5} pixels: plain {plain / 2**20:6.0f} MiB, in strips {strips / 2**20:6.0f} MiB, {strips / plain:.2f} of it")
