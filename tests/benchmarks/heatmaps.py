"""Which way of averaging makes the heat map that lies best on its object: ours, the published ones and their parts, on scenes whose masks are known.

    python tests/benchmarks/heatmaps.py [SCENES [MODEL [FILE.json]]]         default 100 scenes, tabletop, no file

Teacher-forced: a scene that was never trained on is rendered and encoded, noised to each of ten timesteps, and the U-Net is shown it with its
true caption; nothing is drawn, so the object's mask is exact. For every shape and colour word that speaks of one object: the average
precision of its map as a score of "this pixel is the object", and the IoU of the map above a share of its maximum, the share that is best on
the first half of the scenes, measured on the second. Intervals are 95 %, by bootstrap over scenes. `centre` and `uniform` look at nothing.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import labkit
from labkit.diffusion import Course
from labkit.probes.heatmap import resize
from labkit.probes.published import daam, prompt_to_prompt
from labkit.scenes.captions import caption
from labkit.scenes.render import render
from labkit.schedule import q_sample
from labkit.training.data import TEST_SEED, World, scenes

SIDE, STEPS, BATCH = 128, 10, 10


def forced(lab, images: Tensor, prompts: list[str], steps: int, seed: int = 0):
    """A trace of a run in which, at every step, the U-Net is shown the true picture, noised to that step's level."""
    z = lab.encode_image(images)

    def course(noise) -> Course:
        eps = noise.draw()
        return Course(eps, told=lambda x_t: q_sample(z, lab.layout.t, eps, lab.schedule))

    with labkit.record(lab) as trace:
        for _ in lab.steps(prompts, steps=steps, guidance=1.0, seed=[seed + k for k in range(len(prompts))], course=course):
            pass
    return trace


def ways(lab) -> dict:
    """name -> (trace, tokens, image) -> HeatMap; layers by their distance from the latents' own size."""
    full = lab.unet.config.sample_size
    found = {"ours": lambda t, w, i: t.heatmap(w, i), "all layers": lambda t, w, i: t.heatmap(w, i, layers="*")}
    for part in ("down", "up", "mid"):
        found[f"{part} only"] = lambda t, w, i, part=part: t.heatmap(w, i, layers=part)
    for side in (full, full // 2):
        found[f"{side}x{side} only"] = lambda t, w, i, side=side: t.heatmap(w, i, resolution=side)
        found[f"Prompt-to-Prompt, {side}x{side}"] = lambda t, w, i, side=side: prompt_to_prompt(t, w, side, i)
    found["DAAM"] = lambda t, w, i: daam(t, w, image=i)
    return found


def average_precision(score: Tensor, mask: Tensor) -> float:
    """The mean of precision over the mask's pixels, in the order of their scores."""
    hit = mask.flatten()[score.flatten().argsort(descending=True)].double()
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    return float((precision * hit).sum() / hit.sum())


def iou(score: Tensor, mask: Tensor, shares: Tensor) -> Tensor:
    """IoU of the map above each share of the way from its minimum to its maximum, (shares,)."""
    m = (score - score.min()) / (score.max() - score.min() + 1e-12)
    above = m[None] > shares[:, None, None]
    return (above & mask).sum((1, 2)) / (above | mask).sum((1, 2)).clamp(min=1)


def interval(values: Tensor, of: Tensor) -> tuple[float, float]:
    """Bootstrap over scenes: `of` says which scene each value is of."""
    g = torch.Generator().manual_seed(0)
    groups = [values[of == k] for k in of.unique()]
    means = sorted(float(torch.cat([groups[k] for k in torch.randint(len(groups), (len(groups),), generator=g)]).mean()) for _ in range(1000))
    return means[25], means[974]


def main(count: int = 100, model: str = "tabletop", out: str | None = None) -> None:
    import numpy as np

    lab, everything = labkit.load(model), scenes(World(), TEST_SEED, count)
    rng, shares = np.random.default_rng(0), torch.linspace(0.1, 0.9, 33)
    methods, rows = ways(lab), {}
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
    blind = {"centre": -(x**2 + y**2), "uniform": torch.zeros(SIDE, SIDE)}
    for start in range(0, count, BATCH):
        batch = everything[start : start + BATCH]
        said, seen = [caption(scene, rng, "medium") for scene in batch], render(batch, SIDE)
        trace = forced(lab, seen.image, [c.text for c in said], STEPS, start)
        for k, c in enumerate(said):
            for word in (w for w in c.words if w.kind in ("shape", "colour") and len(w.objects) == 1):
                mask = seen.masks[k, word.objects[0]] > 0.5
                tokens = tuple(i + 1 for i, (a, b) in enumerate(lab.tokenizer.tokenize(c.text).spans) if a < word.end and b > word.start)
                if int(mask.sum()) < 20:
                    continue
                for name, make in (methods | blind).items():
                    score = resize(make(trace, tokens, k).map, (SIDE, SIDE)) if callable(make) else make
                    rows.setdefault((name, word.kind), []).append((start + k, average_precision(score, mask), iou(score, mask, shares)))
    print(f"{lab.name}: {count} scenes, {STEPS} timesteps, teacher-forced")
    found = []
    for kind in ("shape", "colour"):
        for name in (*methods, *blind):
            of, ap, overlap = zip(*rows[name, kind])
            of, ap, overlap = torch.tensor(of), torch.tensor(ap), torch.stack(overlap)
            first = of < count / 2
            best = int(overlap[first].mean(0).argmax())
            low, high = interval(ap, of)
            low_, high_ = interval(overlap[~first][:, best], of[~first])
            print(
                f"{kind:7} {name:24} AP {float(ap.mean()):.3f} ({low:.3f} to {high:.3f})   IoU {float(overlap[~first][:, best].mean()):.3f} "
                f"({low_:.3f} to {high_:.3f}) above {float(shares[best]):.2f} of the range   {len(ap)} words",
                flush=True,
            )
            found.append({"map": name, "kind": kind, "words": len(ap), "ap": {"value": round(float(ap.mean()), 4), "low": round(low, 4), "high": round(high, 4)}})
    if out:
        Path(out).write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main(*map(int, sys.argv[1:2]), *sys.argv[2:])
