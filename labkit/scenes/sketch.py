"""The tabletop in coloured pencil: outlines from what the rays met, tone from hatching, a tint of each object's colour.

Lines are drawn where the surface number jumps (Saito & Takahashi 1990, "Comprehensible rendering of 3-D
shapes"); tone is laid on in layers of hatching, each for what is darker than its threshold (Praun et al. 2001).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from labkit.scenes import lighting, surfaces
from labkit.scenes.camera import HALF_VIEW
from labkit.scenes.scene import COLOURS
from labkit.scenes.solids import own_axes
from labkit.scenes.surfaces import World

PAPER = {"day": (0.965, 0.955, 0.925), "sunset": (0.985, 0.905, 0.800), "night": (0.700, 0.735, 0.815)}
WASH = {"day": (0.80, 0.87, 0.93), "sunset": (0.96, 0.66, 0.46), "night": (0.27, 0.31, 0.45)}  # of the backdrop
GRAPHITE = (0.19, 0.19, 0.21)


@dataclass(frozen=True)
class Sheet:
    """What does not depend on the scene: the paper's grain and the pencil's strokes, each (N,) over the pixels."""

    tooth: Tensor  # grain in 0..1, which takes the pencil unevenly
    wash: Tensor  # loose strokes for the backdrop, -1..1
    strokes: tuple  # three directions of hatching, 0..1
    pressure: Tensor  # of the outlines


@lru_cache(maxsize=4)
def _sheet(size: int, device: torch.device) -> Sheet:
    step = 256 / size  # strokes keep their width relative to the picture
    column = torch.arange(size, device=device, dtype=torch.float32).repeat(size) * step
    row = torch.arange(size, device=device, dtype=torch.float32).repeat_interleave(size) * step
    tooth = torch.sin((column * 12.9898 + row * 78.233).double()) * 43758.5453  # its fraction is as good as random
    strokes = []
    for a, b, phase in ((0.60, 0.62, 0.0), (0.82, 0.34, 1.0), (0.36, 0.84, 2.0)):
        wobble = 0.9 * torch.sin(0.021 * column - 0.034 * row + phase) + 0.4 * torch.sin(0.11 * row + 0.07 * column)
        strokes.append(torch.sin(a * column + b * row + wobble) * 0.5 + 0.5)
    return Sheet(
        tooth=(tooth - tooth.floor()).float(),
        wash=torch.sin(0.42 * (column + 1.9 * row) + 2 * torch.sin(0.03 * row)),
        strokes=tuple(strokes),
        pressure=0.80 + 0.20 * torch.sin(0.09 * column + 0.05 * row) * torch.sin(0.043 * row - 0.02 * column),
    )


def draw(world: World, hits, size: int) -> Tensor:
    """A drawing (3, size, size), sRGB in [0, 1], of what the rays of a size x size picture met."""
    scene, device, sheet = world.scene, hits.depth.device, _sheet(size, hits.depth.device)
    origin, direction = scene.camera().origin, hits.direction
    point = tuple(origin[i] + hits.depth * direction[i] for i in range(3))
    paper, graphite = _rgb(PAPER[scene.light], device), _rgb(GRAPHITE, device)
    image = paper.expand(3, size * size).clone()
    tone, shine = torch.zeros_like(hits.depth), torch.zeros_like(hits.depth)

    at = (hits.surface == 0).nonzero()[:, 0]
    wash = 0.75 * (point[2][at] * 0.45 + 0.25).clamp(0, 1) + 0.10 * sheet.wash[at]
    image.index_copy_(1, at, torch.lerp(paper, _rgb(WASH[scene.light], device), wash.clamp(0, 1)))

    at = (hits.surface == 1).nonzero()[:, 0]
    wide = 2 * HALF_VIEW / size * hits.depth[at]
    dark, pattern = _table_tone(world, point[0][at], point[1][at], wide, wide / -direction[2][at])
    image.index_copy_(1, at, torch.lerp(paper, _table_colour(world), pattern))
    tone.index_copy_(0, at, dark)

    for k, obj in enumerate(scene.objects):
        at = (hits.owner == k).nonzero()[:, 0]
        if not len(at):
            continue
        spot, normal = tuple(axis[at] for axis in point), hits.normal.index_select(1, at)
        lit = (normal[0] * world.light[0] + normal[1] * world.light[1] + normal[2] * world.light[2]).clamp_min(0)
        for j, other in enumerate(scene.objects):
            if j != k:
                lit = lit * (1 - 0.8 * lighting.occlusion(other, world.light, world.mood.spread, *spot))
        pigment = 0.92 * _rgb(COLOURS[obj.colour], device) ** (1 / 2.2) + 0.06
        cover = 0.90 - 0.32 * lit + 0.10 * (sheet.tooth[at] - 0.5)
        image.index_copy_(1, at, torch.lerp(paper, pigment, cover.clamp(0, 1)))
        darkness = (0.80 - 0.85 * lit) * (0.6 if obj.colour == "white" else 1.0)
        if obj.material == "metal":  # bright streaks left white, and bands of light and dark
            if obj.shape == "cube":
                bright = _gleam(obj, spot, normal)
                darkness = darkness + 0.28 * (1 - bright)
            else:
                bright = _streaks(world, direction.index_select(1, at), normal)
                darkness = darkness + 0.40 * (0.5 - (3.0 * normal[0] + 2.2 * normal[2] + 0.8 * spot[2]).sin().abs())
            shine.index_copy_(0, at, bright)
        tone.index_copy_(0, at, darkness)
    image = torch.lerp(image, paper.clamp_min(0.93), 0.92 * shine)

    ink = _hatching(sheet, tone) * (0.75 + 0.5 * sheet.tooth) * (1 - shine)
    image = torch.lerp(image, image * 0.45 + graphite * 0.1, ink.clamp(0, 0.85))
    lines = _outlines(hits.surface.reshape(size, size)) * sheet.pressure * (0.80 + 0.4 * sheet.tooth)
    image = torch.lerp(image, graphite, lines.clamp(0, 0.95))
    return (image + 0.02 * (sheet.tooth - 0.5)).clamp(0, 1).reshape(3, size, size)


def _rgb(colour: tuple, device) -> Tensor:
    return torch.tensor(colour, dtype=torch.float32, device=device)[:, None]


def _table_tone(world: World, x: Tensor, y: Tensor, wide_x: Tensor, wide_y: Tensor) -> tuple[Tensor, Tensor]:
    """Darkness (N,) of the shadows on the table, and where (N,) its pattern is coloured."""
    hidden, near = torch.zeros_like(x), torch.zeros_like(x)
    for obj in world.scene.objects:
        hidden = hidden + lighting.occlusion(obj, world.light, world.mood.spread, x, y, 0.0)
        near = near + lighting.contact(obj, x, y)
    dark = 0.55 * hidden.clamp(0, 1) + 0.30 * near.clamp(0, 1)
    green = surfaces.table_albedo(world, x, y, wide_x, wide_y)[1]
    if world.scene.table == "checkered":
        return dark, 0.62 * (world.pale[1] - green) / (world.pale[1] - world.dark[1])
    if world.scene.table == "wooden":
        return dark, (0.55 + 1.6 * (1 - green / world.wood[1])).clamp(0.1, 1)
    return dark, torch.full_like(dark, 0.10)


def _table_colour(world: World) -> Tensor:
    colour = {"plain": (0.60, 0.57, 0.52), "checkered": (0.30, 0.31, 0.34), "wooden": (0.62, 0.43, 0.25)}[world.scene.table]
    dim = 0.72 if world.scene.light == "night" else 1.0
    return _rgb(colour, world.device) * dim


def _streaks(world: World, direction: Tensor, normal: Tensor) -> Tensor:
    """Where (N,) a metal surface mirrors the key light or something near it."""
    ray = direction * (direction**2).sum(0).rsqrt()
    mirror = ray - 2 * (ray * normal).sum(0) * normal
    facing = mirror[0] * world.light[0] + mirror[1] * world.light[1] + mirror[2] * world.light[2]
    return ((facing - 0.86) / 0.05).clamp(0, 1)


def _gleam(obj, spot: tuple, normal: Tensor) -> Tensor:
    """Where (N,) a metal cube gleams: two slanting strokes across each face. A flat face mirrors one spot only, mostly a dark one, and would look like rubber."""
    along = torch.stack([*own_axes(obj, spot[0] - obj.x, spot[1] - obj.y), spot[2] - obj.radius]) / obj.radius  # (3, N), -1..1 in the cube's own axes
    facing = torch.stack([*own_axes(obj, normal[0], normal[1]), normal[2]]).abs()
    across = (along * (1 - facing)).sum(0)  # from corner to corner of the face, -2..2
    broad, narrow = 0.28 - (across - 0.30).abs(), 0.13 - (across + 0.40).abs()
    return (torch.maximum(broad, narrow) / 0.10).clamp(0, 1)


def _hatching(sheet: Sheet, tone: Tensor) -> Tensor:
    """Ink (N,) of up to three layers of strokes, each in its own direction and for darker places only."""
    ink = torch.zeros_like(tone)
    for threshold, stroke in zip((0.16, 0.50, 0.78), sheet.strokes):
        depth = ((tone - threshold) / 0.34).clamp(0, 1)
        ink = ink + 0.75 * depth * ((stroke - 0.62 + 0.42 * depth) / 0.30).clamp(0, 1)
    return ink


def _outlines(surface: Tensor) -> Tensor:
    """Pencil lines (H W,) where the surface number (H, W) changes, fainter between table and backdrop."""
    lines = torch.zeros(surface.shape, device=surface.device)
    for here, there in (((slice(None), slice(1, None)), (slice(None), slice(None, -1))), ((slice(1, None),), (slice(None, -1),))):
        one, two = surface[here], surface[there]
        strength = (one != two) * torch.where(torch.maximum(one, two) > 1, 1.0, 0.45)
        lines[here] = torch.maximum(lines[here], strength)
        lines[there] = torch.maximum(lines[there], strength)
    padded = F.pad(lines[None], (1, 1, 1, 1), mode="replicate")[0]
    wide = padded[:-2] + padded[1:-1] + padded[2:]
    return ((wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]) * (1.45 / 9)).clamp(0, 1).flatten()
