"""Pictures read back into scenes: which objects there are, where they stand, what they are.

    votes(f) = sum over cells of p(object) [foot(cell) = f];  the peaks of (votes * Gaussian) are the objects; each cell belongs to the nearest one
    value    = argmax over values of the mean over the object's cells of log p(value | cell)              for shape, colour, material, size
    (x, y)   = where the ray through the foot meets the table                                             relations follow from these

The network is scenes/reader.py. Voting for a point and gathering the cells behind each peak is Hough's transform as Leibe et al. (2004) use it for
objects. This is the detector with which generated pictures are counted right or wrong, as GenEval (Ghosh et al. 2023, arXiv:2310.11513) does with
Mask2Former. Here it was trained on renders, where every answer is known, so its own error can be stated beside whatever it judges
(training/verifier_errors.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabkitError
from labkit.scenes.camera import HALF_VIEW, Camera
from labkit.scenes.reader import CELLS, OBJECT, PICTURE, REACH, SIDE, Reader, load_reader
from labkit.scenes.scene import Object, Scene

LEAST = 16  # cells that make an object; the smallest in the world, half hidden, has some 40
APART = 3.0  # cells; feet nearer than this are one
FAR = 5.0  # cells; a vote that misses all peaks by more is not counted to any object
SPREAD = 1.2  # cells: of the Gaussian, about as far as votes scatter


@dataclass(frozen=True, eq=False)
class Seen:
    """One object of a picture; pixels count from the upper left corner, x and y are places on the table as in scenes/scene.py."""

    shape: str
    colour: str
    material: str
    size: str
    confidence: float  # probability of the least certain of the four, 0 to 1
    mask: Tensor  # (H, W) bool
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels, the latter two exclusive
    x: float
    y: float


@dataclass(frozen=True, eq=False)
class Read:
    """What is in a picture: its objects from left to right, and what is said of the whole."""

    objects: tuple[Seen, ...]
    light: str
    style: str
    table: str

    def scene(self) -> Scene:
        """The scene that was read; what cannot be read (turns, the camera, the lamp's place) is at its defaults."""
        objects = tuple(Object(o.shape, o.colour, o.size, o.material, o.x, o.y) for o in self.objects)
        return Scene(objects, self.table, self.light, self.style)


@torch.no_grad()
def read(images, reader: Reader | None = None, batch_size: int = 32) -> list[Read]:
    """What is in each picture of the tabletop world.

    images: Tensor (B, 3, H, W) in [0, 1], uint8 array (B, H, W, 3), or PIL pictures of one size (one or a list); masks and boxes are in
    their pixels. The reader is the shipped one if None. Raises LabkitError if images are anything else.
    """
    reader = _shipped() if reader is None else reader
    pixels, found = pixels_of(images), []
    size = tuple(pixels.shape[-2:])
    if size != (SIDE, SIDE):
        pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="area" if min(size) > SIDE else "bilinear")
    device = reader.head.weight.device
    for part in pixels.split(batch_size):
        told = {name: value.float().cpu() for name, value in reader(part.to(device)).items()}
        found += [read_one({name: value[i] for name, value in told.items()}, size) for i in range(len(part))]
    return found


@lru_cache(maxsize=1)
def _shipped() -> Reader:
    return load_reader()


def read_one(told: dict[str, Tensor], size: tuple[int, int] = (SIDE, SIDE)) -> Read:
    """What the network's answer to one picture of this size (H, W) says: maps (channels, 64, 64) and logits (number of values,)."""
    p, foot = told["object"][0].sigmoid(), told["foot"] * REACH  # (64, 64), (2, 64, 64)
    owner, feet = gather(p, foot)
    camera, objects = _camera(len(feet)), []
    for k, (down, across) in enumerate(feet):
        cells = owner == k  # (64, 64)
        values, least = {}, 1.0
        for name, choices in OBJECT.items():
            odds = told[name].log_softmax(0)[:, cells].mean(1).softmax(0)
            values[name], least = choices[int(odds.argmax())], min(least, float(odds.max()))
        mask = F.interpolate(cells[None, None].float(), size=size, mode="nearest")[0, 0] > 0  # (H, W)
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        objects.append(Seen(**values, confidence=least, mask=mask, box=box, **dict(zip("xy", on_table(camera, across / CELLS, down / CELLS)))))
    whole = {name: choices[int(told[name].argmax())] for name, choices in PICTURE.items()}
    return Read(tuple(sorted(objects, key=lambda o: (o.x, o.y))), **whole)


def gather(p: Tensor, foot: Tensor) -> tuple[Tensor, list[tuple[float, float]]]:
    """Which object each cell belongs to, (64, 64) with -1 for none, and where the objects stand: cells down and across.

    p: the probability that there is an object, (64, 64); foot: from each cell to the foot it votes for, (2, 64, 64), in cells.
    """
    at = (p > 0.5).nonzero()  # (N, 2)
    owner = torch.full(p.shape, -1)
    if len(at) < LEAST:
        return owner, []
    votes = at + 0.5 + foot[:, at[:, 0], at[:, 1]].T  # (N, 2)
    feet = peaks(votes, p[at[:, 0], at[:, 1]])
    while len(feet):
        distance = torch.cdist(votes, feet)  # (N, K)
        nearest = torch.where(distance.amin(1) <= FAR, distance.argmin(1), -1)
        area = (nearest[:, None] == torch.arange(len(feet))).sum(0)
        if area.min() >= LEAST:
            owner[at[:, 0], at[:, 1]] = nearest
            return owner, [tuple(votes[nearest == k].median(0).values.tolist()) for k in range(len(feet))]
        feet = feet[torch.arange(len(feet)) != area.argmin()]  # the poorest goes first: its cells may be another's
    return owner, []


def peaks(votes: Tensor, weight: Tensor) -> Tensor:
    """The places (K, 2) at which votes (N, 2) gather, each of a weight (N,), best first and none nearer to a better one than APART."""
    grid = torch.zeros(CELLS, CELLS)
    cell = votes.floor().long().clamp(0, CELLS - 1)
    grid.index_put_((cell[:, 0], cell[:, 1]), weight, accumulate=True)
    smooth = _smooth(grid)  # (64, 64)
    top = (smooth == F.max_pool2d(smooth[None, None], 5, 1, 2)[0, 0]) & (smooth > LEAST / 8)
    places = top.nonzero()
    places = places[smooth[top].argsort(descending=True)].float() + 0.5
    kept: list[Tensor] = []
    for place in places:
        if all(float((place - other).norm()) >= APART for other in kept):
            kept.append(place)
    return torch.stack(kept) if kept else torch.zeros(0, 2)


def _smooth(grid: Tensor) -> Tensor:
    line = torch.exp(-(torch.arange(-3, 4) ** 2) / (2 * SPREAD**2))
    line = line / line.sum()
    return F.conv2d(F.conv2d(grid[None, None], line[None, None, :, None], padding=(3, 0)), line[None, None, None], padding=(0, 3))[0, 0]


def on_table(camera: Camera, u: float, v: float) -> tuple[float, float]:
    """Where on the table (x, y) one sees the point (u, v) of the picture, fractions of its sides; what is above the horizon counts as far away."""
    across, upward = (2 * u - 1) * HALF_VIEW, (1 - 2 * v) * HALF_VIEW
    ray = [camera.forward[i] + across * camera.right[i] + upward * camera.up[i] for i in range(3)]
    depth = -camera.origin[2] / min(ray[2], -1e-3)
    return camera.origin[0] + depth * ray[0], camera.origin[1] + depth * ray[1]


def _camera(count: int) -> Camera:
    """The camera that scenes of this many objects have on average."""
    return Camera(0.0, 0.47, (6.9 + 0.2 * (max(count, 1) - 1)) * 1.005)


def share(right: int, n: int, z: float = 1.96) -> dict[str, float]:
    """`right` of n as a share with Wilson's 95 % interval: {right, n, share, low, high}; LabkitError if it is none."""
    if not 0 <= right <= n or n == 0:
        raise LabkitError(f"{right} of {n} is not a share; count at least one picture")
    p, extra = right / n, z * z / n
    middle, half = (p + extra / 2) / (1 + extra), z * (p * (1 - p) / n + extra / (4 * n)) ** 0.5 / (1 + extra)
    return {"right": right, "n": n, "share": round(p, 4), "low": round(max(middle - half, 0.0), 4), "high": round(min(middle + half, 1.0), 4)}


# --- pictures -----------------------------------------------------------------------------------------------------


def pixels_of(images) -> Tensor:
    """Pictures as `read` takes them -> (B, 3, H, W) float32 in [0, 1]; LabkitError if they are none."""
    pixels = _tensor(images)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape) < 1:
        raise LabkitError(f"the pictures are {tuple(pixels.shape)}; give (B, 3, H, W) in [0, 1], uint8 (B, H, W, 3), or PIL pictures")
    if not bool(pixels.isfinite().all()) or pixels.min() < -1e-3 or pixels.max() > 1 + 1e-3:
        raise LabkitError("the pictures have values outside [0, 1]; pictures in [-1, 1] become x / 2 + 0.5")
    return pixels


def _tensor(images) -> Tensor:
    import numpy as np

    if isinstance(images, Tensor):
        return images.float()
    if hasattr(images, "convert"):
        images = [images]
    if isinstance(images, Sequence) and images and all(hasattr(image, "convert") for image in images):
        if len({image.size for image in images}) > 1:
            raise LabkitError("the pictures differ in size; read one size at a time")
        images = np.stack([np.asarray(image.convert("RGB")) for image in images])
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        raise LabkitError("there are no pictures; give (B, 3, H, W) in [0, 1], uint8 (B, H, W, 3), or PIL pictures")
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
