"""The places of a U-Net that can be recorded: what they are called and what shape they have.

    kind       tap             axes
    cross      *.attn2.probs   head, y, x, token          attention of places to the text
    self       *.attn1.probs   head, y, x, key_y, key_x   attention of places to places
    queries    *.attn2.q       head, y, x, channel        what cross-attention compares with the keys of the text
    resid      *.resid         channel, y, x              the residual stream after each block; `mid` is the middle block's alone

    up_blocks.1.attentions.0.transformer_blocks.0.attn2   is   up.1.0.0   for short, and   up.1   is all layers of that block

Shapes are known before anything is drawn, from the network's configuration, so a recording can say beforehand what it will take.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from labkit.errors import LabkitError
from labkit.models.layers import Attention
from labkit.models.unet import UNet
from labkit.tap import matching

PATTERNS = {"cross": "*.attn2.probs", "self": "*.attn1.probs", "queries": "*.attn2.q", "resid": "*.resid", "mid": "mid_block.resid"}
AXES = {
    "cross": ("head", "y", "x", "token"),
    "self": ("head", "y", "x", "key_y", "key_x"),
    "queries": ("head", "y", "x", "channel"),
    "resid": ("channel", "y", "x"),
}
WITHOUT_MIDDLE = ("down", "up")
PARTS = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


@dataclass(frozen=True)
class Site:
    """One tap: its name, its kind, the layer it belongs to, and the shape of what flows through it for one picture, axes as in `AXES`."""

    tap: str
    kind: str
    layer: str
    shape: tuple[int, ...]


def sites(unet: UNet, kind: str, size: tuple[int, int], tokens: int) -> list[Site]:
    """The sites of a kind in a U-Net that draws latents of `size` (h, w) and reads `tokens` tokens; LabkitError if it has none."""
    found = []
    for tap in matching(unet, PATTERNS[kind]):
        layer, depth = tap.rpartition(".")[0], level(tap, len(unet.config.block_out_channels))
        width, (y, x) = unet.config.block_out_channels[depth], (n >> depth for n in size)
        owner, kind_ = unet.get_submodule(layer), "resid" if kind == "mid" else kind
        heads = owner.num_heads if isinstance(owner, Attention) else 1
        shapes = {"cross": (heads, y, x, tokens), "self": (heads, y, x, y, x), "queries": (heads, y, x, width // heads), "resid": (width, y, x)}
        found.append(Site(tap, kind_, layer, shapes[kind_]))
    return found


def level(name: str, levels: int) -> int:
    """How often the picture has been halved where a tap or layer is; 0 is the latents' own size."""
    part, number, *_ = name.split(".")
    if part == "mid_block":
        return levels - 1
    return int(number) if part == "down_blocks" else levels - 1 - int(number)


def aspect(n: int, h: int, w: int) -> tuple[int, int]:
    """(y, x) of n places of a picture whose latents are h x w."""
    return next((h // f, w // f) for f in range(1, h + 1) if h % f == w % f == 0 and (h // f) * (w // f) == n)


def short(layer: str) -> str:
    """A layer's short name: its block and the numbers in it, "up.1.0.0" for the first block of the first transformer of up_blocks.1."""
    part, *rest = layer.split(".")
    return ".".join([PARTS.get(part, part), *(n for n in rest if n.isdigit())])


def named(layers: tuple[str, ...], pattern: str | tuple[str, ...]) -> tuple[str, ...]:
    """The layers that a name, a short name, the beginning of one ("up.1") or a shell pattern fits, in their order; LabkitError if none does."""
    patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)
    found = tuple(layer for layer in layers if any(fits(layer, one) for one in patterns))
    if not found:
        raise LabkitError(f"No recorded layer matches {', '.join(map(repr, patterns))}; there are: {', '.join(layers) or 'none'}.")
    return found


def fits(layer: str, pattern: str) -> bool:
    brief = short(layer)
    return fnmatchcase(layer, pattern) or fnmatchcase(brief, pattern) or f"{brief}.".startswith(f"{pattern}.")
