"""From which timestep on a number and two shapes are settled: renders noised part of the way and drawn on, told the truth.

    python tests/benchmarks/renoised.py [MODEL ...]       default tabletop; several models side by side, on the same pictures and noise

Photos that were never trained on, 100 groups of two to four objects of one shape and colour ("three red cubes") and 100 pairs of two shapes ("a cube and a sphere", from left to right), are noised to
timestep t and drawn on from there in steps of 50 timesteps, without guidance. The verifier reads what comes out. Where little noise does no harm and much does, the timesteps between are
those at which the network loses it: lessons about it belong there.
"""

import sys
from collections import Counter
from dataclasses import replace

import labkit
from labkit.scenes.captions import COUNT
from labkit.scenes.render import render_many
from labkit.scenes.scene import Scene
from labkit.scenes.verify import read
from labkit.training.data import SHOWN, TEST_SEED
from labkit.training.evaluate import tensor
from labkit.training.tabletop import PRESETS

TIMES, STEPS, EACH = (500, 600, 700, 800, 900), 20, 100


def told() -> dict[str, list[tuple[Scene, str]]]:
    """Scenes with their captions, by what is asked of them."""
    groups = [replace(PRESETS["further"].world, groups=1.0).scene(seed) for seed in range(TEST_SEED, TEST_SEED + 4 * EACH)]
    pairs = [replace(SHOWN, counts=(2,), groups=0.0).scene(seed) for seed in range(TEST_SEED, TEST_SEED + 4 * EACH)]
    found = {"number": [], "shapes": []}
    for scene in groups:
        found["number"].append((scene, f"{COUNT[len(scene.objects)]} {scene.objects[0].colour} {scene.objects[0].shape}s"))
    for scene in pairs:
        if len({obj.shape for obj in scene.objects}) == 2:
            left, right = sorted(scene.objects, key=lambda obj: obj.x)
            found["shapes"].append((scene, f"a {left.shape} and a {right.shape}"))
    return {what: [row for row in rows if row[0].style == "photo"][:EACH] for what, rows in found.items()}


def outcome(what: str, seen: Scene, true: Scene) -> str:
    """What became of it, in a word."""
    if what == "number":
        more = len(seen.objects) - len(true.objects)
        return "too many" if more > 0 else "too few" if more < 0 else "as told"
    there, wanted = Counter(obj.shape for obj in seen.objects), Counter(obj.shape for obj in true.objects)
    return "as told" if not wanted - there else "another number" if len(seen.objects) != 2 else "other shapes"


def main(models: list[str]) -> None:
    rows = told()
    pictures = {what: tensor(render_many([scene for scene, _ in some], workers=1)) for what, some in rows.items()}  # (100, 3, H, W) each
    for model in models:
        lab = labkit.optimize(labkit.load(model))
        print(model)
        for what, some in rows.items():
            for t in TIMES:
                drawn = labkit.image_to_image(lab, [caption for _, caption in some], pictures[what], strength=t / 1000, steps=STEPS, guidance=1.0, seed=list(range(EACH)), progress=False)
                came = Counter(outcome(what, seen, scene) for seen, (scene, _) in zip(read(drawn.images), some))
                print(f"  {what}, t = {t}: " + ", ".join(f"{k} {n}" for k, n in came.most_common()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["tabletop"])
