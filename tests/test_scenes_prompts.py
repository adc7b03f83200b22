"""The list of prompts: what the file says is what the forms give, in words the model knows, and true scenes pass where false ones fail."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from labkit.errors import LabkitError
from labkit.scenes.captions import vocabulary
from labkit.scenes.judge import right
from labkit.scenes.prompts import CAPTIONS, CATEGORIES, EACH, compose, load_prompts, write_prompts
from labkit.scenes.scene import SHAPES, Object, Scene, is_held_out, sample_scene, scene_from_seed
from labkit.scenes.verify import Read, Seen


@pytest.fixture(scope="module")
def prompts():
    return load_prompts()


def as_read(scene: Scene) -> Read:
    """What a perfect reader reads in a picture of the scene."""
    mask = torch.zeros(1, 1, dtype=torch.bool)
    objects = tuple(Seen(o.shape, o.colour, o.material, o.size, 1.0, mask, (0, 0, 1, 1), o.x, o.y) for o in scene.objects)
    return Read(objects, scene.light, scene.style, scene.table)


def test_file_is_what_the_forms_give(prompts, tmp_path):
    assert prompts == compose()
    write_prompts(tmp_path / "again.json")
    assert load_prompts(tmp_path / "again.json") == prompts


def test_a_hundred_different_prompts_a_category(prompts):
    count = Counter(p.category for p in prompts)
    assert count == {**dict.fromkeys(CATEGORIES, EACH), "captions": CAPTIONS} and EACH == 100 and len(CATEGORIES) == 12
    for category in CATEGORIES:
        own = [(p.text, p.negative) for p in prompts if p.category == category]
        assert len(set(own)) == EACH


def test_words_are_the_model_s(prompts):
    known = set(vocabulary())
    for p in prompts:
        assert set(f"{p.text} {p.negative}".replace(",", " ,").split()) <= known, p
        assert "  " not in p.text and not any(wrong in f" {p.text} {p.negative} " for wrong in (" a orange ", " an red ", " boxs ")), p


def test_held_out_combinations_are_asked_for_in_their_own_category_only(prompts):
    for p in prompts:
        asked = [*p.wants.things, *(thing for thing, count in p.wants.counts for _ in range(count))]
        scene = Scene(tuple(Object(t.get("shape", "cube"), t.get("colour", "red"), "large", "rubber", 0, 0) for t in asked)) if asked else None
        if scene:
            assert is_held_out(scene) == (p.category == "held-out"), p


def test_wants_say_what_the_text_says(prompts):
    """Every attribute that is wanted stands in the text by one of its words, and the number of things is the number of nouns."""
    from labkit.scenes.captions import COUNT, LIGHT, RELATION, SAY, STYLE

    for p in prompts:
        if p.category == "captions":
            continue
        text = f" {p.text} "
        said = lambda value: any(f" {form}" in text for form in SAY.get(value, (value,)))  # noqa: E731
        for thing in (*p.wants.things, *(thing for thing, _ in p.wants.counts)):
            for name, value in thing.items():
                assert said(value) or (p.category == "negation" and name in ("material", "size")), (p, value)
        assert all(COUNT[count] in text.split() for _, count in p.wants.counts)
        for name, value in p.wants.picture:
            assert any(" ".join(word for word, _ in way) in text for way in {"light": LIGHT, "style": STYLE}[name][value]), p
        if p.wants.relation:
            assert any(f" {' '.join(way)} " in text for way in RELATION[p.wants.relation])
        nouns = [form for shape in SHAPES for form in SAY[shape]]
        assert p.wants.counts or p.wants.number == sum(word in nouns for word in text.split())
        assert bool(p.negative) == (p.category == "negation")


@pytest.mark.parametrize("category", sorted(CATEGORIES))
def test_every_category_can_be_passed_and_failed(prompts, category):
    """Among random scenes some pass a prompt and some fail it; for captions' own relation and attributes see the judge's tests."""
    rng = np.random.default_rng(sorted(CATEGORIES).index(category))
    own = [p for p in prompts if p.category == category][::10]
    for p in own:
        asked = [*p.wants.things, *(thing for thing, count in p.wants.counts for _ in range(count))]
        passed = failed = 0
        for _ in range(200):
            other = sample_scene(rng, counts=(max(len(asked), 1),), held_out="any", styles=("photo", "sketch"))
            made = replace(other, objects=tuple(replace(o, **t) for o, t in zip(other.objects, asked)))
            passed += right(as_read(made), p.wants)
            failed += not right(as_read(scene_from_seed(int(rng.integers(10**6)))), p.wants)
            if passed and failed:
                break
        assert passed and failed, p


def test_broken_file_is_named(tmp_path):
    (tmp_path / "bad.json").write_text('[{"category": "colour", "text": "a red cube", "wants": {"things": [{"shape": "pyramid"}]}}]')
    for path in (tmp_path / "bad.json", tmp_path / "none.json"):
        with pytest.raises(LabkitError, match="none.json is no list|cannot be judged|bad.json is no list"):
            load_prompts(path)
