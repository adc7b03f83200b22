"""A wider U-Net that begins with what a narrow one knows, after Chen et al. 2016, "Net2Net: Accelerating Learning via Knowledge Transfer".

    W' = [ W    0 ]      the rows that there were, reading the channels that there were
         [ W~   0 ]      rows of new channels: copies of old ones and noise, read by nobody yet

Net2Net's own copies share what follows among them. Under Adam, whose steps do not feel the size of a gradient, they would stay copies for ever; so here nobody reads a new channel at
first, and the noise tells it from its pattern. What a network computes over many channels at once must not notice: every group of a GroupNorm and every head of an attention gets its
share of the new channels, which vary as the old ones do, and queries grow by sqrt(d' / d) where the scores are divided by sqrt(d'). The frequencies of a timestep embedding twice as wide are
the old ones and one more behind each.
"""
import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from labkit.errors import LabkitError
from labkit.models.config import UNetConfig
from labkit.models.unet import UNet


def widen(narrow: UNet, config: UNetConfig, noise: float = 0.5, seed: int = 0) -> UNet:
    """A U-Net of this config, that predicts what `narrow` does: exactly without noise and with all levels wider by one factor, nearly otherwise. `narrow` is not changed.

    noise: standard deviation of what is added to a copy, in those of the row it copies. Raises LabkitError where anything but the widths differs or a width shrinks.
    """
    reason = obstacle(narrow.config, config)
    if reason:
        raise LabkitError(reason)
    g, wide, old = torch.Generator().manual_seed(seed), UNet(config), narrow.state_dict()
    new = {name: widened(name, old[name].float(), value.shape, (narrow.config, config), noise, g) for name, value in wide.state_dict().items()}
    wide.load_state_dict(new)
    return wide


def obstacle(narrow: UNetConfig, wide: UNetConfig) -> str | None:
    """Why a network of the one cannot begin as one of the other; None if it can."""
    a, b, groups = narrow.block_out_channels, wide.block_out_channels, narrow.norm_num_groups
    if len(a) != len(b) or replace(narrow, block_out_channels=b) != wide:
        return f"{wide} differs from {narrow} in more than block_out_channels; only these can grow"
    if b[0] % a[0] or any(m < n or m % groups for n, m in zip(a, b)):
        return f"block_out_channels {a} cannot grow to {b}: give multiples of {groups} (norm_num_groups), none smaller than before, the first a multiple of what it was"
    if [n == m for n, m in zip(a, a[1:])] != [n == m for n, m in zip(b, b[1:])]:
        return f"block_out_channels {a} cannot grow to {b}: where neighbours differ a ResNet block has a shortcut with weights; give widths that differ where they did"
    return None


def widened(name: str, value: Tensor, shape: torch.Size, configs: tuple[UNetConfig, UNetConfig], noise: float, g: torch.Generator) -> Tensor:
    """One parameter (out, in, ...) or (out,) of the wide network."""
    before, after = ([parts(name, axis, size, config) for axis, size in enumerate(which[:2])] for which, config in ((value.shape, configs[0]), (shape, configs[1])))
    _, source, fresh = spread(before[0], after[0])
    rows = value[source]  # (out', in, ...)
    query = "to_q." in name
    if value.ndim > 1:
        some = fresh.view(-1, *[1] * (value.ndim - 1))
        spread_of = rows.flatten(1).std(1).view_as(some)
        copies = (rows + noise * spread_of * torch.randn(rows.shape, generator=g)) / math.sqrt(1 + noise**2)
        rows = torch.where(some, torch.zeros(()) if query else copies, rows)
    if query:
        rows = rows * math.sqrt(len(rows) / len(value))
    if value.ndim == 1:
        return rows
    out = torch.zeros(shape)
    out[:, spread(before[1], after[1])[0]] = rows
    return out


def parts(name: str, axis: int, size: int, config: UNetConfig) -> list[int]:
    """The lengths of what lies one after the other along an axis of a parameter."""
    joined = re.match(r"up_blocks\.(\d+)\.resnets\.(\d+)\.(norm1|conv1\.weight|conv_shortcut\.weight)", name)
    if joined and axis == (joined[3] != "norm1"):  # the stream and a skip
        level = len(config.block_out_channels) - 1 - int(joined[1])
        stream = config.block_out_channels[min(level + (joined[2] == "0"), len(config.block_out_channels) - 1)]
        return [stream, size - stream]
    if (name == "time_embedding.linear_1.weight" and axis == 1) or (".ff.net.0.proj." in name and axis == 0):  # cosines and sines; value and gate
        return [size // 2, size // 2]
    return [size]


def spread(before: list[int], after: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Where old channels come to lie (n,), which old one every channel is or copies (n',), and which are copies (n',)."""
    place, source, fresh, start, end = [], [], [], 0, 0
    for n, m in zip(before, after):
        per, wide = n // math.gcd(n, m), m // math.gcd(n, m)  # copies right behind what they copy, so that every group and head has its share
        at, to = torch.arange(n), torch.arange(m)
        place.append(end + at // per * wide + at % per)
        source.append(start + to // wide * per + to % wide % per)
        fresh.append(to % wide >= per)
        start, end = start + n, end + m
    return torch.cat(place), torch.cat(source), torch.cat(fresh)
