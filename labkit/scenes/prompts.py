"""The prompts of TabletopEval: a fixed list, each with what a picture of it must show.

GenEval's six categories (Ghosh et al. 2023, arXiv:2310.11513), in this world's words: single object, two objects, counting, colour, position,
attribute binding; beyond them material, size, light, style, negation, and the combinations that training left out. All that a prompt says
is asked of the picture, but for the surroundings that are there for variety. The list is kept in data/prompts.json and read from there, so that it is the
same whatever becomes of this file; a test holds the two together.

Captions never negate ("no", "without" are in the vocabulary and in no caption), so negation is asked for by the negative prompt: "a red cube" and, to
keep away from, "a metal cube" wants rubber. What the prompt alone would give is reported beside it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from labkit.errors import LabkitError
from labkit.scenes.captions import COUNT, LIGHT, RELATION, SAY, STYLE, caption
from labkit.scenes.judge import Wants
from labkit.scenes.scene import COLOURS, LIGHTS, MATERIALS, SHAPES, SIZES, STYLES, TABLES, scene_from_seed

FILE = Path(__file__).parents[2] / "data" / "prompts.json"
EACH, CAPTIONS = 100, 500  # prompts a category; captions of scenes, for the distances
CAPTION_SEED = 20_000_000  # scenes that are neither trained nor tested on
NOUNS = [(word, shape) for shape in SHAPES for word in SAY[shape]]
PAIRS = [(colour, shape) for shape in SHAPES for colour in COLOURS if (colour, shape) != ("purple", "cone")]
TABLE = {table: f"on a {SAY[table][0]} table" for table in TABLES}
TIME = {light: " ".join(word for word, _ in LIGHT[light][0]) for light in LIGHTS}
AROUND = ["", *TABLE.values(), *TIME.values(), *(f"{place} {time}" for place, time in product(TABLE.values(), TIME.values()))]


@dataclass(frozen=True)
class Prompt:
    """A sentence, what to keep away from, and what a picture must show; `scene` is the seed of the scene that a caption is of."""

    category: str
    text: str
    wants: Wants = Wants()
    negative: str = ""
    scene: int | None = None


def load_prompts(path: str | Path = FILE) -> list[Prompt]:
    """The list in the file, in its order. Raises LabkitError if it cannot be read."""
    try:
        return [Prompt(**{**row, "wants": _wants(row["wants"])}) for row in json.loads(Path(path).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LabkitError(f"{path} is no list of prompts ({error}); fetch it again (git checkout)") from None


def _wants(row: dict) -> Wants:
    pairs = {name: tuple(tuple(pair) for pair in row[name]) for name in ("counts", "picture", "not_picture") if name in row}
    return Wants(**row | pairs | {name: tuple(row[name]) for name in ("things", "none") if name in row})


def write_prompts(path: str | Path = FILE) -> None:
    """Write the list anew, a prompt a line."""
    rows = []
    for prompt in compose():
        row = {key: value for key, value in asdict(prompt).items() if value not in ("", None)}
        rows.append(json.dumps(row | {"wants": {key: value for key, value in row["wants"].items() if value}}))
    Path(path).write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


def compose() -> list[Prompt]:
    """The list: EACH different prompts a category, drawn from all that its form allows, then the captions."""
    rng, found = np.random.default_rng(0), []
    for category, form in CATEGORIES.items():
        parts = [list(part) for part in form()]  # each part gets an equal share
        for k, part in enumerate(parts):
            share = EACH // len(parts) + (k < EACH % len(parts))
            different = list({(text, negative): (text, wants, negative) for text, wants, negative in part}.values())
            chosen = sorted(rng.permutation(len(different))[:share].tolist())
            found += [Prompt(category, _an(text), wants, _an(negative)) for text, wants, negative in (different[i] for i in chosen)]
    for seed in range(CAPTION_SEED, CAPTION_SEED + CAPTIONS):
        scene = scene_from_seed(seed, styles=("photo",) * 4 + ("sketch",))
        found.append(Prompt("captions", caption(scene, np.random.default_rng(seed)).text, scene=seed))
    return found


# --- the forms: each yields parts, a part yields (text, wants, negative prompt) --------------------------------------


def _single() -> Iterator:
    yield ((f"a {noun} {around}", Wants(({"shape": shape},)), "") for noun, shape in NOUNS for around in AROUND)


def _two() -> Iterator:
    for first in SHAPES:
        yield ((f"a {a} and a {b} {around}", Wants(({"shape": first}, {"shape": second})), "")
               for (a, one), (b, second) in product(NOUNS, NOUNS) if one == first != second for around in AROUND[:7])


def _counting() -> Iterator:
    for number, word in COUNT.items():
        kinds = [("", noun, {"shape": shape}) for noun, shape in NOUNS]
        kinds += [(colour, noun, {"shape": shape, "colour": colour}) for noun, shape in NOUNS for colour, own in PAIRS if own == shape and colour != "cyan"]
        yield ((f"{word} {colour} {'boxes' if noun == 'box' else noun + 's'}", Wants(counts=((thing, number),)), "") for colour, noun, thing in kinds)


def _colour() -> Iterator:
    for colour in COLOURS:
        yield ((f"a {colour} {noun} {around}", Wants(({"shape": shape, "colour": colour},)), "")
               for noun, shape in NOUNS if (colour, shape) in PAIRS for around in AROUND)


def _position() -> Iterator:
    for relation, ways in RELATION.items():
        for coloured in (False, True):
            yield ((f"a {a} {' '.join(way)} a {b}", Wants((one, other), relation=relation), "")
                   for (a, one), (b, other) in _things(coloured) for way in ways)


def _things(coloured: bool) -> Iterator:
    """Two things of different shapes, in the plain words, with colours or without: ((words, thing), (words, thing))."""
    kinds = PAIRS if coloured else [("", shape) for shape in SHAPES]
    for (c, s), (d, t) in product(kinds, kinds):
        if s != t and (c != d or not coloured):
            yield tuple((f"{colour} {shape}".strip(), {"shape": shape} | ({"colour": colour} if coloured else {})) for colour, shape in ((c, s), (d, t)))


def _binding() -> Iterator:
    for colour in COLOURS:
        yield ((f"a {a} and a {b}", Wants((one, other)), "") for (a, one), (b, other) in _things(True) if one["colour"] == colour)


def _attribute(name: str, values: tuple[str, ...]) -> Iterator:
    for value in values:
        part = []
        for word, (colour, shape) in product(SAY[value], PAIRS):
            said = f"{colour} {word}" if word in ("rubber", "metal") else f"{word} {colour}"  # the order of words in English
            part.append((f"a {said} {shape}", Wants(({"shape": shape, "colour": colour, name: value},)), ""))
        yield part


def _light() -> Iterator:
    for light in LIGHTS:
        ways = [" ".join(word for word, _ in way) for way in LIGHT[light]]
        yield ((f"a {colour} {shape} {way}", Wants(({"shape": shape, "colour": colour},), picture=(("light", light),)), "")
               for (colour, shape), way in product(PAIRS, ways))


def _style() -> Iterator:
    for style in STYLES:
        ways = [" ".join(word for word, _ in way) for way in STYLE[style]]
        yield ((f"{way} a {colour} {shape}", Wants(({"shape": shape, "colour": colour},), picture=(("style", style),)), "")
               for (colour, shape), way in product(PAIRS, ways))


def _negation() -> Iterator:
    things = {pair: {"shape": pair[1], "colour": pair[0]} for pair in PAIRS}
    yield ((f"a {colour} {shape}", Wants((things[colour, shape],), none=({"shape": other},)), f"a {other}")
           for colour, shape in PAIRS for other in SHAPES if other != shape)
    yield ((f"a {shape}", Wants(({"shape": shape},), none=({"colour": colour},)), f"a {colour} {shape}") for colour, shape in PAIRS)
    for name, values in (("material", MATERIALS), ("size", SIZES)):
        yield ((f"a {colour} {shape}", Wants((things[colour, shape] | {name: values[1 - i]},)), f"a {value} {shape}")
               for colour, shape in PAIRS for i, value in enumerate(values))
    yield ((f"a {colour} {shape}", Wants((things[colour, shape],), not_picture=(("light", light),)), f"a {shape} {TIME[light]}")
           for colour, shape in PAIRS for light in LIGHTS)


def _held_out() -> Iterator:
    cone = {"shape": "cone", "colour": "purple"}
    cones = ("purple cone", "small purple cone", "large purple cone", "purple metal cone")
    yield [(f"a {how} {around}", Wants((cone,)), "") for how in cones for around in AROUND]
    two = [(f"two cyan {'boxes' if noun == 'box' else noun + 's'} {around}", Wants(counts=(({"shape": shape, "colour": "cyan"}, 2),)), "")
           for noun, shape in NOUNS for around in AROUND[:4]]
    mixed = [(f"a cyan {a} and a cyan {b}", Wants(({"shape": s, "colour": "cyan"}, {"shape": t, "colour": "cyan"})), "")
             for (a, s), (b, t) in product(NOUNS, NOUNS) if s != t]
    yield two + mixed[::2]


CATEGORIES = {
    "single object": _single, "two objects": _two, "counting": _counting, "colour": _colour, "position": _position, "attribute binding": _binding,
    "material": lambda: _attribute("material", MATERIALS), "size": lambda: _attribute("size", SIZES), "light": _light, "style": _style,
    "negation": _negation, "held-out": _held_out,
}  # fmt: skip


def _an(text: str) -> str:
    """One space between words, and "an" where a vowel follows."""
    words = text.split()
    return " ".join("an" if word == "a" and after[:1] in set("aeiou") else word for word, after in zip(words, [*words[1:], ""]))
