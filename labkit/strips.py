"""Decoding a large picture in little memory: the feature maps cut into strips of rows, the result that of the whole.

    mu = sum_i p_i mu_i,   var = sum_i p_i (var_i + (mu_i - mu)^2)      p_i: strip i's share of the rows; the law of total variance
    conv(x)[rows a..b] = conv(x[rows a-1..b+1]) without its outer rows  a 3x3 convolution sees one row up and one down

Tiles that are decoded each by itself and blended (Stable Diffusion's usual tiled decoding) differ from the whole picture: GroupNorm (Wu & He 2018)
takes mean and variance over all of it, and the attention of the middle looks everywhere. So the middle, at 1/f of the size, is
computed whole. After it every map is a list of strips; a norm takes its statistics over all of them, a convolution runs strip by strip
with a row of each neighbour, and an input strip is let go as soon as its output is there. So it holds about one map of the widest
layer, where the plain decoder holds three (it, its norm, its SiLU): for Stable Diffusion 1.5 at 1024 pixels 1.3 GiB instead of 3.0, at 2048
4.8 instead of 12 (`tests/benchmarks/decode_memory.py`).
Nothing is computed twice but the outer rows. The order in which a sum is taken is all that differs, some 1e-6 in float32.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.errors import LabkitError
from labkit.models.layers import ResnetBlock
from labkit.models.vae import VAE

STRIP = 2**16  # pixels: 64 MB of the widest map of Stable Diffusion's decoder; 64 rows of a picture of 1024
CACHED = 2**12  # pixels that statistics are taken of at a time: 2 MB of 128 channels

Strips = list[Tensor]  # of one map (B, C, h, w), from the top down: each (B, C, rows, w)


@torch.no_grad()
def decode_in_strips(vae: VAE, z: Tensor, pixels: int = STRIP) -> Tensor:
    """`vae.decode(z)` to rounding, in less memory: (B, 4, h, w) -> (B, 3, H, W); no gradients.

    `pixels` is the size of a strip, at the resolution of the map that it is of; a strip has at least one row. Raises LabkitError
    if `z` has another shape or `pixels` is not positive.
    """
    if z.ndim != 4 or z.shape[1] != vae.config.latent_channels:
        raise LabkitError(f"z has shape {tuple(z.shape)}, expected (B, {vae.config.latent_channels}, h, w)")
    if pixels < 1:
        raise LabkitError(f"Strips of {pixels} pixels cannot be: give a positive number, such as {STRIP}.")
    decoder = vae.decoder
    strips = [decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z)))]  # one: the middle is whole
    for stage in decoder.up_blocks:
        strips = cut(strips, pixels)
        for block in stage.resnets:
            strips = resnet(block, strips)
        for double in getattr(stage, "upsamplers", ()):
            strips = list(by_strips(double, cut(strips, pixels // 4), scale=2))  # a quarter in, `pixels` out
    norm = whole_norm(decoder.conv_norm_out, strips)
    return torch.cat(list(by_strips(lambda x: decoder.conv_out(F.silu(norm(x))), strips)), dim=2)  # (B, 3, H, W)


def cut(strips: Strips, pixels: int) -> Strips:
    """The same map in strips of at most so many pixels, but at least a row; empties the list given."""
    rows = max(1, pixels // strips[0].shape[3])
    return [part for _ in range(len(strips)) for part in strips.pop(0).split(rows, dim=2)]


def by_strips(f: Callable[[Tensor], Tensor], strips: Strips, scale: int = 1) -> Iterator[Tensor]:
    """The strips of f(whole map), for an f that sees one row up and down and makes `scale` rows of each; empties the list given."""
    above = None  # the row above the strip
    while strips:
        here = strips.pop(0)
        window = [row for row in (above, here, strips[0][:, :, :1] if strips else None) if row is not None]
        skip = 0 if above is None else scale
        above, rows = here[:, :, -1:].clone(), scale * here.shape[2]
        del here
        yield f(torch.cat(window, dim=2))[:, :, skip : skip + rows]  # (B, C', scale * rows, w')


def whole_norm(norm: nn.GroupNorm, strips: Strips) -> Callable[..., Tensor]:
    """The norm as a function of any rows of the map, with the statistics of all of it; in float32 at least. It can be told where to write: `out`."""
    dtype = torch.promote_types(strips[0].dtype, torch.float32)
    parts = [part for s in strips for part in s.split(max(1, CACHED // s.shape[3]), dim=2)]
    mean, var = (torch.stack(values).unflatten(2, (norm.num_groups, -1)) for values in zip(*(moments(x.to(dtype)) for x in parts)))
    rows = torch.tensor([x.shape[2] for x in parts], dtype=dtype, device=mean.device)
    p = (rows / rows.sum())[:, None, None, None]  # (parts, 1, 1, 1); mean, var (parts, B, groups, C / groups)
    mu = (p * mean).sum(0).mean(-1, keepdim=True)  # (B, groups, 1)
    var = (p * (var + (mean - mu) ** 2)).sum(0).mean(-1, keepdim=True)  # a group's channels are equal shares
    mu, var = (x.expand(mean.shape[1:]).flatten(1) for x in (mu, var))  # (B, C)
    scale = (var + norm.eps).rsqrt() * norm.weight
    shift = norm.bias - mu * scale
    scale, shift = (x.to(dtype)[:, :, None, None] for x in (scale, shift))  # (B, C, 1, 1)
    return lambda x, out=None: torch.addcmul(shift, x.to(dtype), scale, out=out).to(x.dtype)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of a map (B, C, h, w): two of (B, C). Twice over it, but several times faster than torch.var_mean."""
    mean = x.mean((2, 3), keepdim=True)
    return mean[:, :, 0, 0], (x - mean).square_().mean((2, 3))


def resnet(block: ResnetBlock, strips: Strips) -> Strips:
    """A ResNet block without timestep, of a map in strips; empties the list given."""
    norm1 = whole_norm(block.norm1, strips)
    h, skip = [], []
    for y in by_strips(lambda x: block.conv1(F.silu(norm1(x))), list(strips)):
        x = strips.pop(0)
        skip.append(block.conv_shortcut(x) if hasattr(block, "conv_shortcut") else x)
        h.append(y)
    norm2 = whole_norm(block.norm2, h)
    return [skip.pop(0) + y for y in by_strips(lambda x: block.conv2(F.silu(norm2(x))), h)]
