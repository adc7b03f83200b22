"""The way from noise to picture: what the network was given at a step, and what it took the picture to be.

    x_t = sqrt(alpha_bar_t) x0_hat + sqrt(1 - alpha_bar_t) eps            what the step began with, from what it predicted
    decode(x_t), decode(x0_hat)                                           both as pictures

The first row of such a figure says what the sampler has, the second what it expects; Ho, Jain & Abbeel 2020 show the
second as "progressive generation" (figure 6). The VAE has never seen noise: a decoded x_t is a translation, not a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from labkit.diffusion import LatentDiffusion
from labkit.generation import to_pil
from labkit.errors import LabkitError
from labkit.samplers import Step
from labkit.schedule import q_sample


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Decoded latents at chosen steps, noisiest first: `x_t` and `x0` are PIL pictures, `t` their timesteps."""

    x_t: list[Image]
    x0: list[Image]
    t: tuple[int, ...]


def decode_trajectory(
    lab: LatentDiffusion, steps: Sequence[Step], picks: int | Sequence[int] = 6, image: int = 0
) -> Trajectory:
    """Decode x_t and the predicted x0 of one picture at some steps: `picks` of them evenly spread, or those with these indices.

    `steps` is `list(lab.steps(...))`, or `trace.steps` of `record(lab, latents=True)`. Raises LabkitError if there are
    no steps, or no such step or picture.
    """
    steps = list(steps)
    if not steps:
        raise LabkitError("There are no steps: give list(lab.steps(...)), or the trace.steps of record(lab, latents=True).")
    if type(image) is not int or not 0 <= image < len(steps[0].x):
        raise LabkitError(f"There are images 0 to {len(steps[0].x) - 1}, there is no image {image!r}.")
    chosen = [steps[i] for i in _indices(picks, len(steps))]
    x0 = torch.cat([step.x0[image : image + 1] for step in chosen])  # (n, 4, h, w)
    x_t = torch.cat([given(step, lab)[image : image + 1] for step in chosen])  # (n, 4, h, w)
    pictures = to_pil(lab.decode(torch.cat([x_t, x0])))
    return Trajectory(pictures[: len(chosen)], pictures[len(chosen) :], tuple(step.t for step in chosen))


def given(step: Step, lab: LatentDiffusion) -> Tensor:
    """x_t, (B, 4, h, w): the latent the step began with. A Step carries the one it arrived at."""
    return q_sample(step.x0, step.t, step.eps, lab.schedule)


def _indices(picks: int | Sequence[int], n: int) -> list[int]:
    """Step indices in order: the first and the last are always among evenly spread ones."""
    if isinstance(picks, int):
        if picks < 1:
            raise LabkitError(f"picks is {picks}: give 1 or more, or the indices of the steps.")
        return sorted({round(k * (n - 1) / max(picks - 1, 1)) for k in range(picks)}) if picks > 1 else [n - 1]
    picks = list(picks)
    wrong = [i for i in picks if type(i) is not int or not -n <= i < n]
    if wrong or not picks:
        raise LabkitError(f"There are steps 0 to {n - 1}, there is no step {wrong[0] if wrong else 'to show'}.")
    return sorted({i % n for i in picks})
