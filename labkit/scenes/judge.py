"""Whether a picture, as read, is what its prompt asks for.

    right(read, wants) = there are different objects o_1 .. o_n of the read, o_i fitting the i-th thing wanted, in the relation wanted,
                         as many of each kind as counted, none of what is unwanted, and light, style and table as said

The rules are GenEval's (Ghosh et al. 2023, arXiv:2310.11513): what is asked for must be there, and where a number is said no more of it; other
objects beside it do not count against a picture, except for `alone`, which is reported apart. As in the captions (scenes/captions.py) a count counts
every object that fits the description, and relations are those of places on the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from labkit.errors import LabkitError
from labkit.scenes.captions import RELATION
from labkit.scenes.reader import OBJECT, PICTURE
from labkit.scenes.verify import Read, Seen

APART, SLANT = 0.3, 0.6  # table units, and how far a direction may lean; captions say a relation from 0.5 and 0.8 on, and reading errs by some 0.05


@dataclass(frozen=True)
class Wants:
    """What a picture must show. A thing is a dict of attributes, such as {"shape": "cube", "colour": "red"}; an empty one is any object."""

    things: tuple[dict[str, str], ...] = ()  # one different object for each
    counts: tuple[tuple[dict[str, str], int], ...] = ()  # exactly so many objects fit
    relation: str | None = None  # of the first thing as seen from the second: left, right, front or behind
    none: tuple[dict[str, str], ...] = ()  # no object fits
    picture: tuple[tuple[str, str], ...] = ()  # (light, style or table; its value)
    not_picture: tuple[tuple[str, str], ...] = ()  # what light, style or table must not be

    def __post_init__(self) -> None:
        for thing in (*self.things, *self.none, *(thing for thing, _ in self.counts)):
            for name, value in thing.items():
                _known(name, value, OBJECT)
        for name, value in (*self.picture, *self.not_picture):
            _known(name, value, PICTURE)
        if self.relation is not None and (self.relation not in RELATION or len(self.things) != 2):
            raise LabkitError(f"the relation {self.relation!r} of {len(self.things)} things cannot be judged; give two things and one of {', '.join(RELATION)}")

    @property
    def number(self) -> int:
        """How many objects the prompt names."""
        return len(self.things) + sum(count for _, count in self.counts)


def _known(name: str, value: str, choices: dict) -> None:
    if value not in choices.get(name, ()):
        known = "; ".join(f"{key} {', '.join(values)}" for key, values in choices.items())
        raise LabkitError(f"{name} {value!r} cannot be judged; what can be is {known}")


def right(read: Read, wants: Wants) -> bool:
    """Whether the picture shows what is wanted, whatever else it shows."""
    if any(getattr(read, name) != value for name, value in wants.picture) or any(getattr(read, name) == value for name, value in wants.not_picture):
        return False
    if any(fits(seen, thing) for thing in wants.none for seen in read.objects):
        return False
    if any(sum(fits(seen, thing) for seen in read.objects) != count for thing, count in wants.counts):
        return False
    return any(_in_place(chosen, wants) for chosen in permutations(read.objects, len(wants.things)))


def alone(read: Read, wants: Wants) -> bool:
    """Whether the picture shows what is wanted and nothing beside it."""
    return right(read, wants) and len(read.objects) == wants.number


def _in_place(chosen: Sequence[Seen], wants: Wants) -> bool:
    if not all(fits(seen, thing) for seen, thing in zip(chosen, wants.things)):
        return False
    return wants.relation is None or holds(wants.relation, *chosen)


def fits(seen: Seen, thing: dict[str, str]) -> bool:
    """Whether an object has all the attributes of a thing."""
    return all(getattr(seen, name) == value for name, value in thing.items())


def holds(relation: str, one: Seen, other: Seen) -> bool:
    """Whether `one` is left of, right of, in front of or behind `other` on the table."""
    dx, dy = one.x - other.x, one.y - other.y
    along, across = {"left": (-dx, dy), "right": (dx, dy), "front": (-dy, dx), "behind": (dy, dx)}[relation]
    return along >= APART and along >= SLANT * abs(across)
