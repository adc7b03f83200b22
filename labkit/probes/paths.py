"""The paths of many pictures through the space of latents, seen in the few directions in which they differ most.

    X = [x_T, x_{T-1}, ..., x_0] of all seeds, centred;    X = U S V^T;    coordinates X V_k,    share_k = S_k^2 / sum S^2

A plane shows little of a space of a thousand dimensions: the shares of the variance say how little. Signs are chosen so that each
direction's largest entry is positive: the same paths give the same figure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.probes.courses import seeds_of
from labkit.probes.trajectory import given


@dataclass(frozen=True, eq=False)
class Paths:
    """`coordinates` (seed, step, direction): step 0 is the noise, the last one the picture; `share` (direction,) of the variance; `what` was followed."""

    coordinates: Tensor
    share: Tensor
    t: tuple[float, ...]  # the timestep at which each but the last point was seen by the network
    seeds: tuple[int, ...]
    prompt: str
    what: str


def paths(
    lab: LatentDiffusion, prompt: str, seeds: Sequence[int] = tuple(range(12)), what: str = "x_t", directions: int = 2, **options
) -> Paths:
    """Follow a prompt from many seeds, in one batch: `what` is "x_t", the latents, or "x0", what is predicted of them. Raises LabkitError."""
    seeds = seeds_of(seeds)
    if what not in ("x_t", "x0"):
        raise LabkitError(f"what is {what!r}: use 'x_t' or 'x0'.")
    steps = list(lab.steps(prompt, seed=seeds, **options))
    points = [step.x0 for step in steps] if what == "x0" else [given(steps[0], lab), *(step.x for step in steps)]
    X = torch.stack(points, dim=1).flatten(2).float().cpu()  # (seed, step, C h w)
    if not 1 <= directions <= min(X.shape[0] * X.shape[1], X.shape[2]):
        raise LabkitError(f"There are no {directions} directions in {X.shape[0] * X.shape[1]} points: give 1 or more, and enough seeds.")
    coordinates, share = principal(X.flatten(0, 1), directions)
    return Paths(coordinates.view(*X.shape[:2], -1), share, tuple(float(step.t) for step in steps), tuple(seeds), prompt, what)


def principal(X: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """Coordinates (n, directions) of points X (n, D) along their principal directions, and the share of the variance of each."""
    X = X - X.mean(0)
    _, S, Vh = torch.linalg.svd(X, full_matrices=False)  # (min(n, D),), (min(n, D), D)
    V = Vh[:directions]
    V = V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign()  # (directions, D)
    return X @ V.T, S[:directions] ** 2 / (S**2).sum()
