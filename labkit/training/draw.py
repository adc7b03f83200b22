"""The pictures of an evaluation: which are drawn, and how they are kept, so that a run that was stopped goes on where it was.

Every picture has a seed of its own that follows from its prompt's number in the list: a smaller plan draws some of the pictures of a larger one, and no
two start from the same noise. Pictures are drawn some twenty at a time; each such sheet appears under its name only when complete, and what is there is
not drawn again. So several processes may draw for the same folder at once.
"""

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labkit.errors import LabkitError
from labkit.scenes.prompts import CATEGORIES, Prompt
from labkit.scenes.reader import SIDE
from labkit.training import sheets

UNSAID = "negation unsaid"  # the same prompts without their negative ones, held to the same wants: what negation has to be better than
BATCH = 20  # pictures drawn at once, and on a sheet


@dataclass(frozen=True)
class Plan:
    """How much is drawn, and how."""

    prompts: int = 100  # a category
    seeds: int = 4  # pictures a prompt
    captions: int = 500  # one picture each
    reconstructions: int = 500  # test renders through the autoencoder
    guidance: tuple[float | None, ...] = (None,)  # None is the model's own
    steps: int | None = None
    seed: int = 0  # prompt i has the seeds seed + 4 i, ...
    audit: int = 0  # training pictures to look for copies in

    def __post_init__(self) -> None:
        if min(self.prompts, self.reconstructions) < 1 or not 1 <= self.seeds <= 4 or self.captions < 2 or not self.guidance:
            raise LabkitError("an evaluation needs prompts >= 1, seeds 1 to 4, captions >= 2, reconstructions >= 1 and a guidance scale")


QUICK = Plan(prompts=10, seeds=2, captions=100, reconstructions=100)


@dataclass(frozen=True)
class Job:
    """One picture to draw; `prompt` is a number in the list."""

    prompt: int
    text: str
    negative: str
    seed: int


def jobs(prompts: Sequence[Prompt], plan: Plan) -> dict[str, list[Job]]:
    """What to draw, by category: prompts spread evenly over each category's list, so that fewer prompts have the same variety."""
    found = {}
    for category in (*CATEGORIES, UNSAID, "captions"):
        own = [i for i, p in enumerate(prompts) if p.category == (category if category != UNSAID else "negation")]
        captions = category == "captions"
        count, seeds = min(plan.captions if captions else plan.prompts, len(own)), 1 if captions else plan.seeds
        chosen = own[:count] if captions else [own[int((k + 0.5) * len(own) / count)] for k in range(count)]
        found[category] = [Job(i, prompts[i].text, "" if category == UNSAID else prompts[i].negative, plan.seed + 4 * i + s)
                           for i in chosen for s in range(seeds)]
    return found


def draw(lab, wanted: dict[str, list[Job]], folder: Path, recipe: dict, quiet: bool = True) -> dict[str, list[tuple[Job, np.ndarray]]]:
    """The jobs with their pictures, (128, 128, 3) uint8; drawn where they are not in the folder yet, in any order."""
    from PIL import Image
    from tqdm.auto import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    sheet = {(category, start): (row[start : start + BATCH], folder / "pictures" / f"{category.replace(' ', '-')}-{start:04d}.png")
             for category, row in wanted.items() for start in range(0, len(row), BATCH)}
    order = list(sheet)
    random.shuffle(order)  # in every process another order, so that two seldom draw the same
    for part, path in tqdm([sheet[key] for key in order], desc=f"w = {recipe['guidance']:g}", unit=" sheets", disable=quiet):
        if not path.exists():
            texts, negatives, seeds = [j.text for j in part], [j.negative for j in part], [j.seed for j in part]
            images = lab.generate(texts, negative_prompt=negatives, seed=seeds, progress=False, **recipe).images
            strip = np.concatenate([np.asarray(image.resize((SIDE, SIDE)).convert("RGB")) for image in images])
            keep(path, sheets.png(Image.fromarray(strip)))
    found: dict[str, list] = {category: [] for category in wanted}
    for (category, _), (part, path) in sheet.items():
        with Image.open(path) as image:
            pictures = np.asarray(image.convert("RGB")).reshape(-1, SIDE, SIDE, 3)
        if len(pictures) != len(part):
            raise LabkitError(f"{path} holds {len(pictures)} pictures where {len(part)} belong; delete it, and it is drawn again")
        found[category] += zip(part, pictures)
    return found


def claim(out: Path, recipe: dict) -> None:
    """Say in the folder what its pictures are of; LabkitError if it says so of others already."""
    if out.exists() and not out.is_dir():
        raise LabkitError(f"{out} is a file; name a folder for the evaluation")
    path = out / "recipe.json"
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        other = [f"{key} {there.get(key)}, not {value}" for key, value in recipe.items() if there.get(key) != value]
        if other:
            raise LabkitError(f"{out} holds pictures of another evaluation ({'; '.join(other)}); name another folder with --out")
        return
    keep(path, (json.dumps(recipe, indent=1) + "\n").encode())


def fingerprint(lab) -> str:
    """Sixteen digits that change with the model's weights."""
    digest = hashlib.sha256()
    for network in (lab.unet, lab.vae, lab.text_encoder):
        for name, value in sorted(network.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def keep(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
