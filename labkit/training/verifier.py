"""Training of the reader of pictures (scenes/reader.py) on renders.

    L = CE(object) + CE(picture) + mean over objects k of [ mean over its cells (|foot - foot_k| + CE(says)) + CE(mean over its cells of says) ]
    says = shape, colour, material, size;   picture = light, style, table

Small objects count as much as large ones; and since an object's attributes will be read from the mean of its cells, that mean is trained as well
as every cell for itself. Pictures are spoiled as generation would (degrade.py). Unlike the diffusion model the reader is shown the
held-out combinations: a reader that never saw a purple cone would call it something else.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.errors import LabkitError
from labkit.models.files import write_safetensors
from labkit.models.sources import write_sums
from labkit.models.whole import whole_file
from labkit.scenes.reader import CELLS, MAPS, OBJECT, PICTURE, REACH, SIDE, WEIGHTS, Reader, describe_reader
from labkit.scenes.render import trace
from labkit.scenes.scene import Scene, scene_from_seed
from labkit.scenes.surfaces import World as Ground
from labkit.training.data import SHOWN, TEST_SEED, World, renders, scenes, write_array
from labkit.training.degrade import reconstruct, spoil
from labkit.training.loop import LoopConfig, Player, Recipe, Share, run, write_state

CONFIG = LoopConfig(steps=14_000, batch_size=16, lr=2e-3, warmup=100, cooldown=0.4, weight_decay=0.05, ema_decay=0.995, save_every=50)
WORLD = World(counts=(1, 2, 3, 4), styles=("photo", "photo", "photo", "photo", "sketch"))  # all that the verifier is for, and is tested on
PICTURES, HELD_OUT, RECONSTRUCTED = 18_000, 2000, 4500  # renders to train on; with held-out combinations beside them; of these, also through a VAE
HELD_OUT_SEED = TEST_SEED - 3000  # of the first of them
SMALL = 3000  # steps that see pictures of half the side: a quarter of the work, and most can be learnt from them
MOST = 4  # objects of a scene
NONE = -100  # the attribute of an object that is not there; cross_entropy leaves it out
SHIFT = 4  # cells, up to which pictures are moved


@dataclass(frozen=True)
class HeldOut:
    """The combinations that training leaves out, as a world that `renders` can draw."""

    counts: tuple[int, ...] = WORLD.counts
    styles: tuple[str, ...] = WORLD.styles
    name = WORLD.name

    def scene(self, seed: int) -> Scene:
        return scene_from_seed(seed, counts=self.counts, styles=self.styles, held_out="only")


# --- what is true -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What N scenes show, on the reader's cells."""

    owner: Tensor  # (N, 64, 64) uint8: the number of the object seen in the middle of the cell, MOST where there is none
    foot: Tensor  # (N, MOST, 2) where the objects stand, in cells down and across
    says: Tensor  # (N, MOST, 4) int64 indices into OBJECT's values; NONE where there is no object
    picture: Tensor  # (N, 3) int64 indices into PICTURE's values

    def at(self, index: Tensor) -> "Truth":
        return Truth(*(value[index] for value in vars(self).values()))


def truth(of: list[Scene]) -> Truth:
    """What the scenes show, by tracing one ray a cell."""
    with torch.inference_mode():
        owner = torch.stack([owners(scene) for scene in of])
    foot, says = torch.zeros(len(of), MOST, 2), torch.full((len(of), MOST, len(OBJECT)), NONE)
    for i, scene in enumerate(of):
        u, v, _ = scene.camera().project(np.array([(obj.x, obj.y, 0.0) for obj in scene.objects]))
        foot[i, : len(scene.objects)] = torch.from_numpy(np.stack([v, u], axis=1) * CELLS)
        says[i, : len(scene.objects)] = torch.tensor([[values.index(getattr(obj, name)) for name, values in OBJECT.items()] for obj in scene.objects])
    picture = torch.tensor([[values.index(getattr(scene, name)) for name, values in PICTURE.items()] for scene in of])
    return Truth(owner.clone(), foot, says, picture)


def owners(scene: Scene, side: int = CELLS) -> Tensor:
    """The number of the object seen in the middle of each of side x side cells, (side, side) uint8; MOST where there is none."""
    middle = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    owner = trace(Ground(scene, torch.device("cpu")), middle.repeat(side), middle.repeat_interleave(side), side).owner
    return torch.where(owner < 0, MOST, owner).to(torch.uint8).reshape(side, side)


# --- the objective ------------------------------------------------------------------------------------------------


class Reading(nn.Module):
    """The objective, and what is right: the share of objects of which all four attributes are, read from their true cells."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, batch: dict) -> dict[str, Tensor]:
        told, true = self.reader(batch["image"]), Truth(*batch["truth"])
        maps, side = torch.cat([told[name] for name in MAPS], dim=1).permute(0, 2, 3, 1).flatten(0, 2), true.owner.shape[-1]  # (B P, channels), P = side^2
        cell = (true.owner.flatten() < MOST).nonzero()[:, 0]  # (M,): the cells with objects
        thing = cell // side**2 * MOST + true.owner.flatten()[cell]  # (M,): the object of each, a number below B MOST
        area = torch.zeros(true.says[..., 0].numel(), device=cell.device).index_add(0, thing, torch.ones_like(cell, dtype=torch.float32))  # (B MOST,)
        there = area > 0
        weight = 1 / area[thing] / there.sum()  # (M,): the mean over objects of the mean over their cells
        shown = (true.owner < MOST).float().flatten()
        out = {"object": F.binary_cross_entropy_with_logits(maps[:, 0], shown)}
        _, foot, *said = maps.index_select(0, cell).split(list(MAPS.values()), dim=1)  # (M, channels) each
        place = torch.stack([cell // side % side, cell % side], dim=1) + 0.5  # (M, 2)
        out["foot"] = (weight * (foot - (true.foot.flatten(0, 1)[thing] - place) / REACH).abs().sum(1)).sum()
        right = there
        for i, (name, logits) in enumerate(zip(OBJECT, said)):
            values = true.says[..., i].flatten()  # (B MOST,)
            mean = torch.zeros(len(area), logits.shape[1], device=cell.device).index_add(0, thing, logits) / area.clamp_min(1)[:, None]  # (B MOST, values)
            out[name] = (weight * F.cross_entropy(logits, values[thing], reduction="none")).sum() + F.cross_entropy(mean[there], values[there])
            right = right & (mean.argmax(1) == values)
        for i, name in enumerate(PICTURE):
            out[name] = F.cross_entropy(told[name], true.picture[:, i])
        return {"loss": 4 * out["object"] + 4 * out["foot"] + sum(out[name] for name in (*OBJECT, *PICTURE)), "right": right[there].float().mean(), **out}


def moved(image: Tensor, true: Truth, g: torch.Generator) -> tuple[Tensor, Truth]:
    """Half of the batch mirrored, all of it shifted by up to SHIFT cells; what comes in at a border repeats it, and holds no object."""
    half = len(image) // 2
    image = torch.cat([image[:half].flip(3), image[half:]])
    owner = torch.cat([true.owner[:half].flip(2), true.owner[half:]])
    foot = torch.cat([torch.stack([true.foot[:half, :, 0], CELLS - true.foot[:half, :, 1]], dim=2), true.foot[half:]])
    down, across = torch.randint(0, 2 * SHIFT + 1, (2,), generator=g).tolist()
    pixels = SIDE // CELLS
    image = F.pad(image, [SHIFT * pixels] * 4, mode="replicate")[..., down * pixels : down * pixels + SIDE, across * pixels : across * pixels + SIDE]
    owner = F.pad(owner, [SHIFT] * 4, value=MOST)[..., down : down + CELLS, across : across + CELLS]
    return image, Truth(owner, foot + torch.tensor([SHIFT - down, SHIFT - across]), true.says, true.picture)


def halved(image: Tensor, true: Truth) -> tuple[Tensor, Truth]:
    """Pictures at half the side, and what they show on as many cells as there are then."""
    return F.avg_pool2d(image, 2), Truth(true.owner[:, 1::2, 1::2], true.foot / 2, true.says, true.picture)


def recipe(reader: Reader, images: list[np.ndarray], of: Truth, source: Tensor, small: int = SMALL) -> Recipe:
    """Arrays of pictures (N_i, 128, 128, 3) uint8, one after the other; picture j shows what row source[j] of the truth says.

    The first `small` steps see them at half the side.
    """
    starts = np.cumsum([0, *map(len, images)])
    if starts[-1] != len(source):
        raise LabkitError(f"{starts[-1]} pictures come with {len(source)} sources; give one for each")

    def batch(step: int, share: Share) -> dict:
        g = share.generator(step)
        index = torch.randint(len(source), (share.batch_size,), generator=g)
        rows = [images[k][j - starts[k]] for j in index.tolist() for k in [int(np.searchsorted(starts, j, side="right")) - 1]]
        x = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255
        x, true = moved(x, of.at(source[index]), g)
        x, true = halved(x, true) if step < small else (x, true)
        return {"image": share.mine(spoil(x, g)), "truth": tuple(share.mine(value) for value in vars(true).values())}

    return Recipe([Player("verifier", Reading(reader), {"reader": reader})], batch)


# --- the run ------------------------------------------------------------------------------------------------------


def main(folder: str | Path = "runs/tabletop", target: str | Path = WEIGHTS, config: LoopConfig = CONFIG, pictures: int = PICTURES,
         lab=None, device: str | None = "cpu") -> Reader:
    """Train the reader in folder/verifier and write it to `target`; `lab` is the model whose autoencoder spoils pictures, the shipped one if None."""
    folder = Path(folder)
    if folder.is_file():
        raise LabkitError(f"{folder} is a file; name a folder to train in")
    torch.manual_seed(config.seed)
    images, of, source = material(folder, pictures, lab)
    reader = run(recipe(Reader(), images, of, source), config, folder / "verifier", device)["reader"].cpu()
    save(reader, target, {"training": {"pictures": len(source), "steps": config.steps, "batch_size": config.batch_size}})
    return reader


def material(folder: Path, pictures: int = PICTURES, lab=None) -> tuple[list[np.ndarray], Truth, Tensor]:
    """Renders, renders of held-out combinations, and reconstructions of some of either; what they show; and which row of that each shows."""
    held_out, shown = min(HELD_OUT, pictures), min(RECONSTRUCTED, pictures)
    plain = renders(SHOWN, 0, pictures, folder / "data")
    rare = renders(HeldOut(), HELD_OUT_SEED, held_out, folder / "data" / "held-out")
    again = torch.cat([torch.arange(shown - shown // 4), pictures + torch.arange(min(shown // 4, held_out))])
    path = folder / "data" / f"reconstructions-{pictures}.npy"
    if not path.exists():
        picked = np.concatenate([plain[: shown - shown // 4], rare[: shown // 4]])
        write_array(reconstruct(lab or shipped(), picked, seed=0), path)
    seen = folder / "data" / f"truth-{pictures}.pt"
    if not seen.exists():
        of = truth(scenes(SHOWN, 0, pictures) + scenes(HeldOut(), HELD_OUT_SEED, held_out))
        write_state(vars(of), seen)
    source = torch.cat([torch.arange(pictures + held_out), again])
    return [plain, rare, np.load(path)], Truth(**torch.load(seen, weights_only=True)), source


def shipped():
    """The shipped model."""
    from labkit.checkpoint import load_pipeline
    from labkit.diffusion import LatentDiffusion

    return LatentDiffusion(**vars(load_pipeline("tabletop", torch.device("cpu"), torch.float32)))


def save(reader: Reader, target: str | Path, about: dict) -> None:
    """Write model.safetensors (float16) and config.json, each whole or not at all."""
    target = Path(target)
    with whole_file(target / "model.safetensors", overwrite=True) as weights, whole_file(target / "config.json", overwrite=True) as config:
        write_safetensors(reader.state_dict(), weights, torch.float16)
        config.write_text(json.dumps(describe_reader(reader) | about, indent=1) + "\n", encoding="utf-8")
    write_sums(target)
