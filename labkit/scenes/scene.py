"""The tabletop world as data: what a scene is, and how one is drawn from a seed.

Coordinates: x to the right, y away from the camera, z up; the table top is z = 0 and the unit is about one large
object. A scene holds every number the picture depends on, so that scene -> picture is a function. Certain attribute
combinations are held out of training to measure compositional generalisation: purple cones, and cyan objects in pairs
(the idea of CLEVR's CoGenT split, Johnson et al. 2017, arXiv:1612.06890).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from labkit.errors import LabkitError
from labkit.scenes.camera import Camera, screen_box

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLOURS = {  # linear reflectance, chosen to stay apart under all three lights
    "red": (0.72, 0.020, 0.030),
    "green": (0.035, 0.40, 0.050),
    "blue": (0.025, 0.090, 0.75),
    "yellow": (0.88, 0.62, 0.020),
    "purple": (0.26, 0.035, 0.52),
    "cyan": (0.030, 0.58, 0.66),
    "orange": (0.95, 0.235, 0.010),
    "white": (0.84, 0.84, 0.82),
}
SIZES = ("small", "large")
MATERIALS = ("rubber", "metal")
TABLES = ("plain", "checkered", "wooden")
LIGHTS = ("day", "sunset", "night")
STYLES = ("photo", "sketch")
HELD_OUT = ("exclude", "only", "any")
COUNT_WEIGHTS = {1: 0.35, 2: 0.30, 3: 0.20, 4: 0.15}

HIDDEN = 0.40  # of an object's box on the screen, what nearer ones may cover at most
SCALE = {"small": 0.62, "large": 1.0}
# (half width of the footprint, height) of the large solid; a cube's half width is half its side.
SOLID = {"sphere": (0.64, 1.28), "cube": (0.50, 1.00), "cylinder": (0.50, 1.12), "cone": (0.62, 1.30)}
ELEVATION = {"day": (48, 60), "sunset": (24, 31), "night": (54, 64)}  # of the key light, degrees


@dataclass(frozen=True)
class Object:
    """One solid on the table: its names, the table position of its centre, and its turn about the vertical (radians)."""

    shape: str
    colour: str
    size: str
    material: str
    x: float
    y: float
    angle: float = 0.0

    @property
    def radius(self) -> float:
        """Radius of the footprint; for a cube, half its side."""
        return SOLID[self.shape][0] * SCALE[self.size]

    @property
    def height(self) -> float:
        return SOLID[self.shape][1] * SCALE[self.size]

    @property
    def reach(self) -> float:
        """Radius of the circle about (x, y) that holds the footprint."""
        return self.radius * (math.sqrt(2) if self.shape == "cube" else 1.0)


@dataclass(frozen=True)
class Scene:
    """Everything the picture depends on; `yaw`, `pitch`, `distance` place the camera, `azimuth`, `elevation` the key light."""

    objects: tuple[Object, ...]
    table: str = "plain"
    light: str = "day"
    style: str = "photo"
    yaw: float = 0.0  # radians, about the vertical
    pitch: float = 0.47  # radians below the horizontal
    distance: float = 7.0  # from the camera to the middle of the table
    azimuth: float = 2.6  # radians; where the light comes from, 0 = right, pi/2 = behind
    elevation: float = 0.9  # radians above the table
    tone: float = 0.5  # 0..1, shifts the table's tint and its grain

    def __post_init__(self):
        for obj in self.objects:
            _known("shape", obj.shape, SHAPES)
            _known("colour", obj.colour, tuple(COLOURS))
            _known("size", obj.size, SIZES)
            _known("material", obj.material, MATERIALS)
        _known("table", self.table, TABLES)
        _known("light", self.light, LIGHTS)
        _known("style", self.style, STYLES)

    def camera(self) -> Camera:
        return Camera(self.yaw, self.pitch, self.distance)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Scene":
        try:
            fields = json.loads(text)
            return Scene(**{**fields, "objects": tuple(Object(**obj) for obj in fields["objects"])})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise LabkitError(f"this is not a scene ({error}); pass the text that Scene.to_json() gave") from None


def _known(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise LabkitError(f"{what} {value!r} is unknown; choose one of {', '.join(choices)}")


def is_held_out(scene: Scene) -> bool:
    """Whether the scene has a purple cone, or two or more cyan objects."""
    purple_cone = any(obj.colour == "purple" and obj.shape == "cone" for obj in scene.objects)
    return purple_cone or sum(obj.colour == "cyan" for obj in scene.objects) >= 2


def scene_from_seed(seed: int, **options) -> Scene:
    """The scene that `sample_scene` draws from a fresh generator of this seed."""
    return sample_scene(np.random.default_rng(seed), **options)


def sample_scene(
    rng: np.random.Generator,
    counts: Sequence[int] = (1, 2, 3, 4),
    weights: Mapping[str, Mapping] | None = None,
    held_out: str = "exclude",
    styles: Sequence[str] = ("photo",),
    alike: bool = False,
    hidden: float = HIDDEN,
) -> Scene:
    """Draw a scene whose objects are in frame, do not touch, and hide less than half of each other, or less than `hidden` of an object's box.

    weights: relative frequencies by attribute, e.g. {"count": {1: 2, 4: 1}, "light": {"night": 0}}; what is not named
    weighs 1 (counts: COUNT_WEIGHTS). held_out: "exclude" for training, "only" for the generalisation test, or "any".
    alike: all objects have one shape and one colour.
    """
    _known("held_out", held_out, HELD_OUT)
    if not counts or min(counts) < 1 or max(counts) > 4:
        raise LabkitError(f"counts must lie in 1..4, got {tuple(counts)}")
    weights = {"count": COUNT_WEIGHTS, **(weights or {})}
    for _ in range(1000):
        count = int(_draw(rng, "count", tuple(counts), weights))
        objects = [_attributes(rng, weights)]
        while len(objects) < count:
            twin = objects[int(rng.integers(len(objects)))] if rng.random() < 0.35 else None
            another = _attributes(rng, weights, twin)
            objects.append(replace(another, shape=objects[0].shape, colour=objects[0].colour) if alike else another)
        if held_out == "only":
            objects = _plant_held_out(rng, objects)
        light = _draw(rng, "light", LIGHTS, weights)
        table, style = _draw(rng, "table", TABLES, weights), _draw(rng, "style", tuple(styles), weights)
        scene = _with_view(rng, Scene(tuple(objects), table=table, light=light, style=style))
        if held_out != "any" and is_held_out(scene) != (held_out == "only"):
            continue
        placed = _place(rng, scene, hidden)
        if placed is not None:
            return placed
    raise LabkitError(f"no scene found in 1000 tries with held_out={held_out!r}, counts={tuple(counts)}; loosen them")


def with_object(rng: np.random.Generator, scene: Scene, obj: Object, tries: int = 200) -> Scene | None:
    """The same scene with one more object, at a place drawn so that all stay in frame and apart; None where it does not fit."""
    camera, placed = scene.camera(), list(scene.objects)
    boxes = [screen_box(camera, one) for one in placed]
    for _ in range(tries):
        candidate = replace(obj, x=round(rng.uniform(-1.3, 1.3), 4), y=round(rng.uniform(-1.2, 1.4), 4))
        if _fits(candidate, screen_box(camera, candidate), placed, boxes):
            return replace(scene, objects=(*scene.objects, candidate))
    return None


def rearranged(scene: Scene, rng: np.random.Generator) -> Scene:
    """Another scene of the same specification: the same objects, table, light and style; places, turns, camera and lamp are drawn anew."""
    for _ in range(1000):
        turned = tuple(replace(obj, angle=round(rng.uniform(0, math.pi / 2), 4)) for obj in scene.objects)
        placed = _place(rng, _with_view(rng, replace(scene, objects=turned)))
        if placed is not None:
            return placed
    raise LabkitError(f"no other arrangement found of {len(scene.objects)} objects in 1000 tries; take some away")


def _with_view(rng, scene: Scene) -> Scene:
    """The scene with its camera, its lamp's place and its table's tint drawn anew."""
    return replace(
        scene,
        yaw=round(rng.uniform(-0.05, 0.05), 4),
        pitch=round(rng.uniform(0.44, 0.50), 4),
        distance=round((6.9 + 0.2 * (len(scene.objects) - 1)) * rng.uniform(0.97, 1.04), 4),
        azimuth=round(_azimuth(rng, scene.light), 4),
        elevation=round(math.radians(rng.uniform(*ELEVATION[scene.light])), 4),
        tone=round(rng.random(), 4),
    )


def _draw(rng, what: str, choices: tuple, weights: Mapping[str, Mapping]):
    p = np.array([weights.get(what, {}).get(choice, 1.0) for choice in choices], dtype=float)
    if p.min() < 0 or p.sum() == 0:
        raise LabkitError(f"the weights of {what!r} leave nothing to choose from {choices}; give one of them a positive weight")
    return choices[int(np.searchsorted(np.cumsum(p) / p.sum(), rng.random(), side="right"))]


def _attributes(rng, weights, twin: Object | None = None) -> Object:
    """One object without a place; with a twin it shares the twin's shape, its colour, or both, so that groups occur."""
    shared = int(rng.integers(3)) if twin else -1
    return Object(
        shape=twin.shape if shared in (0, 2) else _draw(rng, "shape", SHAPES, weights),
        colour=twin.colour if shared in (1, 2) else _draw(rng, "colour", tuple(COLOURS), weights),
        size=_draw(rng, "size", SIZES, weights),
        material=_draw(rng, "material", MATERIALS, weights),
        x=0.0,
        y=0.0,
        angle=round(rng.uniform(0, math.pi / 2), 4),
    )


def _plant_held_out(rng, objects: list[Object]) -> list[Object]:
    """Make the first object a purple cone, or the first two cyan."""
    if len(objects) == 1 or rng.random() < 0.5:
        return [replace(objects[0], shape="cone", colour="purple"), *objects[1:]]
    return [replace(obj, colour="cyan") for obj in objects[:2]] + objects[2:]


def _azimuth(rng, light: str) -> float:
    """From the left or the right; by day and night a little in front of the table, at sunset about level with it."""
    forward = rng.uniform(-0.12, 0.35) if light == "sunset" else rng.uniform(0.25, 0.75)
    return math.pi + forward if rng.random() < 0.6 else -forward


def _place(rng, scene: Scene, hidden: float = HIDDEN, tries: int = 40) -> Scene | None:
    """Give the objects places one by one; None where they do not fit."""
    camera, placed = scene.camera(), []
    across, near, far = (0.75, -0.6, 0.8) if len(scene.objects) == 1 else (1.3, -1.2, 1.4)
    boxes: list[tuple] = []
    for obj in scene.objects:
        for _ in range(tries):
            candidate = replace(obj, x=round(rng.uniform(-across, across), 4), y=round(rng.uniform(near, far), 4))
            box = screen_box(camera, candidate)
            if _fits(candidate, box, placed, boxes, hidden):
                placed.append(candidate)
                boxes.append(box)
                break
        else:
            return None
    return replace(scene, objects=tuple(placed))


def _fits(obj: Object, box: tuple, placed: list[Object], boxes: list[tuple], hidden: float = HIDDEN) -> bool:
    """In frame, clear of the others on the table, apart by direction, and neither hidden nor hiding too much."""
    if min(box) < 0.02 or max(box) > 0.98:
        return False
    for other in placed:
        dx, dy = abs(obj.x - other.x), abs(obj.y - other.y)
        if math.hypot(dx, dy) < obj.reach + other.reach + 0.12 or (dx < 0.5 and dy < 0.7):
            return False
    return all(
        _hidden(one, one_box, [*zip(placed, boxes), (obj, box)]) < hidden for one, one_box in [*zip(placed, boxes), (obj, box)]
    )


def _hidden(obj: Object, box: tuple, everything: list[tuple]) -> float:
    """Share of obj's screen box covered by the boxes of nearer objects (an over-estimate of what is hidden)."""
    covered = 0.0
    for other, (left, top, right, bottom) in everything:
        if other is not obj and other.y < obj.y:
            width = min(right, box[2]) - max(left, box[0])
            height = min(bottom, box[3]) - max(top, box[1])
            covered += max(width, 0.0) * max(height, 0.0)
    return covered / ((box[2] - box[0]) * (box[3] - box[1]))
