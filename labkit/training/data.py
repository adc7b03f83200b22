"""Training data: renders of the tabletop world, kept in shards, and the captions and tokens drawn from their scenes.

A scene is a function of its seed and a picture a function of its scene, so a dataset is a range of seeds. Rendering is
the costly part: pictures are rendered once, in shards that appear under their name only when complete, so that an
interrupted run goes on where it was. Captions are cheap and drawn anew each time, so a scene is described differently
in every epoch.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from labkit.errors import LabkitError
from labkit.models.whole import whole_file
from labkit.scenes.captions import caption
from labkit.scenes.render import render_many
from labkit.scenes.scene import HIDDEN, Scene, scene_from_seed

SHARD = 500  # pictures per file: 24 MiB
TEST_SEED = 10_000_000  # seeds from here on are never trained on


@dataclass(frozen=True)
class World:
    """Which part of the tabletop world a model is trained on; held-out combinations are always left out."""

    counts: tuple[int, ...] = (1, 1, 2)  # each weighs what scene.COUNT_WEIGHTS says, twice what is named twice
    styles: tuple[str, ...] = ("photo",)
    groups: float = 0.0  # share of the scenes that show two or more objects, every number as often, all of one shape and colour
    hidden: float = HIDDEN  # of the box of one of a group, what others cover at most: what is to be counted may have to be apart

    def scene(self, seed: int) -> Scene:
        several = sorted({count for count in self.counts if count > 1})
        rng = np.random.default_rng([seed, 1])
        if several and self.groups and rng.random() < self.groups:
            if self.hidden != HIDDEN:  # four are hard to place: a number that is drawn stays, or there would be few of them
                several = [several[int(rng.integers(len(several)))]]
            return scene_from_seed(seed, counts=several, styles=self.styles, alike=True, hidden=self.hidden, weights={"count": dict.fromkeys(several, 1.0)})
        return scene_from_seed(seed, counts=self.counts, styles=self.styles)

    @property
    def name(self) -> str:
        return "-".join([*map(str, self.counts), *self.styles, *([f"groups{self.groups:g}"] if self.groups else []), *([f"hidden{self.hidden:g}"] if self.hidden != HIDDEN else [])])


SHOWN = World(counts=(1, 1, 2, 2, 3, 4), styles=("photo", "photo", "photo", "photo", "sketch"), groups=0.35)  # what the shipped model and the reader were last trained on


def scenes(world: World, first: int, count: int) -> list[Scene]:
    """The scenes of the seeds first, ..., first + count - 1."""
    return [world.scene(seed) for seed in range(first, first + count)]


def renders(world: World, first: int, count: int, folder: Path, workers: int = 2) -> np.ndarray:
    """Pictures of `scenes(world, first, count)`: (count, 128, 128, 3) uint8, rendered if not in the folder yet."""
    if count <= 0:
        raise LabkitError(f"a dataset of {count} scenes cannot be trained on; ask for at least 1")
    shards = []
    for start in tqdm(range(first, first + count, SHARD), desc="renders", leave=False):
        path = Path(folder) / f"renders-{world.name}-{start:08d}.npy"
        if not path.exists():
            write_array(render_many(scenes(world, start, SHARD), workers=workers), path)
        shards.append(np.load(path))
    return np.concatenate(shards)[:count]


def write_array(array: np.ndarray, path: Path) -> None:
    """Write what `np.load` reads back, whole or not at all; CheckpointError where it cannot be written, as on a full disk."""
    with whole_file(path, overwrite=True) as unfinished, open(unfinished, "wb") as file:
        np.save(file, array)


def to_signed(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], as the VAE takes them."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def captions(batch: list[Scene], rng: np.random.Generator) -> list[str]:
    """One caption a scene, detail drawn at random."""
    return [caption(scene, rng).text for scene in batch]


def contact_sheet(images: Tensor, columns: int):
    """Pictures in [-1, 1], (B, 3, H, W), as one PIL image, row by row."""
    from einops import rearrange
    from PIL import Image

    images = torch.cat([images, images.new_ones(-len(images) % columns, *images.shape[1:])])
    grid = rearrange(images, "(r c) rgb h w -> (r h) (c w) rgb", c=columns)
    return Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().numpy())
