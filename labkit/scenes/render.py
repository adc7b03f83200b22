"""Ray tracer of the tabletop: scenes -> pictures, masks, depth and normals.

One ray through the middle of every pixel; pixels that touch an edge or a crease (where the surface seen differs from
a neighbour's) get eight more rays and show their mean. Textures and shadows are filtered in closed form and need none.
Scenes are rendered one at a time: a scene's tensors then fit the processor's cache, which is faster than a batch, and
a picture cannot depend on its neighbours in the batch.
"""

import multiprocessing
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
    """What N camera rays meet first."""

    direction: Tensor  # (3, N), as long as to gain one unit of depth
    depth: Tensor  # (N,)
    surface: Tensor  # (N,) int32
    normal: Tensor  # (3, N)

    def at(self, index: Tensor) -> "Hits":
        names = ("direction", "depth", "surface", "normal")
        return Hits(*(getattr(self, name).index_select(-1, index) for name in names))

    def joined(self, other: "Hits") -> "Hits":
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("direction", "depth", "surface", "normal"))
        return Hits(*(torch.cat(pair, dim=-1) for pair in pairs))

    @property
    def owner(self) -> Tensor:
        """Index of the object hit (N,), -1 for table and backdrop."""
        return ((self.surface + 2) >> 2) - 1


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
    """Pictures of many scenes as uint8 (N, size, size, 3), rendered by `workers` processes.

    In a script, call it under `if __name__ == "__main__":`, as each process imports the script anew.
    """
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
    places = (torch.arange(size, dtype=torch.float32, device=device) + 0.5) / size
    u, v = places.repeat(size), places.repeat_interleave(size)  # (P,), P = H W
    hits = trace(world, u, v, size)
    owners = torch.arange(len(scene.objects), device=device)[:, None]
    masks = (hits.owner == owners).float()  # (K, P)

    is_edge = _edges(hits.surface.reshape(size, size)).flatten()
    edge, smooth = is_edge.nonzero()[:, 0], (~is_edge).nonzero()[:, 0]
    fine = trace(world, u[edge], v[edge], size, torch.tensor(ROOKS, device=device) / size)  # S rays for each edge pixel
    masks.index_copy_(1, edge, (fine.owner == owners).float().reshape(-1, len(ROOKS), len(edge)).mean(1))
    if scene.style == "photo":
        light = tone_curve(shade(world, hits.at(smooth).joined(fine), 2 * HALF_VIEW / size))
        image = torch.empty_like(hits.normal)
        image.index_copy_(1, smooth, light[:, : len(smooth)])
        # Averaged after the tone curve, or a bright highlight would leave a jagged edge.
        image.index_copy_(1, edge, light[:, len(smooth) :].reshape(3, len(ROOKS), len(edge)).mean(1))
        image = to_srgb(image).reshape(3, size, size)
    else:
        image = _sketch(world, size, device)
    return image, masks.reshape(-1, size, size), hits.depth.reshape(size, size), hits.normal.reshape(3, size, size)


def _sketch(world: World, size: int, device: torch.device) -> Tensor:
    """A pencil drawing, drawn at twice the size and averaged down."""
    places = (torch.arange(2 * size, dtype=torch.float32, device=device) + 0.5) / (2 * size)
    hits = trace(world, places.repeat(2 * size), places.repeat_interleave(2 * size), 2 * size)
    image = draw(world, hits, 2 * size)
    image = image[:, ::2] + image[:, 1::2]
    return (image[:, :, ::2] + image[:, :, 1::2]) * 0.25


def trace(world: World, u: Tensor, v: Tensor, size: int, offsets: Tensor | None = None) -> Hits:
    """First surface along the rays through P pixel centres (u, v), or through S places each, offsets (S, 2) from them.

    The S P rays lie sample by sample. An object is tried only by the rays of pixels that meet its screen box.
    """
    camera, samples, pixels = world.scene.camera(), 1 if offsets is None else len(offsets), len(u)
    fine_u, fine_v = (u, v) if offsets is None else ((u + offsets[:, :1]).flatten(), (v + offsets[:, 1:]).flatten())
    across, upward = (2 * fine_u - 1) * HALF_VIEW, (1 - 2 * fine_v) * HALF_VIEW
    direction = torch.stack([camera.forward[i] + across * camera.right[i] + upward * camera.up[i] for i in range(3)])
    on_wall = (surfaces.BACK - camera.origin[1]) / direction[1]
    on_table = -camera.origin[2] / direction[2].clamp_max(-1e-6)
    surface = (on_table < on_wall).int()
    depth = torch.minimum(on_table, on_wall)
    normal = torch.stack([torch.zeros_like(depth), surface - 1.0, surface.float()])
    steps = torch.arange(samples, device=u.device)[:, None] * pixels
    for k, obj in enumerate(world.scene.objects):
        left, top, right, bottom = screen_box(camera, obj)
        margin = 0.5 / size
        inside = (u > left - margin) & (u < right + margin) & (v > top - margin) & (v < bottom + margin)
        at = (inside.nonzero()[:, 0] + steps).flatten()
        t, facing, part = intersect(obj, camera.origin, tuple(direction.index_select(1, at)))
        hit = (t < depth.index_select(0, at)).nonzero()[:, 0]
        at = at.index_select(0, hit)
        depth.index_copy_(0, at, t.index_select(0, hit))
        surface.index_copy_(0, at, part.index_select(0, hit) + (4 * k + 2))
        normal.index_copy_(1, at, facing.index_select(1, hit))
    return Hits(direction, depth, surface, normal)


def shade(world: World, hits: Hits, pixel: float) -> Tensor:
    """Linear light (3, N) along the rays; `pixel` is the width of a pixel at depth 1."""
    origin = world.scene.camera().origin
    light = torch.empty_like(hits.normal)
    at = (hits.surface == TABLE).nonzero()[:, 0]
    seen = hits.at(at)
    x, y, _ = _points(origin, seen)
    wide = pixel * seen.depth
    light.index_copy_(1, at, surfaces.table_radiance(world, x, y, wide, wide / -seen.direction[2]))
    at = (hits.surface == BACKDROP).nonzero()[:, 0]
    x, _, z = _points(origin, hits.at(at))
    light.index_copy_(1, at, surfaces.wall_radiance(world, x, z))
    at = (hits.surface > TABLE).nonzero()[:, 0]
    seen = hits.at(at)
    view = seen.direction * (seen.direction**2).sum(0).rsqrt()
    light.index_copy_(1, at, surfaces.solid_radiance(world, seen.owner, _points(origin, seen), seen.normal, view))
    return light


def _points(origin: tuple, hits: Hits) -> tuple:
    """Where the rays end: x, y, z, each (N,)."""
    return tuple(origin[i] + hits.depth * hits.direction[i] for i in range(3))


def _edges(surface: Tensor) -> Tensor:
    """Pixels (H, W) bool that show another surface than the neighbour above, below, left or right."""
    edges = torch.zeros_like(surface, dtype=torch.bool)
    across, down = surface[:, 1:] != surface[:, :-1], surface[1:] != surface[:-1]
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    return edges


def tone_curve(linear: Tensor) -> Tensor:
    """Straight up to 0.6, then a shoulder that never reaches 1: bright spots keep some colour."""
    knee = 0.6
    over = (linear - knee).clamp_min(0) / (1 - knee)
    return linear.clamp_max(knee) + (1 - knee) * over / (1 + over)


def to_srgb(linear: Tensor) -> Tensor:
    """The sRGB transfer curve (IEC 61966-2-1)."""
    linear = linear.clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)
