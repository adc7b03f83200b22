"""The judge: readings made by hand, held to what a prompt wants; each rule fails on its wrong twin."""

import pytest
import torch

from labkit.errors import LabkitError
from labkit.scenes.judge import Wants, alone, holds, right
from labkit.scenes.verify import Read, Seen


def seen(colour="red", shape="cube", x=0.0, y=0.0, material="rubber", size="large"):
    return Seen(shape, colour, material, size, 1.0, torch.zeros(1, 1, dtype=torch.bool), (0, 0, 1, 1), x, y)


def reading(*objects, light="day", style="photo", table="plain"):
    return Read(tuple(objects), light, style, table)


CUBE, BALL = {"shape": "cube", "colour": "red"}, {"shape": "sphere", "colour": "blue"}


def test_a_thing_must_fit_in_every_attribute():
    wants = Wants(things=(CUBE,))
    assert right(reading(seen()), wants)
    assert not right(reading(seen(colour="blue")), wants) and not right(reading(seen(shape="cone")), wants) and not right(reading(), wants)
    assert not right(reading(seen(material="metal")), Wants(things=(CUBE | {"material": "rubber"},)))


def test_colours_stay_with_their_shapes():
    """Attribute binding: a blue cube and a red ball are not a red cube and a blue ball."""
    wants = Wants(things=(CUBE, BALL))
    assert right(reading(seen("blue", "sphere"), seen()), wants), "in any order"
    assert not right(reading(seen("blue", "cube"), seen("red", "sphere")), wants)


def test_two_things_are_two_objects():
    wants = Wants(things=({"shape": "cube"}, {"colour": "red"}))
    assert not right(reading(seen()), wants), "one red cube is not a cube and something red"
    assert right(reading(seen(), seen()), wants)


def test_a_count_is_exact_and_counts_what_fits():
    wants = Wants(counts=((CUBE, 2),))
    assert right(reading(seen(), seen(x=1)), wants)
    assert not right(reading(seen()), wants) and not right(reading(seen(), seen(x=1), seen(x=2)), wants)
    assert right(reading(seen(), seen(x=1), seen("blue", x=2)), wants), "a blue cube is no third red one"


def test_others_do_not_count_against_a_picture_but_alone_says_so():
    wants = Wants(things=(CUBE,))
    both = reading(seen(), seen("green", "cone", x=1))
    assert right(both, wants) and not alone(both, wants)
    assert alone(reading(seen()), wants) and not alone(reading(seen("blue")), wants)
    assert alone(reading(seen(), seen(x=1)), Wants(counts=((CUBE, 2),)))


@pytest.mark.parametrize("relation, x, y", [("left", -1, 0), ("right", 1, 0), ("front", 0, -1), ("behind", 0, 1)])
def test_relations_are_the_table_s_and_not_symmetric(relation, x, y):
    one, other = seen(x=x, y=y), seen("blue", "sphere")
    assert holds(relation, one, other) and not holds(relation, other, one)
    for wrong in {"left", "right", "front", "behind"} - {relation}:
        assert not holds(wrong, one, other)
    wants = Wants(things=(CUBE, BALL), relation=relation)
    assert right(reading(one, other), wants)
    assert not right(reading(seen(x=-x, y=-y), other), wants)


def test_a_relation_needs_a_margin():
    assert not holds("left", seen(x=-0.2), seen())
    assert not holds("left", seen(x=-0.5, y=1.5), seen()) and holds("behind", seen(x=-0.5, y=1.5), seen())


def test_any_pair_may_carry_the_relation():
    wants = Wants(things=(CUBE, BALL), relation="left")
    assert right(reading(seen(x=1.5), seen(x=-1), seen("blue", "sphere")), wants), "one of two red cubes is left of it"


def test_what_is_unwanted_and_what_the_picture_is():
    assert not right(reading(seen(), seen("blue", "cone")), Wants(things=(CUBE,), none=({"shape": "cone"},)))
    assert right(reading(seen(), light="night"), Wants(things=(CUBE,), picture=(("light", "night"),)))
    assert not right(reading(seen(), light="day"), Wants(things=(CUBE,), picture=(("light", "night"),)))
    assert not right(reading(seen(), style="sketch"), Wants(things=(CUBE,), not_picture=(("style", "sketch"),)))


@pytest.mark.parametrize("wants", [
    {"things": ({"shape": "pyramid"},)}, {"things": ({"weight": "cube"},)}, {"picture": (("light", "noon"),)}, {"counts": (({"colour": "mauve"}, 2),)},
    {"things": ({"shape": "cube"},), "relation": "left"}, {"things": ({}, {}), "relation": "above"},
])  # fmt: skip
def test_what_cannot_be_judged_is_refused(wants):
    with pytest.raises(LabkitError, match="cannot be judged") as error:
        Wants(**wants)
    assert "\n" not in str(error.value)
