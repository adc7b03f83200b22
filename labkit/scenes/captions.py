"""True sentences about a scene, from a small grammar, each word tied to the objects it speaks of.

    caption   -> [style "of"] subject [place] [light]
    subject   -> things ["and" | "," things]... | thing relation thing
    things    -> "a" thing [whereabouts] | count things-alike
    thing     -> [size] [colour] [material] shape, but "shiny" and "matte" go before the colour

Truth means: a count counts every object that fits the description; "a red sphere" is said of one object, chosen so
that at least that one fits; a relation holds with a clear margin between the very objects the words are tied to; "on the
left" of the table is said of objects clearly left of its middle, and only where whereabouts are asked for.
No caption is longer than MAX_WORDS tokens, where a comma is a token of its own.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from labkit.errors import LabkitError
from labkit.scenes.scene import COLOURS, LIGHTS, MATERIALS, SHAPES, SIZES, STYLES, TABLES, Object, Scene

MAX_WORDS = 28
DETAILS = ("bare", "terse", "medium", "full")
KINDS = ("shape", "colour", "size", "material", "count", "relation", "whereabouts", "table", "light", "style")

# The first of each is the plain word: `describe` uses it, and `caption` as often as all the others together.
SAY = {
    "sphere": ("sphere", "ball"),
    "cube": ("cube", "block", "box"),
    "cylinder": ("cylinder", "tube"),
    "cone": ("cone",),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
    "rubber": ("rubber", "matte"),
    "metal": ("metal", "shiny"),
    "plain": ("plain", "bare"),
    "checkered": ("checkered", "chessboard"),
    "wooden": ("wooden", "wood"),
}
ORDER = ("size", "shiny", "matte", "colour", "material", "shape")  # of words in English
PLURAL = {"box": "boxes"}
COUNT = {2: "two", 3: "three", 4: "four"}
# Phrases are (word, kind) pairs; words that carry no meaning of their own have no kind.
LIGHT = {
    "day": ((("in", ""), ("daylight", "light")), (("by", ""), ("day", "light"))),
    "sunset": ((("at", ""), ("sunset", "light")), (("at", ""), ("dusk", "light"))),
    "night": ((("at", ""), ("night", "light")), (("by", ""), ("night", "light"))),
}
STYLE = {
    "photo": ((("a", ""), ("photo", "style"), ("of", "")), (("a", ""), ("picture", "style"), ("of", ""))),
    "sketch": (
        (("a", ""), ("pencil", "style"), ("sketch", "style"), ("of", "")),
        (("a", ""), ("sketch", "style"), ("of", "")),
        (("a", ""), ("drawing", "style"), ("of", "")),
    ),
}
RELATION = {
    "left": (("left", "of"), ("to", "the", "left", "of")),
    "right": (("right", "of"), ("to", "the", "right", "of")),
    "front": (("in", "front", "of"),),
    "behind": (("behind",),),
}
WHEREABOUTS = {"left": ("on", "the", "left"), "right": ("on", "the", "right"), "front": ("in", "front"), "behind": ("behind",)}
OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
CARRIERS = ("left", "right", "front", "behind")  # the words of a relation that carry its meaning
PROMPT_WORDS = ("no", "not", "with", "without", "an", "the", "objects", "object")
SIDE_MARGIN, DEPTH_MARGIN = 0.5, 0.6  # how far apart objects are that a relation is said of, in table units
MIDDLE, OFF_MIDDLE = 0.1, 0.3  # y of the table's middle; how far from it an object is that has whereabouts


@dataclass(frozen=True)
class Word:
    """A content word: text[start:end] of the caption, its kind (one of KINDS), and the indices of its objects.

    For a relation the objects are (subject, reference): in "a cone behind a cube", the cone and then the cube.
    """

    text: str
    start: int
    end: int
    kind: str
    objects: tuple[int, ...] = ()


@dataclass(frozen=True)
class Caption:
    """A true sentence and its content words in order."""

    text: str
    words: tuple[Word, ...]


class _Line:
    """A sentence under construction: tokens with their kind and objects."""

    def __init__(self):
        self.tokens: list[tuple[str, str, tuple[int, ...]]] = []

    def say(self, text: str, kind: str = "", objects: Iterable[int] = ()) -> None:
        if self.tokens and self.tokens[-1][0] == "a" and text[0] in "aeiou":
            self.tokens[-1] = ("an", *self.tokens[-1][1:])
        self.tokens.append((text, kind, tuple(objects)))

    def finish(self) -> Caption:
        text, words = "", []
        for token, kind, objects in self.tokens:
            text += token if token == "," or not text else f" {token}"
            if kind:
                words.append(Word(token, len(text) - len(token), len(text), kind, objects))
        return Caption(text, tuple(words))


def caption(scene: Scene, rng: np.random.Generator, detail: str | None = None, whereabouts: float = 0.0, complete: float = 0.0, ordered: float = 0.0) -> Caption:
    """Draw a true caption: "terse" is the shape with one attribute or two, "full" names nearly everything; None draws one of "terse", "medium", "full".

    "bare" names things by their shapes alone, but for groups that are told apart by more.
    `whereabouts` is the chance that a list of objects also says where they stand: "a red sphere on the left and a cube behind".
    `complete` is the chance that no object is left out, as terse captions and relations of two among more otherwise do.
    `ordered` is the chance that a list names its objects from left to right, as `describe` does and people often do; otherwise they come as they come.
    """
    if detail is not None and detail not in DETAILS:
        raise LabkitError(f"detail {detail!r} is unknown; choose one of {', '.join(DETAILS)} or None")
    if not scene.objects:
        raise LabkitError("a scene without objects has no caption; add an object")
    detail = detail or ("terse", "medium", "full")[int(np.searchsorted((0.40, 0.75), rng.random()))]
    for attempt in range(20):
        line = _compose(scene, rng, detail if attempt < 10 else "terse", whereabouts, complete, ordered)
        if len(line.tokens) <= MAX_WORDS:
            return line.finish()
    raise AssertionError("a terse caption always fits")


def describe(scene: Scene) -> Caption:
    """The same caption every time: every object with its attributes, table and light as far as the limit allows."""
    order = sorted(range(len(scene.objects)), key=lambda k: (scene.objects[k].x, k))
    place, light = _place(scene.table, 0), LIGHT[scene.light][0]
    start = STYLE[scene.style][0] if scene.style != "photo" else ()
    for attributes in (("size", "material", "colour"), ("size", "colour"), ("colour",)):
        line = _Line()
        _say_all(line, start)
        for i, k in enumerate(order):
            if i:
                line.say("and" if i == len(order) - 1 else ",")
            line.say("a")
            _say_thing(line, scene.objects[k], attributes, (k,), None)
        _say_all(line, place + light)
        if len(line.tokens) <= MAX_WORDS:
            break
    return line.finish()


def vocabulary() -> tuple[str, ...]:
    """Every word the grammar can say, and a few more that prompts need, sorted."""
    words = {",", "a", "and", *PROMPT_WORDS, *COLOURS, *COUNT.values(), "on"}
    for forms in SAY.values():
        words.update(forms)
    for shape in SHAPES:
        words.update(_plural(form) for form in SAY[shape])
    for phrases in (*LIGHT.values(), *STYLE.values(), *(_places(table) for table in TABLES)):
        words.update(word for phrase in phrases for word, _ in phrase)
    for phrases in RELATION.values():
        words.update(word for phrase in phrases for word in phrase)
    return tuple(sorted(words))


def relations(scene: Scene, first: int, second: int) -> tuple[str, ...]:
    """Which of left, right, front, behind clearly hold of object `first` as seen from object `second`."""
    a, b = scene.objects[first], scene.objects[second]
    dx, dy = a.x - b.x, a.y - b.y
    found = []
    if abs(dx) >= SIDE_MARGIN and abs(dx) >= 0.8 * abs(dy):
        found.append("left" if dx < 0 else "right")
    if abs(dy) >= DEPTH_MARGIN and abs(dy) >= 0.8 * abs(dx):
        found.append("front" if dy < 0 else "behind")
    return tuple(found)


def stands(obj: Object) -> str | None:
    """Where an object clearly stands on the table: left, right, front or behind, by the longer way from the middle; None in the middle."""
    dx, dy = obj.x, obj.y - MIDDLE
    if max(abs(dx), abs(dy)) < OFF_MIDDLE:
        return None
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "front" if dy < 0 else "behind"


def twisted(said: Caption, scene: Scene, rng: np.random.Generator) -> str | None:
    """The caption with one thing turned round that makes it false, in the same words where they suffice; None where no twist surely would.

    A number becomes another, a relation or a place its opposite, or two objects exchange their colours, materials or sizes.
    """
    def turned(word: Word) -> str:
        opposite = OPPOSITE[word.text]
        before, after = said.text[: word.start], said.text[word.end :]
        if word.text == "front":
            before, after = before.removesuffix("in "), after.removeprefix(" of")
        elif word.text == "behind":
            opposite = "in front of" if word.kind == "relation" else "in front"
        return before + opposite + after

    def exchanged(a: Word, b: Word) -> str:
        return said.text[: a.start] + b.text + said.text[a.end : b.start] + a.text + said.text[b.end :]

    numbers = [w for w in said.words if w.kind == "count"]
    found = [said.text[: w.start] + other + said.text[w.end :] for w in numbers for other in COUNT.values() if other != w.text]
    single = [w for w in said.words if w.kind in ("colour", "material", "size") and len(w.objects) == 1]
    for word in said.words:
        like = [[obj for obj in scene.objects if obj.shape == scene.objects[k].shape] for k in word.objects]
        if word.kind == "relation":
            if not any(a is not b and _beyond(b, a, word.text) for a in like[0] for b in like[1]):
                found += [turned(word)] * 2
        elif word.kind == "whereabouts":
            middle = replace(scene.objects[0], x=0.0, y=MIDDLE)
            if not any(_beyond(middle, obj, word.text) for obj in like[0]):
                found += [turned(word)] * 2
    for i, a in enumerate(single):
        for b in single[i + 1 :]:
            (one,), (other,) = a.objects, b.objects
            if a.kind == b.kind and one != other and not any(
                obj.shape == scene.objects[k].shape and getattr(obj, a.kind) == getattr(scene.objects[m], a.kind)
                for k, m in ((one, other), (other, one)) for obj in scene.objects
            ):
                found.append(exchanged(a, b))
    if not found:
        return None
    articles = {True: "an ", False: "a "}
    return re.sub(r"\ban? (?=(\w))", lambda match: articles[match[1] in "aeiou"], found[int(rng.integers(len(found)))])


def _beyond(a: Object, b: Object, word: str) -> bool:
    """Whether a stands to this side of b at all, by however little."""
    return {"left": a.x < b.x, "right": a.x > b.x, "front": a.y < b.y, "behind": a.y > b.y}[word]


def _compose(scene: Scene, rng, detail: str, whereabouts: float, complete: float, ordered: float) -> _Line:
    """One sentence, whatever its length."""
    line, count = _Line(), len(scene.objects)
    whole = complete > 0 and rng.random() < complete
    odds = {"bare": (0.05, 0.12), "terse": (0.10, 0.12), "medium": (0.30, 0.50), "full": (0.45, 0.90)}[detail]  # of saying style, surroundings
    if rng.random() < (max(odds[0], 0.85) if scene.style == "sketch" else odds[0]):
        _say_all(line, _pick(rng, STYLE[scene.style]))

    pairs = [(i, j) for i in range(count) for j in range(count) if i != j and relations(scene, i, j) and not (whole and count > 2)]
    alike = _groups(scene, rng, whole)
    form = rng.random()
    if alike and form < 0.45:
        _say_groups(line, scene, rng, detail, whole, *alike)
    elif pairs and form < (0.75 if alike else 0.50):
        first, second = pairs[int(rng.integers(len(pairs)))]
        held = relations(scene, first, second)
        _say_object(line, scene, first, rng, detail)
        for word in _pick(rng, RELATION[held[int(rng.integers(len(held)))]]):
            line.say(word, "relation" if word in CARRIERS else "", (first, second) if word in CARRIERS else ())
        _say_object(line, scene, second, rng, detail)
    else:
        # A terse or bare caption may leave objects out; the others name all there are.
        share = int(rng.integers(1, count + 1)) if detail in ("bare", "terse") and not whole else count
        chosen = [int(k) for k in rng.permutation(count)[:share]]
        if ordered > 0 and rng.random() < ordered:
            chosen.sort(key=lambda k: scene.objects[k].x)
        located = whereabouts > 0 and rng.random() < whereabouts
        for i, k in enumerate(chosen):
            if i:
                line.say("and" if i == len(chosen) - 1 else ",")
            _say_object(line, scene, k, rng, "medium" if detail == "full" and count > 2 else detail)
            if located and (place := stands(scene.objects[k])):
                for word in WHEREABOUTS[place]:
                    line.say(word, "whereabouts" if word in CARRIERS else "", (k,) if word in CARRIERS else ())

    if rng.random() < odds[1]:
        _say_all(line, _places(scene.table)[_favour_first(rng, len(_places(scene.table)))])
    if rng.random() < odds[1]:
        _say_all(line, _pick(rng, LIGHT[scene.light]))
    return line


def _say_all(line: _Line, phrase: tuple) -> None:
    for word, kind in phrase:
        line.say(word, kind)


def _places(table: str) -> tuple:
    """The ways to say where: "on a wooden table", and for the checkered one also "on a chessboard"."""
    plain = tuple(
        (("on", ""), ("a", ""), (word, "table"), ("table", "table")) for word in SAY[table] if word != "chessboard"
    )
    return plain + (((("on", ""), ("a", ""), ("chessboard", "table")),) if table == "checkered" else ())


def _place(table: str, which: int) -> tuple:
    return _places(table)[which]


def _favour_first(rng, count: int) -> int:
    """An index below `count`; the first is drawn as often as all others together."""
    return 0 if count == 1 or rng.random() < 0.5 else int(rng.integers(1, count))


def _pick(rng, forms: tuple):
    return forms[_favour_first(rng, len(forms))]


def _attributes(rng, detail: str) -> tuple[str, ...]:
    """Which attributes to name, in the order of speech."""
    chance = {"bare": (0.0, 0.0, 0.0), "terse": (0.08, 0.06, 0.90), "medium": (0.45, 0.35, 0.92), "full": (0.92, 0.85, 0.97)}[detail]
    return tuple(name for name, p in zip(("size", "material", "colour"), chance) if rng.random() < p)


def _say_object(line: _Line, scene: Scene, k: int, rng, detail: str) -> None:
    line.say("a")
    _say_thing(line, scene.objects[k], _attributes(rng, detail), (k,), rng)


def _say_thing(line: _Line, obj: Object, attributes: tuple[str, ...], indices: tuple, rng, plural: bool = False) -> None:
    """Attributes and shape; without a generator in the plain words."""
    said = []
    for name in (*attributes, "shape"):
        value = getattr(obj, name)
        forms = SAY.get(value, (value,))
        word = forms[0] if rng is None else _pick(rng, forms)
        said.append((_plural(word) if plural and name == "shape" else word, name))
    said.sort(key=lambda pair: ORDER.index(pair[0] if pair[0] in ORDER else pair[1]))
    for word, name in said:
        line.say(word, name, indices)


def _plural(word: str) -> str:
    return PLURAL.get(word, word + "s")


def _groups(scene: Scene, rng, whole: bool) -> tuple | None:
    """(attribute names, indices) of objects that share shape and these attributes, two or more; None if there are none.

    `whole`: only groups beside which all the others can be named.
    """
    found = []
    for names in ((), ("colour",), ("size",), ("material",), ("size", "colour"), ("material", "colour")):
        keys: dict[tuple, list[int]] = {}
        for k, obj in enumerate(scene.objects):
            keys.setdefault((obj.shape, *(getattr(obj, name) for name in names)), []).append(k)
        # "two red spheres" is the commonest form where it is true, so it is entered twice.
        found += [(names, tuple(group)) for group in keys.values() if len(group) > 1] * (2 if names == ("colour",) else 1)
    if whole:
        found = [(names, group) for names, group in found if _rest(scene, group) is not None]
    return found[int(rng.integers(len(found)))] if found else None


def _rest(scene: Scene, group: tuple[int, ...]) -> list[int] | None:
    """The objects outside a group; None where one has its shape, since "two spheres and a sphere" would sound like three alike."""
    rest = [k for k in range(len(scene.objects)) if k not in group]
    return None if any(scene.objects[k].shape == scene.objects[group[0]].shape for k in rest) else rest


def _say_groups(line: _Line, scene: Scene, rng, detail: str, whole: bool, names: tuple[str, ...], group: tuple[int, ...]) -> None:
    """"two red spheres", and beyond terse also the rest: "two red spheres and a blue cube"."""
    line.say(COUNT[len(group)], "count", group)
    _say_thing(line, scene.objects[group[0]], names, group, rng, plural=True)
    if len(group) < len(scene.objects) and (whole or detail not in ("bare", "terse") or rng.random() < 0.3):
        rest = _rest(scene, group) or ()
        for i, k in enumerate(rest):
            line.say("and" if i == len(rest) - 1 else ",")
            _say_object(line, scene, k, rng, "medium" if detail == "full" else detail)


assert set(SAY) == {*SHAPES, *SIZES, *MATERIALS, *TABLES} and set(LIGHT) == set(LIGHTS) and set(STYLE) == set(STYLES)
