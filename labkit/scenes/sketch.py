"""The tabletop in coloured pencil: outlines from what the rays met, tone from hatching, a tint of each object's colour.

Lines are drawn where surface number, depth or normal jump (Saito & Takahashi 1990, "Comprehensible rendering of 3-D
shapes"); tone is laid on in layers of hatching, each for what is darker than its threshold (Praun et al. 2001).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from labkit.scenes import lighting, surfaces
from labkit.scenes.scene import COLOURS
from labkit.scenes.surfaces import World

PAPER = {"day": (0.965, 0.955, 0.925), "sunset": (0.985, 0.905, 0.800), "night": (0.700, 0.735, 0.815)}
WASH = {"day": (0.80, 0.87, 0.93), "sunset": (0.96, 0.66, 0.46), "night": (0.27, 0.31, 0.45)}  # of the backdrop
GRAPHITE = (0.19, 0.19, 0.21)


def draw(world: World, hits, size: int) -> Tensor:
    """A drawing (3, size, size), sRGB in [0, 1], of what the rays of a size x size picture met."""
    scene, device = world.scene, hits.depth.device
    origin, direction = scene.camera().origin, hits.direction
    point = tuple(origin[i] + hits.depth * direction[i] for i in range(3))
    step = 256 / size  # strokes keep their width relative to the picture
    column = torch.arange(size, device=device, dtype=torch.float32).repeat(size) * step
    row = torch.arange(size, device=device, dtype=torch.float32).repeat_interleave(size) * step
    paper, graphite = _rgb(PAPER[scene.light], device), _rgb(GRAPHITE, device)

    image = paper.expand(3, size * size).clone()
    tooth = _noise(column, row)  # the paper's grain takes the pencil unevenly
    on_wall, on_table = hits.surface == 0, hits.surface == 1
    wash = 0.75 * (point[2] * 0.45 + 0.25).clamp(0, 1) + 0.12 * torch.sin(0.55 * (column + 1.9 * row) + 2 * torch.sin(0.03 * row))
    image = torch.where(on_wall, torch.lerp(image, _rgb(WASH[scene.light], device), wash.clamp(0, 1)), image)

    dark, pattern = _table_tone(world, point, 2 * 0.245 / size * hits.depth, direction)
    image = torch.where(on_table, torch.lerp(image, _table_colour(world), pattern), image)
    tone = torch.where(on_table, dark, torch.zeros_like(dark))
    shine = torch.zeros_like(tone)
    for k, obj in enumerate(scene.objects):
        at = (hits.owner == k).nonzero()[:, 0]
        if not len(at):
            continue
        spot, normal = tuple(axis[at] for axis in point), hits.normal[:, at]
        lit = (normal[0] * world.light[0] + normal[1] * world.light[1] + normal[2] * world.light[2]).clamp_min(0)
        for j, other in enumerate(scene.objects):
            if j != k:
                lit = lit * (1 - 0.8 * lighting.occlusion(other, world.light, world.mood.spread, *spot))
        pigment = _rgb(COLOURS[obj.colour], device).clamp(0, 1) ** (1 / 2.2)
        pigment = pigment * 0.92 + 0.06
        cover = 0.90 - 0.32 * lit + 0.10 * (tooth[at] - 0.5)
        if obj.colour == "white":
            cover = cover * 0.9
        image[:, at] = torch.lerp(image[:, at], pigment, cover.clamp(0, 1))
        tone[at] = (0.80 - 0.85 * lit) * (0.6 if obj.colour == "white" else 1.0)
        if obj.material == "metal":  # bright streaks left white, with hard edges, and deeper darks
            shine[at] = _streaks(world, direction, at, normal)
            tone[at] = tone[at] + 0.22 * (0.5 - (normal[2] * 2.5 + normal[0]).sin().abs())
    image = torch.lerp(image, paper.clamp_min(0.93), 0.92 * shine)

    ink = _hatching(column, row, tone) * (0.75 + 0.5 * tooth) * (1 - shine)
    image = torch.lerp(image, image * 0.45 + graphite * 0.1, ink.clamp(0, 0.85))
    lines = _outlines(hits, size, column, row)
    image = torch.lerp(image, graphite, (lines * (0.80 + 0.4 * tooth)).clamp(0, 0.95))
    return (image + 0.02 * (tooth - 0.5)).clamp(0, 1).reshape(3, size, size)


def _rgb(colour: tuple, device) -> Tensor:
    return torch.tensor(colour, dtype=torch.float32, device=device)[:, None]


def _noise(column: Tensor, row: Tensor) -> Tensor:
    """Fixed, fine, uniform noise in 0..1: the fraction of a large sine."""
    value = torch.sin(column * 12.9898 + row * 78.233).double() * 43758.5453
    return (value - value.floor()).float()


def _table_tone(world: World, point: tuple, wide: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Darkness (N,) of the shadows on the table, and where (N,) its pattern is coloured."""
    x, y = point[0], point[1]
    hidden, near = 0.0, 0.0
    for obj in world.scene.objects:
        hidden = hidden + lighting.occlusion(obj, world.light, world.mood.spread, x, y, 0.0)
        near = near + lighting.contact(obj, x, y)
    dark = 0.62 * torch.as_tensor(hidden).clamp(0, 1) + 0.25 * torch.as_tensor(near).clamp(0, 1)
    wide_y = wide / (-direction[2]).clamp_min(0.1)
    albedo = surfaces.table_albedo(world, x, y, wide, wide_y)[1]
    if world.scene.table == "checkered":
        return dark, 0.62 * (world.pale[1] - albedo) / (world.pale[1] - world.dark[1])
    if world.scene.table == "wooden":
        return dark, (0.55 + 1.6 * (1 - albedo / world.wood[1])).clamp(0.1, 1)
    return dark, torch.full_like(dark, 0.10)


def _table_colour(world: World) -> Tensor:
    colour = {"plain": (0.60, 0.57, 0.52), "checkered": (0.30, 0.31, 0.34), "wooden": (0.62, 0.43, 0.25)}[world.scene.table]
    dim = 0.72 if world.scene.light == "night" else 1.0
    return _rgb(colour, world.device) * dim


def _streaks(world: World, direction: Tensor, at: Tensor, normal: Tensor) -> Tensor:
    """Where (N,) a metal surface mirrors the key light, widened to a streak."""
    ray = F.normalize(direction[:, at], dim=0)
    mirror = ray - 2 * (ray * normal).sum(0) * normal
    facing = mirror[0] * world.light[0] + mirror[1] * world.light[1] + mirror[2] * world.light[2]
    return ((facing - 0.86) / 0.05).clamp(0, 1)


def _hatching(column: Tensor, row: Tensor, tone: Tensor) -> Tensor:
    """Ink (N,) of up to three layers of strokes, each in its own direction."""
    ink = torch.zeros_like(tone)
    for threshold, a, b, phase in ((0.18, 0.62, 0.62, 0.0), (0.42, 0.75, -0.40, 1.0), (0.66, 0.10, 0.85, 2.0)):
        wobble = 0.9 * torch.sin(0.021 * column - 0.034 * row + phase) + 0.4 * torch.sin(0.11 * row + 0.07 * column)
        stroke = torch.sin(a * column + b * row + wobble) * 0.5 + 0.5
        depth = ((tone - threshold) / 0.30).clamp(0, 1)
        ink = ink + 0.75 * depth * ((stroke - 0.62 + 0.42 * depth) / 0.30).clamp(0, 1)
    return ink


def _outlines(hits, size: int, column: Tensor, row: Tensor) -> Tensor:
    """Pencil lines (N,) where the surface changes, a little uneven in strength."""
    surface = hits.surface.reshape(1, 1, size, size).float()
    padded = F.pad(surface, (1, 1, 1, 1), mode="replicate")
    jump = (F.max_pool2d(padded, 3, 1) != -F.max_pool2d(-padded, 3, 1)).float()
    horizon = (F.max_pool2d(padded, 3, 1) <= 1).float()
    soft = F.avg_pool2d(F.pad(jump * (1 - 0.55 * horizon), (1, 1, 1, 1), mode="replicate"), 3, 1).flatten()
    pressure = 0.80 + 0.20 * torch.sin(0.09 * column + 0.05 * row) * torch.sin(0.043 * row - 0.02 * column)
    return (1.25 * soft).clamp(0, 1) * pressure
