"""What is learnt when: lessons, and a course of them (a curriculum, Bengio et al. 2009).

    lesson     which pictures, which words a caption must have, from which timesteps
    course     the share that each lesson has of a batch, as training goes on

What one word says of a picture is learnt from its gradient, and that drowns in the noise of all the other examples: a signal in a share p of the batch takes some
1 / p^2 as many steps. Measured on tabletop: in a mixed training one caption in ten said on which side a single object stands, and after 70,000 samples turning it round
cost nothing; after 10,000 of little else it raised the error of x0 at t = 900 by an eighth, in the end by a third. So what is rare is learnt first, by itself, and kept by what of
it is in the mixture.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from labkit.errors import LabkitError
from labkit.scenes.captions import KINDS, caption
from labkit.scenes.scene import Scene

TRIES = 8  # captions drawn until one has a word that the lesson is about


@dataclass(frozen=True)
class Lesson:
    """Pictures, words and timesteps that belong together."""

    says: tuple[str, ...] = ()  # kinds of words (scenes/captions.py), one of which a caption has if one of some draws does; (): any caption
    objects: tuple[int, ...] = (1, 2, 3, 4)  # how many the pictures show
    alike: bool | None = None  # True: all of one shape and colour; False: not so; None: either
    t: tuple[float, float] = (0.0, 1.0)  # of the schedule, from the clean end
    details: tuple[str | None, ...] = (None,)  # each as often; None is any but "bare"
    whereabouts: float = 0.0  # chances, as in `caption`
    complete: float = 0.0
    ordered: float = 0.0

    def __post_init__(self) -> None:
        if not set(self.says) <= set(KINDS) or not 0 <= self.t[0] < self.t[1] <= 1:
            raise LabkitError(f"{self}: says names kinds of words ({', '.join(KINDS)}) and t is a part of 0 to 1, such as (0.5, 1.0)")

    def shows(self, scene: Scene) -> bool:
        """Whether a picture of this scene belongs here."""
        alike = len({(obj.shape, obj.colour) for obj in scene.objects}) == 1
        return len(scene.objects) in self.objects and self.alike in (None, alike)

    def caption(self, scene: Scene, rng: np.random.Generator) -> str:
        """A true caption of it, worded as the lesson has it."""
        for _ in range(TRIES if self.says else 1):
            said = caption(scene, rng, self.details[int(rng.integers(len(self.details)))], self.whereabouts, self.complete, self.ordered)
            if any(word.kind in self.says for word in said.words):
                break
        return said.text


PLAIN = ("terse", "terse", "bare", "medium")
LESSONS = {
    "all": Lesson(whereabouts=0.3, complete=0.7, ordered=0.9),
    "early": Lesson(whereabouts=0.3, complete=0.7, ordered=0.9, t=(0.5, 0.95)),  # layout is decided there; choosing where to look is Esser et al. 2024, section 3.1
    "fine": Lesson(whereabouts=0.3, complete=0.7, ordered=0.9, t=(0.0, 0.45)),  # edges; without it these timesteps had a tenth of the sixth run's batches
    "place": Lesson(("whereabouts",), (1,), t=(0.5, 1.0), details=PLAIN, whereabouts=1.0),
    "places": Lesson(("whereabouts", "relation"), (2,), alike=False, t=(0.5, 1.0), details=("terse",), whereabouts=1.0, complete=1.0),
    "relation": Lesson(("relation",), (2,), alike=False, t=(0.4, 1.0), details=PLAIN, complete=1.0),
    "number": Lesson(("count",), (2, 3, 4), alike=True, t=(0.4, 0.85), details=PLAIN, complete=1.0),  # real pictures of three, noised to t = 500 and less, come back as three
    "two": Lesson((), (2,), alike=False, t=(0.3, 0.9), details=("bare", "terse"), complete=1.0, ordered=0.9),
    "material": Lesson(("material",), (1,), t=(0.3, 0.75), details=("terse", "medium", "medium", "full"), complete=1.0),
}


@dataclass(frozen=True)
class Course:
    """Shares of the lessons by name, from that part of the training on: ((0.0, {"place": 1.0}), (0.3, {"all": 0.8, "place": 0.2})).

    A lesson that none of the pictures belongs to is left out.
    """

    plan: tuple[tuple[float, dict[str, float]], ...]

    def __post_init__(self) -> None:
        begins = [begin for begin, _ in self.plan]
        if not begins or begins[0] != 0 or begins != sorted(begins) or any(name not in LESSONS for _, shares in self.plan for name in shares):
            raise LabkitError(f"{self.plan}: a course begins at 0, goes on in order, and its lessons are of {', '.join(LESSONS)}")

    def shares(self, done: float) -> dict[str, float]:
        """Those of the part of training that is on when so much of it is done."""
        return [shares for begin, shares in self.plan if begin <= done][-1]


class Timetable:
    """A course, held with pictures of these scenes, over a training of so many steps, on a schedule of T timesteps."""

    def __init__(self, course: Course, scenes: list[Scene], steps: int, T: int) -> None:
        self.course, self.scenes, self.steps, self.T = course, scenes, steps, T
        named = {name for _, shares in course.plan for name in shares}
        self.pictures = {name: [i for i, scene in enumerate(scenes) if LESSONS[name].shows(scene)] for name in sorted(named)}

    def choose(self, step: int, g: torch.Generator, n: int) -> tuple[list[Lesson], Tensor, Tensor]:
        """Lessons, pictures (n,) and timesteps (n,) of a batch."""
        shares = {name: share for name, share in self.course.shares(step / self.steps).items() if self.pictures[name]}
        if not shares:
            raise LabkitError(f"step {step}: none of {len(self.scenes)} pictures belongs to {', '.join(self.course.shares(step / self.steps))}; train on another world")
        which = torch.multinomial(torch.tensor(list(shares.values())), n, replacement=True, generator=g).tolist()
        names, u, v = [list(shares)[k] for k in which], *torch.rand(2, n, generator=g, dtype=torch.float64)
        everyone = torch.tensor([self.pictures[name][int(x * len(self.pictures[name]))] for name, x in zip(names, u.tolist())])
        lessons = [LESSONS[name] for name in names]
        low, high = torch.tensor([lesson.t for lesson in lessons], dtype=torch.float64).T * self.T
        return lessons, everyone, (low + v * (high - low)).long()
