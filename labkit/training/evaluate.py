"""TabletopEval: how good a model of the tabletop world is, in numbers that can be checked.

    right(prompt, seed)  what the reader of pictures (scenes/verify.py) reads is what the prompt asks for (scenes/judge.py)
    score(category)      the mean over its prompts, with a bootstrap interval over prompts (measures.py)

Prompts are data/prompts.json. First all pictures are drawn and kept (draw.py), then they are read and measured. Beside the categories stand, for each
guidance scale: diversity (mean distance of pictures of the same prompt), saturation, the share of burnt pixels, and the Frechet distance between pictures of
captions and renders of the scenes the captions are of.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from labkit.models.sources import verify_sums
from labkit.scenes.judge import alone, right
from labkit.scenes.prompts import CAPTION_SEED, Prompt, load_prompts
from labkit.scenes.reader import WEIGHTS
from labkit.scenes.verify import Read, read
from labkit.training import measures, memorisation, sheets
from labkit.training.data import TEST_SEED, renders
from labkit.training.draw import BATCH, UNSAID, Plan, claim, draw, fingerprint, jobs, keep
from labkit.training.verifier import WORLD

RENDERS = Path(__file__).parents[2] / "runs" / "tabletop" / "data"  # made there if they are not there yet
GENEVAL = ("single object", "two objects", "counting", "colour", "position", "attribute binding")


def evaluate(lab, out: str | Path, plan: Plan = Plan(), data: str | Path = RENDERS, quiet: bool = False) -> dict:
    """Draw, read, count; the figures as a dict, printed, and written to `out`: evaluation.json, for each scale a folder of sheets, verdicts and samples.

    lab: a LatentDiffusion; data: where renders are kept. Goes on with what is in `out` already. Raises LabkitError if that is of another model or plan.
    """
    out, prompts = Path(out), load_prompts()
    verify_sums(WEIGHTS)
    world = memorisation.world_of(lab, plan.audit) if plan.audit else None
    scales = [lab.defaults["guidance"] if w is None else w for w in plan.guidance]
    steps = lab.defaults["steps"] if plan.steps is None else plan.steps
    plain = {name: getattr(plan, name) for name in ("seed", "seeds", "prompts", "captions")}
    claim(out, {"model": lab.name, "weights": fingerprint(lab), "steps": steps, **plain})
    tower = measures.load_tower()
    true = renders(WORLD, CAPTION_SEED, plan.captions, Path(data))
    other = renders(WORLD, TEST_SEED, plan.captions, Path(data))
    found = {"model": lab.name, "steps": steps, "seeds": plan.seeds, "prompts": plan.prompts, "runs": [],
             "renders": whole(true) | {"frechet": round(measures.frechet(vectors(tower, other), vectors(tower, true)), 4)},
             "reconstruction": reconstruction(lab, renders(WORLD, TEST_SEED, plan.reconstructions, Path(data)))}
    for w in scales:
        folder = out / f"w-{w:g}"
        drawn = draw(lab, jobs(prompts, plan), folder, {"guidance": w, "steps": steps}, quiet)
        found["runs"].append({"guidance": w, **judged(prompts, drawn, folder), **pictured(tower, drawn, true)})
        if world is not None:
            captioned = np.stack([picture for _, picture in drawn["captions"]])
            found["runs"][-1]["audit"] = memorisation.audit(captioned, true, other, (world, plan.audit), Path(data))
        keep(out / "evaluation.json", (json.dumps(found, indent=1) + "\n").encode())
    if not quiet:
        print(table(found))
    return found


# --- what is measured ---------------------------------------------------------------------------------------------


def judged(prompts: Sequence[Prompt], drawn: dict, folder: Path) -> dict:
    """The scores of the categories; leaves verdicts.json and the sheets in the folder."""
    verdicts, scores = {}, {}
    for category, row in drawn.items():
        if category == "captions":
            continue
        readings = read(np.stack([picture for _, picture in row]))
        rows = [{**asdict(job), "right": right(said, prompts[job.prompt].wants), "alone": alone(said, prompts[job.prompt].wants), "read": short(said)}
                for (job, _), said in zip(row, readings)]
        verdicts[category] = rows
        scores[category] = {name: measures.bootstrap([by_prompt(rows, name)]) for name in ("right", "alone")}
        shown = [{**verdict, "image": picture} for verdict, (_, picture) in zip(rows, row)][:80]
        keep(folder / f"{category.replace(' ', '-')}.png", sheets.png(sheets.sheet(shown, columns=10)))
    keep(folder / "verdicts.json", (json.dumps(verdicts, indent=1) + "\n").encode())
    keep(folder / "samples.png", sheets.png(sheets.grid([picture for _, picture in drawn["captions"][:64]], columns=8)))
    six = measures.bootstrap([by_prompt(verdicts[category], "right") for category in GENEVAL])
    return {"six": six, "categories": scores}


def by_prompt(rows: list[dict], name: str) -> list[list[float]]:
    """The values of `name`, those of one prompt together."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["prompt"], []).append(float(row[name]))
    return list(found.values())


def short(said: Read) -> str:
    """A reading in words."""
    things = ", ".join(f"{o.size} {o.colour} {o.material} {o.shape}" for o in said.objects) or "nothing"
    return f"{things}; {said.table} table, {said.light}, {said.style}"


def pictured(tower, drawn: dict, true: np.ndarray) -> dict:
    """Diversity over the categories' prompts; of the captions' pictures saturation, burnt pixels, and the Frechet distance to the renders `true`."""
    distances = []
    for category, row in drawn.items():
        together: dict[int, list[np.ndarray]] = {}
        for job, picture in row if category not in ("captions", UNSAID) else ():
            together.setdefault(job.prompt, []).append(picture)
        distances += [measures.apart(measures.features(tower, tensor(np.stack(few)))[0]) for few in together.values() if len(few) > 1]
    captioned = np.stack([picture for _, picture in drawn["captions"]])
    diversity = {"diversity": round(float(np.mean(distances)), 4)} if distances else {}
    return diversity | whole(captioned) | {"frechet": round(measures.frechet(vectors(tower, captioned), vectors(tower, true)), 4)}


def whole(pictures: np.ndarray) -> dict[str, float]:
    """Mean saturation and share of burnt pixels of pictures (N, H, W, 3) uint8."""
    x = tensor(pictures)
    return {name: round(float(measure(x).mean()), 4) for name, measure in (("saturation", measures.saturation), ("burnt", measures.burnt))}


def vectors(tower, pictures: np.ndarray) -> Tensor:
    return torch.cat([measures.features(tower, tensor(pictures[i : i + 50]))[1] for i in range(0, len(pictures), 50)])


def reconstruction(lab, images: np.ndarray) -> dict[str, float]:
    """PSNR and SSIM of renders sent through the autoencoder, means over pictures."""
    fidelity: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
    for i in range(0, len(images), BATCH):
        x = tensor(images[i : i + BATCH])
        y = lab.decode(lab.encode_image(x)).cpu()
        fidelity["psnr"].append(measures.psnr(x, y))
        fidelity["ssim"].append(measures.ssim(x, y))
    return {"pictures": len(images), **{name: round(float(torch.cat(parts).mean()), 3) for name, parts in fidelity.items()}}


def tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


# --- what is said -------------------------------------------------------------------------------------------------


def table(found: dict) -> str:
    """The figures as lines of text: a column for each guidance scale; in brackets the 95 % interval, behind it the share with nothing beside what is asked."""
    runs, wide = found["runs"], 30
    lines = [f"{found['model']}: {found['steps']} steps, {found['prompts']} prompts a category, {found['seeds']} pictures each",
             "in %: right [95 % interval], right and with nothing beside it",
             f"{'guidance':<20}" + "".join(f"{run['guidance']:>{wide}g}" for run in runs)]

    def shares(row: dict) -> str:
        said = f"{100 * row['right']['share']:.1f} [{100 * row['right']['low']:.1f}, {100 * row['right']['high']:.1f}]"
        return said + (f" {100 * row['alone']['share']:5.1f}" if "alone" in row else "      ")

    for category in runs[0]["categories"]:
        lines.append(f"{category:<20}" + "".join(f"{shares(run['categories'][category]):>{wide}}" for run in runs))
    lines.append(f"{'mean of first six':<20}" + "".join(f"{shares({'right': run['six']}):>{wide}}" for run in runs))
    for name in ("diversity", "saturation", "burnt", "frechet"):
        if any(name in run for run in runs):
            beside = f"    renders: {found['renders'][name]}" if name in found["renders"] else ""
            lines.append(f"{name:<20}" + "".join(f"{run.get(name, float('nan')):>{wide}}" for run in runs) + beside)
    lines += [f"guidance {run['guidance']:g}: {memorisation.sentence(run['audit'])}" for run in runs if "audit" in run]
    again = found["reconstruction"]
    lines.append(f"autoencoder on {again['pictures']} test renders: PSNR {again['psnr']} dB, SSIM {again['ssim']}")
    return "\n".join(lines)
