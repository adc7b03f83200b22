"""Noise as sigma: the levels that Euler, Heun, DPM-Solver++ and UniPC go through.

    x_t / sqrt(alpha_bar) = x0 + sigma eps,      sigma = sqrt((1 - alpha_bar) / alpha_bar),      alpha_bar = 1 / (1 + sigma^2)
    sigma_i = (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,     i = 0 .. N - 1,  rho = 7

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (eq. 5). In x / sqrt(alpha_bar) the
probability-flow ODE is dx / dsigma = eps, as simple as can be; the samplers' latents stay the variance-preserving x_t, and
each divides and multiplies by sqrt(alpha_bar) where it needs to.

A chosen sigma is none of the table's T, so the network must be told a timestep that lies between two: interpolated in
log sigma. Where timesteps are chosen instead, sigma is interpolated linearly. Both as in diffusers.
"""

from collections.abc import Callable
from math import inf, log, sqrt

import torch

from labkit.errors import LabkitError
from labkit.schedule import Schedule, Timestep

Levels = tuple[list[int | Timestep], list[float]]  # N timesteps; N + 1 sigmas, falling, the last one 0


def karras_sigmas(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> list[float]:
    """`steps` levels from sigma_max down to sigma_min, dense where sigma is small (Karras et al. 2022, eq. 5).

    One step is sigma_max alone. Raises LabkitError unless 0 < sigma_min <= sigma_max, rho > 0 and steps is positive.
    """
    if not 0 < sigma_min <= sigma_max < inf or not 0 < rho < inf or not isinstance(steps, int) or steps < 1:
        raise LabkitError(f"No {steps!r} levels from {sigma_max} to {sigma_min} with rho {rho}: they must be positive and fall.")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(high + i / max(steps - 1, 1) * (low - high)) ** rho for i in range(steps)]


def sigma_at(schedule: Schedule, t: float) -> float:
    """sigma at a real timestep 0 <= t <= T - 1, linear between the table's neighbours."""
    i = min(int(t), len(schedule.sigma) - 1)
    low, high = schedule.sigma[i].item(), schedule.sigma[min(i + 1, len(schedule.sigma) - 1)].item()
    return low + (t - i) * (high - low)


def timestep_at(schedule: Schedule, sigma: float) -> float:
    """The real timestep whose level is sigma, linear in log sigma between the table's neighbours; the ends hold what lies beyond."""
    table = schedule.sigma.log()  # (T,)
    s = log(max(sigma, 1e-10))
    i = int(torch.searchsorted(table, torch.tensor(s, dtype=table.dtype), right=True)) - 1
    if len(table) == 1 or i < 0:
        return 0.0
    i = min(i, len(table) - 2)
    low, high = table[i].item(), table[i + 1].item()
    return i + min((s - low) / (high - low), 1.0)


def signal(sigma: float) -> float:
    """sqrt(alpha_bar) of a level: what x / sqrt(alpha_bar) is multiplied by to be x_t again."""
    return 1 / sqrt(1 + sigma**2)


def sigma_levels(schedule: Schedule, steps: int, karras: bool = False) -> Levels:
    """What Euler and Heun visit: the schedule's timesteps (linspace unrounded), or Karras' sigmas between their first and last."""
    ts = schedule.timesteps(steps).tolist()
    if schedule.config.timestep_spacing == "linspace":
        ts = [i * ((schedule.config.num_train_timesteps - 1) / max(steps - 1, 1)) for i in reversed(range(steps))]
    sigmas = [sigma_at(schedule, t) for t in ts]
    if karras:
        sigmas = karras_sigmas(sigmas[-1], sigmas[0], steps)
        ts = [timestep_at(schedule, sigma) for sigma in sigmas]
    return [_named(t, sigma, karras) for t, sigma in zip(ts, sigmas)], [*sigmas, 0.0]


def lambda_levels(schedule: Schedule, steps: int, karras: bool = False, whole: Callable[[float], int] = round) -> Levels:
    """What DPM-Solver++ and UniPC visit: N of N + 1 evenly spread timesteps, all but the last; trailing, all N of N.

    With `karras` sigmas run from the table's last to its first, and the network is told a whole timestep near each. Raises
    LabkitError where there are not N + 1 timesteps.
    """
    first = schedule.timesteps(steps)  # raises where the number cannot be, and says so
    T, spacing = schedule.config.num_train_timesteps, schedule.config.timestep_spacing
    if karras:
        sigmas = karras_sigmas(schedule.sigma[0].item(), schedule.sigma[-1].item(), steps)
        ts = [timestep_at(schedule, sigma) for sigma in sigmas]
        return [_named(whole(t), sigma, True) for t, sigma in zip(ts, sigmas)], [*sigmas, 0.0]
    if spacing != "trailing" and steps + 1 > T:
        raise LabkitError(f"steps is {steps}: with {spacing} spacing this sampler wants one timestep more, and there are {T}.")
    ts = first.tolist() if spacing == "trailing" else schedule.timesteps(steps + 1)[:-1].tolist()
    return ts, [schedule.sigma[t].item() for t in ts] + [0.0]


def _named(t: float, sigma: float, chosen: bool) -> int | Timestep:
    """The table's own timesteps are ints; others carry their level."""
    return Timestep(t, signal(sigma) ** 2) if chosen or t != int(t) else int(t)
