"""Which words the network obeys: what turning one round in a caption costs, on renders that were never trained on.

    python tests/benchmarks/turned.py [MODEL ...]         default tabletop; several models side by side, on the same pictures and noise

A render is noised to timestep t, and the U-Net guesses the noise twice: told the true caption, and one with a single thing turned round (left for right, three for
two, metal for rubber, two colours exchanged). Printed is the mean squared error of the x0 that follows, told the truth, and by how much the lie raises it. A word that the
network does not listen to costs nothing. 48 photos a row, the same noise for both; intervals are 95 %, by bootstrap over pictures.
"""

import sys
from dataclasses import replace

import torch

import labkit
from labkit.scenes.captions import COUNT, OPPOSITE, relations, stands
from labkit.scenes.render import render_many
from labkit.scenes.scene import Object, Scene
from labkit.schedule import q_sample
from labkit.training.data import SHOWN, TEST_SEED
from labkit.training.evaluate import tensor
from labkit.training.measures import bootstrap

TIMES, EACH = (500, 700, 900), 48


def name(obj: Object, how: str = "", plural: str = "") -> str:
    words = f"{obj.colour} {how}{obj.shape}{plural}"
    return words if plural else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def rows() -> dict[str, list[tuple[Scene, str, str]]]:
    """Scenes with a true caption and a false one, by what is turned round."""
    pool = [scene for scene in (replace(SHOWN, groups=0.0).scene(seed) for seed in range(TEST_SEED, TEST_SEED + 1200)) if scene.style == "photo"]
    ones = [scene for scene in pool if len(scene.objects) == 1]
    twos = [scene for scene in pool if len(scene.objects) == 2 and scene.objects[0].colour != scene.objects[1].colour and scene.objects[0].shape != scene.objects[1].shape]
    alike = [scene for scene in (replace(SHOWN, groups=1.0).scene(seed) for seed in range(TEST_SEED, TEST_SEED + 200)) if scene.style == "photo"]
    found = {kind: [] for kind in ("one on a side", "two on sides", "left of, right of", "in front of, behind", "colours exchanged", "one shape twice", "rubber, metal", "two, three, four")}
    for scene in ones:
        obj, side = scene.objects[0], stands(scene.objects[0])
        if side in ("left", "right"):
            found["one on a side"].append((scene, *(f"{name(obj)} on the {where}" for where in (side, OPPOSITE[side]))))
        found["rubber, metal"].append((scene, *(name(obj, f"{made} ") for made in ((obj.material, "rubber") if obj.material == "metal" else (obj.material, "metal")))))
    for scene in twos:
        for i, j in ((0, 1), (1, 0)):
            a, b = scene.objects[i], scene.objects[j]
            if "left" in relations(scene, i, j):
                found["two on sides"].append((scene, *(f"{name(a)} on the {x} and {name(b)} on the {y}" for x, y in (("left", "right"), ("right", "left")))))
                found["left of, right of"].append((scene, *(f"{name(a)} {side} of {name(b)}" for side in ("left", "right"))))
                swapped = replace(a, colour=b.colour), replace(b, colour=a.colour)
                found["one shape twice"].append((scene, *(f"a {a.shape} and a {x}" for x in (b.shape, a.shape))))
                found["colours exchanged"].append((scene, *(f"{name(x)} and {name(y)}" for x, y in ((a, b), swapped))))
            if "front" in relations(scene, i, j):
                found["in front of, behind"].append((scene, *(f"{name(a)} {side} {name(b)}" for side in ("in front of", "behind"))))
    for scene in alike:
        n = len(scene.objects)
        found["two, three, four"].append((scene, *(f"{COUNT[k]} {name(scene.objects[0], plural='s')}" for k in (n, n % 3 + 2))))
    return {kind: some[:EACH] for kind, some in found.items()}


@torch.no_grad()
def errors(lab, z: torch.Tensor, t: int, captions: list[str]) -> torch.Tensor:
    """Squared error of x0 for each picture, (B,), told these captions."""
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(t))
    times, a = torch.full((len(z),), t), lab.schedule.alpha_bar[t].item()
    x_t = q_sample(z, times, eps, lab.schedule).float()
    guess = lab.unet(x_t.to(lab.device), times.to(lab.device), lab.encode_text(captions)).cpu()
    return (((x_t - (1 - a) ** 0.5 * guess) / a**0.5 - z) ** 2).flatten(1).mean(1)


def main(models: list[str]) -> None:
    told = rows()
    pictures = {kind: tensor(render_many([scene for scene, _, _ in some], workers=1)) for kind, some in told.items()}  # (48, 3, H, W) each
    for model in models:
        lab = labkit.load(model)
        print(f"{model}\n{'turned round':22s}" + "".join(f"{f't = {t}':>38s}" for t in TIMES))
        for kind, some in told.items():
            z = lab.encode_image(pictures[kind]).cpu()
            line = f"{kind:22s}"
            for t in TIMES:
                true, false = (errors(lab, z, t, [row[k] for row in some]) for k in (1, 2))
                cost = bootstrap([[[v] for v in (false - true).tolist()]])
                line += f"{true.mean():.4f} + {cost['share']:.4f} ({cost['low']:.4f} to {cost['high']:.4f})".rjust(38)
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["tabletop"])
