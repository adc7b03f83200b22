"""Runs that are told something else than their prompt: other text states, at chosen steps, from other noise.

    eps_c = unet(x_t, t, c_i),    c_i = c_at(i) in place of c          i the step, 0 the noisiest

What follows from it is what the room's other files measure: when a picture is decided, what lies between two prompts, what a
half-read text says.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from labkit.device import Noise
from labkit.diffusion import Course, LatentDiffusion
from labkit.errors import LabkitError
from labkit.generation import to_pil
from labkit.models.condition import Condition
from labkit.recipe import complete

Text = Tensor | Condition


def condition(lab: LatentDiffusion, prompt: str, **options) -> Text:
    """What a run with these options is told of a prompt, one row: (1, L, D), for SDXL with the sizes of its picture. Raises LabkitError."""
    return lab.conditions(complete(lab, prompt, **options))[0]


def telling(lab: LatentDiffusion, c_at: Callable[[int], Text], z: Tensor | None = None) -> Callable[[Noise], Course]:
    """A course in which the branch "cond" is told `c_at(i)`, (B, L, D) or SDXL's Condition, at step i; it starts from z (B, 4, h, w) or from its noise."""

    def said(c: Text) -> Text:
        layout = lab.layout
        if "cond" not in layout.branches:
            return c
        first = layout.branches.index("cond") * layout.images
        return by_row(lambda old, new: torch.cat([old[:first], new.to(old), old[first + layout.images :]]), c, c_at(layout.i))

    return lambda noise: Course(noise.draw() if z is None else z, said=said)


def drawn(lab: LatentDiffusion, prompts: list[str], course: Callable[[Noise], Course], **options) -> tuple[list, Tensor]:
    """The PIL pictures and the latents (B, 4, h, w) of a run with a course; `options` as in `lab.generate`. Raises LabkitError."""
    for step in lab.steps(**complete(lab, prompts, **options).plain(), course=course):
        pass
    return to_pil(lab.decode(step.x)), step.x


def by_row(f: Callable[..., Tensor], *texts: Text) -> Text:
    """A function of tensors, applied to conditions of either kind: to states, or to states, pooled text and sizes."""
    if isinstance(texts[0], Condition):
        return Condition(*(f(*(getattr(c, name) for c in texts)) for name in ("states", "pooled", "sizes")))
    return f(*texts)


def seeds_of(seeds: int | list[int]) -> list[int]:
    """Seeds as a list; LabkitError if there is none."""
    found = [seeds] if isinstance(seeds, int) else list(seeds)
    if not found:
        raise LabkitError("There are no seeds: give one integer, or several.")
    return found
