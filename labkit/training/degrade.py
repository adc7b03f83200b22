"""What generation does to a picture, done to renders: so that the reader of pictures is trained, and tested, on what it will see.

    y = clip(gain tint (blur(x) + sum_k a_k noise_k) + lift),   noise_k grain, patches, blotches      drawn anew at every use
    y = decode(encode(x) + s n),   n ~ N(0, I),  s = 0 or uniform in 0 .. MOST                          once, since it costs

A decoder makes pictures softer, with small errors in patches of its own size and in tint; and latents that a sampler arrives at are a little
off those of any picture, which noise in the latents stands for.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLURS = (1.0, 0.75, 0.5, 0.35)  # the share of their side that pictures are brought down to and up again, one part of a batch each
MOST = 0.35  # of the latents' standard deviation


def blur(x: Tensor, side: int) -> Tensor:
    """Down to side x side and up again; (B, 3, H, W) before and after."""
    return F.interpolate(F.interpolate(x, size=(side, side), mode="area"), size=x.shape[-2:], mode="bilinear")


def spoil(x: Tensor, g: torch.Generator, blurs: Sequence[float] = BLURS) -> Tensor:
    """Blur, noise at three scales, gain, tint and lift: (B, 3, H, W) in [0, 1], before and after; what is to be seen stays what it was."""
    B, side = len(x), x.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g)

    x = torch.cat([blur(part, round(share * side)) if share < 1 else part for part, share in zip(x.chunk(len(blurs)), blurs)])
    for cells, most in ((side, 0.05), (side // 4, 0.05), (side // 16, 0.04)):  # grain, the decoder's patches, and blotches of wrong tint
        noise = F.interpolate(uniform(-1.7, 1.7, B, 3, cells, cells), size=x.shape[-2:], mode="nearest" if cells == side else "bilinear")
        x = x + uniform(0, most, B, 1, 1, 1) * noise
    gain, tint, lift = uniform(0.88, 1.12, B, 1, 1, 1), uniform(0.96, 1.04, B, 3, 1, 1), uniform(-0.04, 0.04, B, 1, 1, 1)
    return (x * gain * tint + lift).clamp(0, 1)


def reconstruct(lab, images: np.ndarray, seed: int | None = None, batch_size: int = 16, progress: bool = False) -> np.ndarray:
    """Pictures sent through a model's autoencoder: uint8 (N, H, W, 3) before and after.

    With a seed the latents of every second one get noise, s uniform in 0 .. MOST for each picture; without one they get none.
    """
    from tqdm.auto import tqdm

    found, g = np.empty_like(images), torch.Generator().manual_seed(seed or 0)
    for start in tqdm(range(0, len(images), batch_size), desc="reconstructions", disable=not progress, leave=False):
        x = torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float() / 255
        z = lab.encode_image(x)  # (B, 4, h, w), of unit variance
        if seed is not None:
            s = MOST * torch.rand(len(z), 1, 1, 1, generator=g)
            s[1::2] = 0
            z = z + (s * torch.randn(z.shape, generator=g)).to(z)
        y = lab.decode(z).cpu()
        found[start : start + batch_size] = (y.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return found
