"""How often the reader of pictures is wrong, on renders, where the truth is known. Published beside whatever it judges.

    a true object is found   if a read object overlaps it by IoU >= 1/2 (each read object counts once)
    an attribute is right    if the object is found and the attribute is the true one; so what is missed is wrong in all of them
    a relation is right      if the captions may say it of two objects, and the judge says it of the two that were found

Seeds are never trained on. Renders are read as they are and after a model's autoencoder; the combinations that the diffusion model never sees are
counted apart.
"""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from labkit.errors import LabkitError
from labkit.models.sources import write_sums
from labkit.scenes.captions import relations
from labkit.scenes.judge import holds
from labkit.scenes.reader import CELLS, OBJECT, PICTURE, WEIGHTS, Reader
from labkit.scenes.scene import Scene
from labkit.scenes.verify import Read, read, share
from labkit.training.data import TEST_SEED, renders, scenes
from labkit.training.degrade import reconstruct
from labkit.training.verifier import MOST, WORLD, HeldOut, owners

OVERLAP = 0.5  # IoU from which on an object is found
RARE = 500  # scenes with held-out combinations


def publish(lab, data: Path, pictures: int = 5000, reader: Reader | None = None, progress: bool = True) -> dict:
    """The reader's hits on `pictures` test renders, on what a model reconstructs of them, on rare combinations: {where: {what: share}}.

    data: the folder where renders are kept, made if need be. Raises LabkitError for no pictures.
    """
    if pictures < 1:
        raise LabkitError(f"the errors on {pictures} pictures cannot be measured; ask for at least 1")
    found, data = {}, Path(data)
    for world, first, count, where in ((WORLD, TEST_SEED, pictures, "renders"), (HeldOut(), TEST_SEED, min(RARE, pictures), "renders of held-out combinations")):
        images = renders(world, first, count, data if world is WORLD else data / "held-out")
        of = scenes(world, first, count)
        found[where] = score(of, images, reader)
        found[f"{where}, reconstructed"] = score(of, reconstruct(lab, images, progress=progress), reader)
    return found


def score(of: list[Scene], images: np.ndarray, reader: Reader | None = None) -> dict[str, dict]:
    """The reader's hits on pictures of known scenes, (N, 128, 128, 3) uint8: {what: share with its interval}."""
    tallies: dict[str, list[bool]] = {}
    with torch.inference_mode():
        for start in range(0, len(of), 100):
            for scene, said in zip(of[start : start + 100], read(images[start : start + 100], reader)):
                for name, right in compare(scene, said).items():
                    tallies.setdefault(name, []).extend(right)
    return {name: share(sum(rows), len(rows)) for name, rows in tallies.items() if rows}


def compare(scene: Scene, said: Read) -> dict[str, list[bool]]:
    """What is right in one reading: for each name a list, an entry for each object, picture or relation that it is about."""
    match = paired(owners(scene), said)
    pairs = [(obj, None if match[k] is None else said.objects[match[k]]) for k, obj in enumerate(scene.objects)]
    right = {name: [seen is not None and getattr(seen, name) == getattr(obj, name) for obj, seen in pairs] for name in OBJECT}
    found = {"objects found": [seen is not None for _, seen in pairs], "read objects that are there": [k in match for k in range(len(said.objects))]}
    found |= {"count": [len(said.objects) == len(scene.objects)]} | right
    found |= {name: [getattr(said, name) == getattr(scene, name)] for name in PICTURE}
    told = [(i, j, relation) for i, j in permutations(range(len(pairs)), 2) for relation in relations(scene, i, j)]
    found["relation"] = [None not in (match[i], match[j]) and holds(relation, pairs[i][1], pairs[j][1]) for i, j, relation in told]
    found[f"material, {scene.style}"] = found["material"]  # hatching hides a shine: the two styles are far apart here
    found["everything"] = [all(value for name, values in found.items() for value in values)]
    return found


def paired(owner: Tensor, said: Read) -> list[int | None]:
    """For each true object the number of the read one that shows it, best overlaps first; owner (64, 64) as `owners` gives it."""
    masks = [torch.nn.functional.interpolate(seen.mask[None, None].float(), (CELLS, CELLS))[0, 0] > 0 for seen in said.objects]
    overlaps = []
    for k in range(int(owner[owner < MOST].max()) + 1 if bool((owner < MOST).any()) else 0):
        for j, mask in enumerate(masks):
            both, either = ((owner == k) & mask).sum(), ((owner == k) | mask).sum()
            overlaps.append((float(both / either), k, j))
    match: dict[int, int] = {}
    for overlap, k, j in sorted(overlaps, reverse=True):
        if overlap >= OVERLAP and k not in match and j not in match.values():
            match[k] = j
    return [match.get(k) for k in range(MOST)]


def table(found: dict) -> str:
    """The figures in the card's form, one line for each."""
    lines = ["| where | what | right | share (95 % interval) |", "| --- | --- | --- | --- |"]
    for where, rows in found.items():
        lines += [f"| {where} | {name} | {r['right']:,} of {r['n']:,} | {r['share']:.2%} ({r['low']:.2%} to {r['high']:.2%}) |" for name, r in rows.items()]
    return "\n".join(lines)


def write(found: dict, target: Path = WEIGHTS) -> None:
    """Leave the figures beside the reader's weights, in errors.json."""
    (target / "errors.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_sums(target)
