"""Ray tracer of the tabletop: scenes -> pictures, masks, depth and normals.

One ray through the middle of every pixel; pixels that touch an edge or a crease (where the surface seen differs from
a neighbour's) get eight more rays and show their mean. Textures and shadows are filtered in closed form and need none.
Scenes are rendered one at a time: a scene's tensors then fit the processor's cache, which is faster than a batch, and
a picture cannot depend on its neighbours in the batch.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from labkit.errors import LabkitError
from labkit.scenes import surfaces
from labkit.scenes.camera import HALF_VIEW, screen_box
from labkit.scenes.scene import Scene
from labkit.scenes.sketch import draw
from labkit.scenes.solids import intersect
from labkit.scenes.surfaces import World

BACKDROP, TABLE = 0, 1  # surface numbers; the parts of object k are 4 k + 2, 4 k + 3, ...
# Eight rooks that do not attack each other: sample places within a pixel, from its centre, in pixels.
ROOKS = tuple(((row + 0.5) / 8 - 0.5, (column + 0.5) / 8 - 0.5) for row, column in enumerate((2, 5, 7, 0, 4, 1, 6, 3)))


@dataclass(frozen=True)
class Render:
    """Pictures of B scenes with at most K objects each, H = W = size."""

    image: Tensor  # (B, 3, H, W) sRGB in [0, 1]
    masks: Tensor  # (B, K, H, W) share of each pixel that object k covers
    depth: Tensor  # (B, H, W) along the optical axis, in table units
    normals: Tensor  # (B, 3, H, W) unit, in world axes: x right, y away, z up


@dataclass(frozen=True)
class Hits:
    """What N rays meet first."""

    depth: Tensor  # (N,)
    surface: Tensor  # (N,) int32
    normal: Tensor  # (3, N)

    @property
    def owner(self) -> Tensor:
        """Index of the object hit (N,), -1 for table and backdrop."""
        return torch.div(self.surface + 2, 4, rounding_mode="floor") - 1


def render(scenes: Scene | Sequence[Scene], size: int = 128, device: str | torch.device | None = None) -> Render:
    """Render scenes at size x size pixels; on the CPU unless a device is named."""
    scenes = [scenes] if isinstance(scenes, Scene) else list(scenes)
    if not scenes or size < 8:
        raise LabkitError(f"render needs at least one scene and size >= 8, got {len(scenes)} scenes and size {size}")
    most = max(len(scene.objects) for scene in scenes)
    with torch.inference_mode():
        images, masks, depths, normals = zip(*(_render_one(scene, size, torch.device(device or "cpu")) for scene in scenes))
        masks = [F.pad(mask, (0, 0, 0, 0, 0, most - len(mask))) for mask in masks]
    # Cloned outside inference mode, so that the result may enter a graph.
    return Render(*(torch.stack(parts).clone() for parts in (images, masks, depths, normals)))


def render_many(scenes: Sequence[Scene], workers: int = 2, progress: bool = False, size: int = 128) -> np.ndarray:
    """Pictures of many scenes as uint8 (N, size, size, 3), rendered by `workers` processes."""
    scenes = list(scenes)
    pictures = np.empty((len(scenes), size, size, 3), np.uint8)
    chunks = [scenes[start : start + 32] for start in range(0, len(scenes), 32)]
    for i, chunk in enumerate(_bar(_chunks(chunks, size, workers), len(chunks), progress)):
        pictures[32 * i : 32 * i + len(chunk)] = chunk
    return pictures


def _chunks(chunks: list[list[Scene]], size: int, workers: int) -> Iterator[np.ndarray]:
    if workers <= 1 or len(chunks) <= 1:
        yield from (_to_bytes(chunk, size) for chunk in chunks)
        return
    # "spawn" starts clean interpreters: forking a process in which torch has threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(_to_bytes, chunks, [size] * len(chunks))


def _to_bytes(scenes: list[Scene], size: int) -> np.ndarray:
    image = render(scenes, size).image
    return (image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _bar(items: Iterator, total: int, progress: bool) -> Iterator:
    if not progress:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, total=total, unit=" x 32 scenes")


def _render_one(scene: Scene, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    world = World(scene, device)
    pixel = 2 * HALF_VIEW / size  # width of a pixel at depth 1
    places = torch.arange(size, dtype=torch.float32, device=device) + 0.5
    u, v = places.repeat(size), places.repeat_interleave(size)  # (N,), N = H W
    rays = _rays(scene, u / size, v / size)
    hits = trace(world, rays, u / size, v / size)
    owners = torch.arange(len(scene.objects), device=device)[:, None]
    masks = (hits.owner == owners).float()  # (K, N)
    linear = shade(world, rays, hits, pixel)  # (3, N)

    edge = _edges(hits.surface.reshape(size, size)).flatten().nonzero()[:, 0]  # (E,)
    if len(edge):
        offset = torch.tensor(ROOKS, device=device)  # (S, 2)
        fine_u = ((u[edge] + offset[:, :1]) / size).flatten()  # (S E,)
        fine_v = ((v[edge] + offset[:, 1:]) / size).flatten()
        fine_rays = _rays(scene, fine_u, fine_v)
        fine = trace(world, fine_rays, fine_u, fine_v)
        masks[:, edge] = (fine.owner == owners).float().reshape(-1, len(ROOKS), len(edge)).mean(1)
        if scene.style == "photo":
            # Averaged after the tone curve, or a bright highlight would leave a jagged edge.
            colours = tone_curve(shade(world, fine_rays, fine, pixel))
            image = tone_curve(linear)
            image[:, edge] = colours.reshape(3, len(ROOKS), len(edge)).mean(1)
    if scene.style == "photo":
        image = to_srgb(image if len(edge) else tone_curve(linear)).reshape(3, size, size)
    else:
        image = _sketch(scene, world, size, device)
    return image, masks.reshape(-1, size, size), hits.depth.reshape(size, size), hits.normal.reshape(3, size, size)


def _sketch(scene: Scene, world: World, size: int, device: torch.device) -> Tensor:
    """A pencil drawing, drawn at twice the size and averaged down."""
    places = (torch.arange(2 * size, dtype=torch.float32, device=device) + 0.5) / (2 * size)
    u, v = places.repeat(2 * size), places.repeat_interleave(2 * size)
    rays = _rays(scene, u, v)
    hits = trace(world, rays, u, v)
    return F.avg_pool2d(draw(world, rays, hits, 2 * size)[None], 2)[0]


def _rays(scene: Scene, u: Tensor, v: Tensor) -> tuple:
    """Camera origin (three floats) and directions (three tensors (N,)) whose parameter is the depth."""
    camera = scene.camera()
    across, upward = (2 * u - 1) * HALF_VIEW, (1 - 2 * v) * HALF_VIEW
    return camera.origin, tuple(
        camera.forward[i] + across * camera.right[i] + upward * camera.up[i] for i in range(3)
    )


def trace(world: World, rays: tuple, u: Tensor, v: Tensor) -> Hits:
    """First surface along each camera ray; an object is tried only by the rays (u, v) inside its screen box."""
    origin, direction = rays
    on_wall = (surfaces.BACK - origin[1]) / direction[1]
    on_table = -origin[2] / direction[2].clamp_max(-1e-6)
    is_table = on_table < on_wall
    depth = torch.where(is_table, on_table, on_wall)
    surface = is_table.int()
    normal = torch.zeros(3, len(u), device=u.device)
    normal[1], normal[2] = -(~is_table).float(), is_table.float()
    for k, obj in enumerate(world.scene.objects):
        left, top, right, bottom = screen_box(world.scene.camera(), obj)
        inside = ((u > left) & (u < right) & (v > top) & (v < bottom)).nonzero()[:, 0]
        t, facing, part = intersect(obj, origin, tuple(axis[inside] for axis in direction))
        hit = (t < depth[inside]).nonzero()[:, 0]
        at = inside[hit]
        depth[at], surface[at], normal[:, at] = t[hit], part[hit].int() + (4 * k + 2), facing[:, hit]
    return Hits(depth, surface, normal)


def shade(world: World, rays: tuple, hits: Hits, pixel: float) -> Tensor:
    """Linear light (3, N) along the rays; `pixel` is the width of a pixel at depth 1."""
    origin, direction = rays
    linear = torch.empty_like(hits.normal)
    on_table = (hits.surface == TABLE).nonzero()[:, 0]
    dx, dy, dz = (axis[on_table] for axis in direction)
    depth = hits.depth[on_table]
    wide = pixel * depth
    linear[:, on_table] = surfaces.table_radiance(world, origin[0] + depth * dx, origin[1] + depth * dy, wide, wide / -dz)
    on_wall = (hits.surface == BACKDROP).nonzero()[:, 0]
    dx, dz, depth = direction[0][on_wall], direction[2][on_wall], hits.depth[on_wall]
    linear[:, on_wall] = surfaces.wall_radiance(world, origin[0] + depth * dx, origin[2] + depth * dz)
    owner = hits.owner
    for k in range(len(world.scene.objects)):
        at = (owner == k).nonzero()[:, 0]
        if len(at):
            ray, depth = tuple(axis[at] for axis in direction), hits.depth[at]
            point = tuple(origin[i] + depth * ray[i] for i in range(3))
            scale = (ray[0] ** 2 + ray[1] ** 2 + ray[2] ** 2).rsqrt()
            view = tuple(axis * scale for axis in ray)
            linear[:, at] = surfaces.solid_radiance(world, k, point, hits.normal[:, at], view)
    return linear


def _edges(surface: Tensor) -> Tensor:
    """Pixels (H, W) bool whose 3x3 neighbourhood shows more than one surface."""
    padded = F.pad(surface.float()[None, None], (1, 1, 1, 1), mode="replicate")
    return (F.max_pool2d(padded, 3, 1) != -F.max_pool2d(-padded, 3, 1))[0, 0]


def tone_curve(linear: Tensor) -> Tensor:
    """Straight up to 0.6, then a shoulder that never reaches 1: bright spots keep some colour."""
    knee = 0.6
    over = (linear - knee).clamp_min(0) / (1 - knee)
    return linear.clamp_max(knee) + (1 - knee) * over / (1 + over)


def to_srgb(linear: Tensor) -> Tensor:
    """The sRGB transfer curve (IEC 61966-2-1)."""
    linear = linear.clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)


def available_workers() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
