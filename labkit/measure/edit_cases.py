"""Edits whose true result is known: a scene, the same scene with one change, and the captions of both.

    render(scene)  -- shape, colour, material, light or one object more -->  render(changed)

The changed scene's picture is the counterfactual that an edit should arrive at. Where the two pictures differ, shadows and
reflections included, is the region that an edit may touch. Scenes are drawn from seeds that no training has seen, and neither side has a
combination that is held out of training.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import pi

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabkitError
from labkit.scenes.captions import describe
from labkit.scenes.scene import COLOURS, ELEVATION, LIGHTS, MATERIALS, SHAPES, SIZES, Object, Scene, is_held_out, scene_from_seed, with_object

KINDS = ("shape", "colour", "material", "light", "add")
FIRST_SEED = 20_000_000  # training begins at 0, held-out renders at 10,000,000
SEEN = 2 / 255  # a colour that differs by more differs to the eye
MARGIN = 4  # pixels about the changed region that are neither in nor out of it: half a latent


@dataclass(frozen=True)
class Case:
    """One edit: its kind, the scene before and after, and their captions."""

    kind: str
    seed: int
    scene: Scene
    changed: Scene
    source: str
    target: str


def cases(scenes: int, first_seed: int = FIRST_SEED, kinds: tuple[str, ...] = KINDS) -> list[list[Case]]:
    """For each of so many one-object scenes one case of every kind; the same lists every time."""
    if scenes < 1 or not kinds or set(kinds) - set(KINDS):
        raise LabkitError(f"{scenes} scenes of {', '.join(kinds) or 'no kind'}: ask for one scene at least, and kinds among {', '.join(KINDS)}.")
    found, seed = [], first_seed
    while len(found) < scenes:
        scene, rng = scene_from_seed(seed, counts=(1,)), np.random.default_rng(seed)
        changed = {kind: change(scene, kind, rng) for kind in KINDS}  # all of them, so that `kinds` does not change what is drawn
        if all(changed.values()):
            found.append([Case(kind, seed, scene, changed[kind], describe(scene).text, describe(changed[kind]).text) for kind in kinds])
        seed += 1
    return found


def change(scene: Scene, kind: str, rng: np.random.Generator) -> Scene | None:
    """The scene with one change of this kind, drawn at random; None where no change is possible that is not held out of training."""
    obj = scene.objects[0]

    def other(values, now: str) -> str:
        return str(rng.choice([value for value in values if value != now]))

    changed: dict[str, Callable[[], Scene | None]] = {
        "shape": lambda: replace(scene, objects=(replace(obj, shape=other(SHAPES, obj.shape)),)),
        "colour": lambda: replace(scene, objects=(replace(obj, colour=other(COLOURS, obj.colour)),)),
        "material": lambda: replace(scene, objects=(replace(obj, material=other(MATERIALS, obj.material)),)),
        "light": lambda: lit(scene, other(LIGHTS, scene.light)),
        "add": lambda: with_object(rng, scene, new_object(rng, obj)),
    }
    for _ in range(20):
        found = changed[kind]()
        if found is not None and not is_held_out(found):
            return found
    return None


def lit(scene: Scene, light: str) -> Scene:
    """The scene in another light, from the same direction, as high in its range as before in its own."""
    (low, high), (low_, high_) = ELEVATION[scene.light], ELEVATION[light]
    height = (scene.elevation * 180 / pi - low) / (high - low)
    return replace(scene, light=light, elevation=round((low_ + height * (high_ - low_)) * pi / 180, 4))


def new_object(rng: np.random.Generator, beside: Object) -> Object:
    """An object that differs in shape and colour from the one beside it."""
    draw = lambda values, no="": str(rng.choice([value for value in values if value != no]))  # noqa: E731
    return Object(draw(SHAPES, beside.shape), draw(COLOURS, beside.colour), draw(SIZES), draw(MATERIALS), 0.0, 0.0, round(rng.uniform(0, pi / 2), 4))


def regions(before: Tensor, after: Tensor, margin: int = MARGIN) -> tuple[Tensor, Tensor]:
    """Where two pictures (3, H, W) differ, and where they do not even `margin` pixels away: two (H, W) bool."""
    inside = (before - after).abs().amax(0) > SEEN  # (H, W)
    around = F.max_pool2d(inside[None, None].float(), 2 * margin + 1, stride=1, padding=margin)[0, 0] > 0
    return inside, ~around


def verified(seen, case: Case) -> bool:
    """Whether what was read off a picture is what the case's changed scene should show.

    `seen` has `objects` and `light`, each object shape, colour and material, as `labkit.scenes.verify` reads them; None is "cannot be
    told" and fits anything. As many objects as there should be, each with the shape and colour of one of them, in any order; the
    material too where it was edited, and the light where that was.
    """
    wanted = case.changed.objects
    if len(seen.objects) != len(wanted) or (case.kind == "light" and seen.light not in (None, case.changed.light)):
        return False
    names = ("shape", "colour", "material") if case.kind == "material" else ("shape", "colour")
    fits = lambda one, obj: all(getattr(one, name) in (None, getattr(obj, name)) for name in names)  # noqa: E731
    orders = [list(seen.objects), list(seen.objects)[::-1]]
    return any(all(fits(one, obj) for one, obj in zip(order, wanted)) for order in orders)
