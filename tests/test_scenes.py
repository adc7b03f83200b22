"""Scenes: what is drawn is valid, reproducible, in frame, and keeps to its held-out rule."""

import math

import numpy as np
import pytest

from labkit.errors import LabkitError
from labkit.scenes.render import render
from labkit.scenes.scene import SHAPES, Object, Scene, is_held_out, sample_scene, scene_from_seed

SEEDS = range(600)


def by_hand(scene: Scene) -> bool:
    """The held-out rule, spelled out again."""
    cyan = [obj for obj in scene.objects if obj.colour == "cyan"]
    cones = [obj for obj in scene.objects if obj.shape == "cone" and obj.colour == "purple"]
    return len(cyan) > 1 or len(cones) > 0


def test_held_out_is_kept_apart():
    seen, unseen = [[scene_from_seed(seed, held_out=rule) for seed in SEEDS] for rule in ("exclude", "only")]
    assert not any(by_hand(scene) or is_held_out(scene) for scene in seen)
    assert all(by_hand(scene) and is_held_out(scene) for scene in unseen)
    # Each part of a held-out combination is well known from training; only the combination is new.
    assert sum(any(obj.colour == "purple" for obj in scene.objects) for scene in seen) > 60
    assert sum(any(obj.shape == "cone" for obj in scene.objects) for scene in seen) > 60
    assert sum(any(obj.colour == "cyan" for obj in scene.objects) for scene in seen) > 60
    pairs = sum(sum(obj.colour == "cyan" for obj in scene.objects) > 1 for scene in unseen)
    assert 100 < pairs < 500, "both kinds of held-out scene are drawn"


def test_same_seed_same_scene():
    assert scene_from_seed(7) == scene_from_seed(7) != scene_from_seed(8)
    scene = scene_from_seed(7)
    assert Scene.from_json(scene.to_json()) == scene


def test_counts_styles_and_weights_are_followed():
    rng = np.random.default_rng(0)
    counts = {len(sample_scene(rng, counts=(2, 4)).objects) for _ in range(60)}
    assert counts == {2, 4}
    never = {"light": {"night": 0}, "shape": dict.fromkeys(SHAPES[1:], 0)}
    for _ in range(60):
        scene = sample_scene(rng, weights=never, styles=("sketch",))
        assert scene.light != "night" and scene.style == "sketch" and {obj.shape for obj in scene.objects} == {"sphere"}


def test_objects_do_not_touch():
    for seed in SEEDS:
        objects = scene_from_seed(seed, counts=(2, 3, 4)).objects
        for i, a in enumerate(objects):
            for b in objects[:i]:
                assert math.dist((a.x, a.y), (b.x, b.y)) > a.reach + b.reach + 0.1
                assert abs(a.x - b.x) >= 0.5 or abs(a.y - b.y) >= 0.7, "left and right, or front and behind, is unclear"


def test_objects_are_whole_and_seen():
    """Every object is inside the frame and at least half of it is visible: its mask against its mask alone."""
    for seed in range(14):
        scene = scene_from_seed(seed, counts=(3, 4))
        masks = render(scene, 64).masks[0]
        for k, obj in enumerate(scene.objects):
            alone = render(Scene(**{**vars(scene), "objects": (obj,)}), 64).masks[0, 0]
            assert masks[k].sum() > 0.5 * alone.sum(), (seed, k)
            assert alone[0].sum() + alone[-1].sum() + alone[:, 0].sum() + alone[:, -1].sum() == 0, (seed, k)


def test_sizes_in_the_picture():
    """A large object fills about two fifths of the height, a small one about a quarter."""
    for size, low, high in (("large", 0.34, 0.54), ("small", 0.20, 0.34)):
        for seed in range(10):
            scene = scene_from_seed(seed, counts=(1,), weights={"size": {"small": size == "small", "large": size == "large"}})
            rows = (render(scene, 64).masks[0, 0] > 0.5).any(1).sum().item() / 64
            assert low < rows < high, (size, scene.objects[0].shape, rows)


def test_bad_input_is_explained():
    with pytest.raises(LabkitError, match="shape 'pyramid' is unknown; choose one of sphere"):
        Scene((Object("pyramid", "red", "small", "rubber", 0, 0),))
    with pytest.raises(LabkitError, match="counts must lie in 1..4"):
        scene_from_seed(0, counts=(5,))
    with pytest.raises(LabkitError, match="held_out 'none' is unknown"):
        scene_from_seed(0, held_out="none")
    with pytest.raises(LabkitError, match="leave nothing to choose"):
        scene_from_seed(0, weights={"light": {"day": 0, "sunset": 0, "night": 0}})
    with pytest.raises(LabkitError, match="not a scene"):
        Scene.from_json('{"objects": [{"form": "cube"}]}')
    others = ("red", "green", "blue", "yellow", "cyan", "orange", "white")
    only_purple_cones = {"shape": dict.fromkeys(SHAPES[:3], 0), "colour": dict.fromkeys(others, 0)}
    with pytest.raises(LabkitError, match="no scene found"):
        scene_from_seed(0, weights=only_purple_cones)
