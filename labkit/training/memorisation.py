"""Whether a model has learnt training pictures by heart.

    d(x, y) = root of the mean squared difference at 32x32 pixels;   n(x) = min over training pictures y of d(x, y)

Three sets of distances are set side by side. n(generated) is what is asked about. n(render), for renders of scenes that were never trained on, is what
it would be for pictures that cannot be copies: so many training pictures are there that some are near to anything. d(one, other), for two renders of the same
scene specification (the same objects, table, light and style, placed and lit anew), is how far pictures of the same content are apart. A copy
would be nearer to its original than either. (Carlini et al. 2023, arXiv:2301.13188, look for copies in the same way, among many more pictures.)
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabkitError
from labkit.scenes.prompts import CAPTION_SEED
from labkit.scenes.render import render_many
from labkit.scenes.scene import rearranged
from labkit.training.data import SHARD, World, renders, scenes
from labkit.training.verifier import WORLD

THUMB = 32  # pixels
SETS = ("generated, to the nearest training picture", "unseen renders, to the nearest training picture", "two renders of one specification")


def world_of(lab, pictures: int) -> World:
    """The world that a model was trained on, as its labkit.json says. Raises LabkitError if it does not, or if that were fewer pictures."""
    said = lab.metadata.get("training")
    if said is None:
        raise LabkitError(f"the model {lab.name} does not say what it was trained on (\"training\" in labkit.json): leave --audit away")
    if pictures > said["pictures"]:
        raise LabkitError(f"the model {lab.name} was trained on {said['pictures']} pictures, and {pictures} are to be looked through: give --audit {said['pictures']}")
    return World(**{name: tuple(value) if isinstance(value, list) else value for name, value in said.items() if name != "pictures"})


def audit(generated: np.ndarray, same: np.ndarray, unseen: np.ndarray, trained: tuple[World, int], data: Path) -> dict:
    """Distances of pictures (N, 128, 128, 3) uint8 to the first so many training renders of a world, and what to hold them against.

    same: renders of the scenes from CAPTION_SEED on, of which others are made here; unseen: renders that were not trained on. Each set is told by its
    smallest distance, its 1st percentile and its median, of pixels in 0..1.
    """
    rng = np.random.default_rng(0)
    again = render_many([rearranged(scene, rng) for scene in scenes(WORLD, CAPTION_SEED, len(same))], workers=1)
    pairs = (thumbs(same) - thumbs(again)).square().mean(1).sqrt()  # (N,)
    near, unlike = nearest(thumbs(generated), *trained, data), nearest(thumbs(unseen), *trained, data)
    told = dict(zip(SETS, (near, unlike, pairs)))
    found = {name: {"n": len(d), "least": float(d.min()), "1 %": float(d.quantile(0.01)), "median": float(d.median())} for name, d in told.items()}
    return {"training pictures": trained[1], "nearer than any two renders of one specification": int((near < pairs.min()).sum()),
            "unseen renders nearer than those": int((unlike < pairs.min()).sum()), "nearer than any unseen render": int((near < unlike.min()).sum()),
            **{name: {key: round(value, 4) for key, value in row.items()} for name, row in found.items()}}


def thumbs(pictures: np.ndarray) -> Tensor:
    """Pictures (N, H, W, 3) uint8 as vectors (N, 3 * 32 * 32) in 0..1."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(x, size=(THUMB, THUMB), mode="area").flatten(1)


def nearest(x: Tensor, world: World, pictures: int, data: Path) -> Tensor:
    """The distance of each of x (N, D) to the nearest of a world's first renders, (N,); read in shards."""
    least = torch.full((len(x),), float("inf"))
    for first in range(0, pictures, SHARD):
        y = thumbs(renders(world, first, min(SHARD, pictures - first), data))
        least = torch.minimum(least, torch.cdist(x, y).amin(1))
    return least / x.shape[1] ** 0.5


def sentence(found: dict) -> str:
    """The audit in a line."""
    told = "; ".join(f"{name} {found[name]['least']:.3f} at least, median {found[name]['median']:.3f}" for name in SETS)
    return (f"of {found[SETS[0]]['n']} pictures {found['nearer than any two renders of one specification']} are nearer to one of "
            f"{found['training pictures']:,} training pictures than any two renders of one specification are to each other "
            f"(of {found[SETS[1]]['n']} unseen renders {found['unseen renders nearer than those']}), {found['nearer than any unseen render']} nearer than any unseen render is ({told})")
