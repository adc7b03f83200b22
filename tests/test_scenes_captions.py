"""Captions are read back by a parser of their own and held against the scene: counts, attributes, relations."""

import itertools
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest

from labkit.errors import LabkitError
from labkit.scenes.captions import KINDS, MAX_WORDS, caption, describe, relations, twisted, vocabulary
from labkit.scenes.scene import LIGHTS, TABLES, Object, Scene, scene_from_seed

SEEDS = range(2400)

# The reader's own dictionary, kept apart from the grammar's.
NOUNS = {"sphere": "sphere", "ball": "sphere", "cube": "cube", "block": "cube", "box": "cube", "cylinder": "cylinder",
         "tube": "cylinder", "cone": "cone"}  # fmt: skip
PLURALS = {("boxes" if noun == "box" else noun + "s"): shape for noun, shape in NOUNS.items()}
ADJECTIVES = {"small": ("size", "small"), "little": ("size", "small"), "tiny": ("size", "small"), "large": ("size", "large"),
              "big": ("size", "large"), "rubber": ("material", "rubber"), "matte": ("material", "rubber"),
              "metal": ("material", "metal"), "shiny": ("material", "metal")}  # fmt: skip
ADJECTIVES |= {c: ("colour", c) for c in ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")}
NUMBERS = {"two": 2, "three": 3, "four": 4}
STYLE = r"^a (?P<style>photo|picture|pencil sketch|sketch|drawing) of "
LIGHT = r" (?P<light>in daylight|by day|at sunset|at dusk|at night|by night)$"
TABLE = r" on a (?P<table>(plain|bare|checkered|wooden|wood) table|chessboard)$"
RELATION = r" (to the left of|left of|to the right of|right of|in front of|behind) (?=an? )"
WHERE = r" (on the left|on the right|in front|behind)$"
MEANS = {"photo": "photo", "picture": "photo", "pencil sketch": "sketch", "sketch": "sketch", "drawing": "sketch",
         "in daylight": "day", "by day": "day", "at sunset": "sunset", "at dusk": "sunset", "at night": "night",
         "by night": "night", "plain table": "plain", "bare table": "plain", "checkered table": "checkered",
         "chessboard": "checkered", "wooden table": "wooden", "wood table": "wooden"}  # fmt: skip


def read_things(phrase: str) -> tuple[int | None, dict]:
    """"two red spheres" -> (2, {...}); "a red sphere" -> (None, {...})."""
    article, *adjectives, noun = phrase.split()
    wanted = dict(ADJECTIVES[word] for word in adjectives)
    assert len(wanted) == len(adjectives), f"an attribute is named twice: {phrase}"
    if article in NUMBERS:
        return NUMBERS[article], wanted | {"shape": PLURALS[noun]}
    assert article == ("an" if phrase.split()[1][0] in "aeiou" else "a"), phrase
    return None, wanted | {"shape": NOUNS[noun]}


def fitting(scene: Scene, wanted: dict) -> list[int]:
    return [k for k, obj in enumerate(scene.objects) if all(getattr(obj, name) == value for name, value in wanted.items())]


def stands(scene: Scene, words: str, i: int, j: int) -> bool:
    """Whether object i stands so with respect to j: apart on the table, and in that order before the camera too."""
    a, b = scene.objects[i], scene.objects[j]
    u, _, depth = scene.camera().project(np.array([[a.x, a.y, 0.0], [b.x, b.y, 0.0]]))
    if "left" in words:
        return a.x < b.x - 0.4 and u[0] < u[1] - 0.04
    if "right" in words:
        return a.x > b.x + 0.4 and u[0] > u[1] + 0.04
    if "front" in words:
        return a.y < b.y - 0.5 and depth[0] < depth[1] - 0.3
    return a.y > b.y + 0.5 and depth[0] > depth[1] + 0.3


def placed(scene: Scene, place: str, k: int) -> bool:
    """Whether object k stands off the table's middle in this direction, on the table and before the camera."""
    obj = scene.objects[k]
    u, _, depth = scene.camera().project(np.array([[obj.x, obj.y, 0.0], [0.0, 0.1, 0.0]]))
    across, away = u[0] - u[1], depth[0] - depth[1]
    return {"on the left": obj.x < -0.25 and across < 0, "on the right": obj.x > 0.25 and across > 0,
            "in front": obj.y < -0.15 and away < -0.15, "behind": obj.y > 0.35 and away > 0.15}[place]  # fmt: skip


def is_true(text: str, scene: Scene) -> bool:
    """Read the sentence and say whether it holds of the scene."""
    for kind, pattern in (("style", STYLE), ("light", LIGHT), ("table", TABLE)):
        found = re.search(pattern, text)
        if found:
            if MEANS[found[kind]] != getattr(scene, kind):
                return False
            text = text[: found.start()] + text[found.end() :]
    parts = re.split(RELATION, text)
    if len(parts) == 3:
        (_, first), (_, second) = read_things(parts[0]), read_things(parts[2])
        pairs = itertools.product(fitting(scene, first), fitting(scene, second))
        return any(i != j and stands(scene, parts[1], i, j) for i, j in pairs)
    assert len(parts) == 1, f"two relations in one sentence: {text}"
    single = []
    for part in re.split(r" and |, ", text):
        where = re.search(WHERE, part)
        number, wanted = read_things(part[: where.start()] if where else part)
        fits = [k for k in fitting(scene, wanted) if not where or placed(scene, where[1], k)]
        if number is None:
            single.append(fits)
        elif len(fits) != number:
            return False
    # "a red sphere and a red sphere" needs two of them: every phrase must find an object of its own.
    return any(len(set(choice)) == len(choice) for choice in itertools.product(*single))


@cache
def scenes() -> list[Scene]:
    return [scene_from_seed(seed, held_out="any", styles=("photo", "sketch")) for seed in SEEDS]


def drawn(detail: str | None = None, whereabouts: float = 0.0, complete: float = 0.0, ordered: float = 0.0):
    rng = np.random.default_rng(11)
    return ((scene, caption(scene, rng, detail, whereabouts, complete, ordered)) for scene in scenes())


@pytest.mark.parametrize("chances", [(None, 0.0, 0.0, 0.0), (None, 0.6, 0.7, 0.5), ("bare", 0.3, 1.0, 1.0)])
def test_captions_are_true(chances):
    for scene, said in drawn(*chances):
        assert is_true(said.text, scene), (said.text, scene)
        assert is_true(describe(scene).text, scene), (describe(scene).text, scene)


def lies(text: str, scene: Scene):
    """(kind, false sentence) for each way to twist a true one."""
    swap = {"left": "right", "right": "left", "behind": "in front of", "in front of": "behind"}
    if re.search(r"on the (left|right)", text) and len({obj.shape for obj in scene.objects}) == len(scene.objects):
        yield "whereabouts", re.sub(r"on the (left|right)", lambda match: f"on the {swap[match[1]]}", text)
    if unmistakable(text, scene):
        yield "relation", re.sub(r"left|right|behind|in front of", lambda match: swap[match[0]], text)
    for number, other in (("two", "three"), ("three", "two")):
        if text.startswith(number):
            yield "count", text.replace(number, other)
    if all(obj.colour != "white" for obj in scene.objects):
        yield "colour", re.sub(r"\b(red|green|blue|yellow|purple|cyan|orange)\b", "white", text)
    if all(obj.shape != "cone" for obj in scene.objects):
        yield "shape", re.sub(r"\b(sphere|ball|cube|block|box|cylinder|tube)\b", "cone", text)
    if all(obj.size == "small" for obj in scene.objects):
        yield "size", re.sub("small|little|tiny", "big", text)
    if all(obj.material == "metal" for obj in scene.objects):
        yield "material", re.sub("metal|shiny", "matte", text)
    yield "table", re.sub(r"\b(wooden|wood|bare|plain|checkered) table", "chessboard" if scene.table != "checkered" else "wood table", text)
    yield "light", re.sub("by night|at night|at sunset|at dusk", "by day", text)
    yield "style", re.sub(STYLE, "a sketch of " if scene.style == "photo" else "a photo of ", text)


def test_reader_rejects_false_captions():
    """The reader must be able to say no, or the test above proves nothing."""
    rejected = Counter()
    for scene, said in drawn(whereabouts=0.6):
        for kind, lie in lies(said.text, scene):
            lie = re.sub(r"\ban? (?=[aeiou])", "an ", re.sub(r"\ban? (?=[^aeiou ])", "a ", lie))
            if lie != said.text:
                assert not is_true(lie, scene), (kind, lie, scene)
                rejected[kind] += 1
    assert len(rejected) == 10 and min(rejected.values()) >= 20, rejected


def test_twisted_captions_are_false():
    """By the same reader; what they differ in is one number, one direction, or two words exchanged."""
    rng, kinds = np.random.default_rng(3), Counter()
    for scene, said in drawn(whereabouts=0.6):
        lie = twisted(said, scene, rng)
        if lie is None:
            kinds["none"] += 1
            continue
        assert not is_true(lie, scene), (said.text, lie, scene)
        old, new = (re.findall(r"[a-z]+", re.sub(r"\ban\b", "a", text)) for text in (said.text, lie))
        moved = Counter(old) - Counter(new) + (Counter(new) - Counter(old))
        kinds["exchanged" if not moved else "number" if set(moved) & set(NUMBERS) else "direction"] += 1
        assert set(moved) <= {*NUMBERS, "left", "right", "in", "front", "of", "behind"}, (said.text, lie)
    assert min(kinds[kind] for kind in ("none", "exchanged", "number", "direction")) > 50, kinds


def unmistakable(text: str, scene: Scene) -> bool:
    """Whether both sides of the relation fit one object each, so that turning it round must make it false."""
    parts = re.split(RELATION, re.sub(TABLE, "", re.sub(LIGHT, "", re.sub(STYLE, "", text))))
    return len(parts) == 3 and all(len(fitting(scene, read_things(part)[1])) == 1 for part in parts[::2])


def test_words_are_aligned():
    for scene, said in drawn(whereabouts=0.6):
        last = 0
        for word in said.words:
            assert said.text[word.start : word.end] == word.text and word.start >= last and word.kind in KINDS
            last = word.end
            objects = [scene.objects[k] for k in word.objects]
            if word.kind == "shape":
                assert {obj.shape for obj in objects} == {(NOUNS | PLURALS)[word.text]}
                assert len(objects) > 1 if word.text in PLURALS else len(objects) == 1
            elif word.kind in ("colour", "size", "material"):
                assert {getattr(obj, word.kind) for obj in objects} == {ADJECTIVES[word.text][1]}
            elif word.kind == "count":
                assert len(set(objects)) == NUMBERS[word.text]
            elif word.kind == "relation":
                assert len(objects) == 2 and stands(scene, word.text, *word.objects)
            elif word.kind == "whereabouts":
                assert placed(scene, {"front": "in front", "behind": "behind"}.get(word.text, f"on the {word.text}"), *word.objects)
            else:
                assert not objects
        content = [word.text for word in said.words]
        filler = {"a", "an", "and", "of", "to", "the", "in", "on", "at", "by"}
        assert [w for w in re.findall(r"[a-z]+", said.text) if w not in filler] == content


def test_length_and_vocabulary():
    words, known = set(), set(vocabulary())
    for scene, said in itertools.chain(drawn(), drawn(whereabouts=0.6)):
        for text in (said.text, describe(scene).text):
            tokens = re.findall(r"[a-z]+|,", text)
            assert " ".join(tokens).replace(" ,", ",") == text, "lower case, single spaces, commas only"
            assert len(tokens) <= MAX_WORDS
            words |= set(tokens)
    assert words <= known
    assert list(vocabulary()) == sorted(known) and {"no", "not", "with", "without"} <= known
    assert known - words <= {"no", "not", "with", "without", "object", "objects"}, "words that are never said"


def test_detail_and_commonest_form():
    lengths = {detail: np.mean([len(said.text.split()) for _, said in drawn(detail)]) for detail in ("terse", "medium", "full")}
    assert lengths["terse"] < lengths["medium"] - 2 < lengths["full"] - 4
    for _, said in drawn("bare"):
        kinds = {word.kind for word in said.words}
        assert "count" in kinds or not kinds & {"colour", "size", "material"}, said.text
    rng = np.random.default_rng(0)
    said = [caption(scene_from_seed(seed, counts=(1,)), rng).text for seed in range(400)]
    assert sum(bool(re.fullmatch(r"an? [a-z]+ [a-z]+", text)) for text in said) > 100, "'a red sphere' must be common"


@pytest.mark.parametrize("detail", [None, "bare", "terse"])
def test_complete_captions_name_every_object(detail):
    named = {complete: [({k for word in said.words for k in word.objects}, scene) for scene, said in drawn(detail, 0.3, complete)] for complete in (0.0, 1.0)}
    assert all(objects == set(range(len(scene.objects))) for objects, scene in named[1.0])
    assert any(objects != set(range(len(scene.objects))) for objects, scene in named[0.0])


def test_ordered_lists_go_from_left_to_right():
    def in_order(scene, said):
        """Of a list of single objects, whether each stands right of the one named before; None if it is none."""
        named = [word.objects for word in said.words if word.kind == "shape"]
        if any(len(objects) > 1 for objects in named) or any(word.kind == "relation" for word in said.words) or len(named) < 2:
            return None
        places = [scene.objects[k].x for (k,) in named]
        return places == sorted(places)

    found = {ordered: [told for scene, said in drawn("terse", 0.3, 1.0, ordered) if (told := in_order(scene, said)) is not None] for ordered in (0.0, 1.0)}
    assert len(found[1.0]) > 20 and all(found[1.0])
    assert 0.1 < np.mean(found[0.0]) < 0.7, "without it any order is as likely"


def test_same_seed_same_caption():
    scene = scene_from_seed(3, counts=(3,))
    assert caption(scene, np.random.default_rng(5)) == caption(scene, np.random.default_rng(5))
    rngs = [np.random.default_rng(6) for _ in range(2)]
    assert [caption(scene, rngs[0]) for _ in range(9)] == [caption(scene, rngs[1], whereabouts=0.0, complete=0.0, ordered=0.0) for _ in range(9)], "what is not asked for draws nothing"
    assert describe(scene) == describe(scene)


def test_relations_need_a_margin():
    cone, cube = Object("cone", "red", "small", "rubber", 0.0, 0.0), Object("cube", "blue", "small", "rubber", 0.3, 0.9)
    assert relations(Scene((cone, cube)), 0, 1) == ("front",) and relations(Scene((cone, cube)), 1, 0) == ("behind",)


def test_bad_input_is_explained():
    scene = scene_from_seed(0)
    with pytest.raises(LabkitError, match="bare, terse, medium, full"):
        caption(scene, np.random.default_rng(0), "long")
    with pytest.raises(LabkitError, match="add an object"):
        caption(Scene(()), np.random.default_rng(0))


def test_every_table_and_light_is_named():
    said = " ".join(text.text for _, text in drawn("full"))
    assert len(LIGHTS) == len(TABLES) == 3
    assert all(f" {words}" in said for words in MEANS if words not in ("photo", "picture", "pencil sketch", "sketch", "drawing"))
