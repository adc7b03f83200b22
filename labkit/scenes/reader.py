"""The network that reads a picture: for every second pixel what it belongs to, and for the whole picture its light, style and table.

    h_i = down(h_{i-1}), i = 1..4 (32x32 .. 4x4);   t_i = mix(W_i t_{i+1} doubled + h_i)          a pyramid: Lin et al. 2017, arXiv:1612.03144
    maps(y, x) = head(t_1): is there an object; where does it stand; its shape, colour, material, size
    foot(y, x) = (y, x) + 16 maps["foot"](y, x)                                                  each pixel votes for its object's foot

The foot is the middle of an object's footprint on the table, as the camera sees it. Objects do not stand in each other, so their feet are apart
also where one hides half of the other and both look alike; and from a foot follows the place on the table (scenes/verify.py). Votes
for a centre, but of boxes or masks: Cheng et al. 2020, arXiv:1911.10194. Weights are in data/verifier, written by training/verifier.py.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from labkit.errors import CheckpointError
from labkit.scenes.scene import COLOURS, LIGHTS, MATERIALS, SHAPES, SIZES, STYLES, TABLES

SIDE = 128  # pixels of the pictures it reads
CELLS = SIDE // 2  # of its maps, along each side: a cell is 2x2 pixels
REACH = 16.0  # cells: the unit of a vote
OBJECT = {"shape": SHAPES, "colour": tuple(COLOURS), "material": MATERIALS, "size": SIZES}  # said of every cell, meant where there is an object
PICTURE = {"light": LIGHTS, "style": STYLES, "table": TABLES}  # said of the whole picture
MAPS = {"object": 1, "foot": 2, **{name: len(values) for name, values in OBJECT.items()}}  # channels
WEIGHTS = Path(__file__).parents[2] / "data" / "verifier"


@dataclass(frozen=True)
class ReaderConfig:
    """How wide and how deep; the defaults cost 0.1 billion multiplications a picture."""

    stem: int = 16  # channels at 64x64
    widths: tuple[int, ...] = (32, 64, 96, 128)  # at 32x32, 16x16, 8x8, 4x4
    blocks: tuple[int, ...] = (1, 2, 2, 1)  # residual blocks at each


class Residual(nn.Module):
    """h + ReLU(norm(conv(h))), (B, width, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, h: Tensor) -> Tensor:
        return h + F.relu(self.norm(self.conv(h)))


class Down(nn.Module):
    """ReLU(norm(conv(h))) at half the side, (B, ins, h, w) -> (B, outs, h / 2, w / 2)."""

    def __init__(self, ins: int, outs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, kernel, 2, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outs)

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(h)))


class Reader(nn.Module):
    """reader(image (B, 3, 128, 128) in [0, 1]) -> {name of MAPS: (B, channels, 64, 64), name of PICTURE: (B, number of values)}.

    All are logits, but for the votes "foot", in units of 16 cells. Pictures of another size give maps of half their size.
    """

    def __init__(self, config: ReaderConfig = ReaderConfig()) -> None:
        super().__init__()
        self.config, widths = config, config.widths
        self.stem = Down(5, config.stem, 5)
        self.downs = nn.ModuleList(Down(i, o) for i, o in zip((config.stem, *widths), widths))
        self.blocks = nn.ModuleList(nn.Sequential(*(Residual(w) for _ in range(n))) for w, n in zip(widths, config.blocks))
        self.laterals = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(widths[1:], widths))
        self.mixes = nn.ModuleList(Residual(w) for w in widths[:-1])
        self.head = nn.Conv2d(widths[0], 4 * sum(MAPS.values()), 1)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * sum(widths[1:3]), len(values)) for name, values in PICTURE.items()})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        h, maps = self.stem(torch.cat([(image - 0.5) * 4, places(image)], dim=1)), []  # (B, stem, 64, 64)
        for down, blocks in zip(self.downs, self.blocks):
            h = blocks(down(h))  # (B, widths[i], 32 / 2^i, 32 / 2^i)
            maps.append(h)
        told = torch.cat([part for m in maps[1:3] for part in (m.mean((2, 3)), m.amax((2, 3)))], dim=1)  # (B, 2 (widths[1] + widths[2]))
        for lateral, mix, m in zip(reversed(self.laterals), reversed(self.mixes), reversed(maps[:-1])):
            h = mix(m + F.interpolate(lateral(h), scale_factor=2.0))  # (B, widths[i], 32 / 2^i, 32 / 2^i)
        said = F.pixel_shuffle(self.head(h), 2).split(list(MAPS.values()), dim=1)  # (B, channels, 64, 64) each
        return dict(zip(MAPS, said)) | {name: head(told) for name, head in self.heads.items()}


def places(image: Tensor) -> Tensor:
    """Where each pixel is, -1 to 1 down and across, (B, 2, H, W): how large a thing is depends on how far up it stands (Liu et al. 2018)."""
    down, across = (torch.linspace(-1, 1, n, device=image.device, dtype=image.dtype) for n in image.shape[-2:])
    return torch.stack(torch.meshgrid(down, across, indexing="ij")).expand(len(image), -1, -1, -1)  # (B, 2, H, W)


def load_reader(folder: str | Path = WEIGHTS) -> Reader:
    """The trained reader in evaluation mode; CheckpointError if its files are missing or not its own."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["says"] != says():
            raise CheckpointError("its attributes are not this version's")
        reader = Reader(ReaderConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in config["reader"].items()}))
        state = {name: value.float() if value.is_floating_point() else value for name, value in load_file(folder / "model.safetensors").items()}
        reader.load_state_dict(state)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: the verifier cannot be opened ({reason}); fetch it again (git checkout)") from error
    return reader.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def says() -> dict[str, list[str]]:
    """What the weights are able to say, as stored beside them."""
    return {name: list(values) for name, values in (OBJECT | PICTURE).items()}


def describe_reader(reader: Reader) -> dict:
    """The part of config.json that `load_reader` needs."""
    return {"reader": asdict(reader.config), "says": says()}
