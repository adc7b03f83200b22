"""Euler: a straight step along the probability-flow ODE in sigma; ancestral, with part of the noise renewed.

    d x_bar / d sigma = eps,      x_bar = x_t / sqrt(alpha_bar)
    Euler:      x_bar_s = x_bar_t + (sigma_s - sigma_t) eps
    ancestral:  x_bar_s = x_bar_t + (sigma_down - sigma_t) eps + sigma_up z,     z ~ N(0, I)
                sigma_up^2 = sigma_s^2 (sigma_t^2 - sigma_s^2) / sigma_t^2,      sigma_down^2 = sigma_s^2 - sigma_up^2

Song et al. 2021, "Score-Based Generative Modeling through SDEs" (eq. 13); Karras et al. 2022, "Elucidating the Design
Space" (alg. 1 and eq. 4 with sigma as time). Euler in sigma is DDIM with eta = 0, ancestral is DDIM with eta = 1.
"""

from collections.abc import Callable, Iterator
from math import sqrt

from torch import Tensor

from labkit.samplers.sigmas import Levels, sigma_levels, signal
from labkit.samplers.step import Denoiser, Step, and_next, check_noise, fresh, going_on, predict
from labkit.schedule import Schedule


def euler(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    karras: bool = False,
    noise: Callable[[], Tensor] | None = None,
) -> Iterator[Step]:
    """Sample from x = x_T, (B, C, h, w), in `steps` steps; equal to diffusers' EulerDiscreteScheduler down to sigma = 0.

    `karras` spreads the sigmas as Karras et al. do. With linspace spacing or `karras`, timesteps lie between two of the
    table's. `noise` is never drawn: it is there so that all samplers are called alike. Raises LabkitError on bad steps.
    """
    return _run(denoise, x, sigma_levels(schedule, steps, karras), None)


def euler_ancestral(
    denoise: Denoiser, x: Tensor, schedule: Schedule, steps: int, noise: Callable[[], Tensor]
) -> Iterator[Step]:
    """As `euler`, with fresh noise, `noise()` of x's shape, in every step but the last.

    Equal to diffusers' EulerAncestralDiscreteScheduler. Raises LabkitError on bad steps or noise.
    """
    check_noise(noise)
    return _run(denoise, x, sigma_levels(schedule, steps), noise)


def _run(denoise: Denoiser, x: Tensor, levels: Levels, noise: Callable[[], Tensor] | None) -> Iterator[Step]:
    timesteps, sigmas = levels
    for i, ((t, s), sigma, after) in enumerate(zip(and_next(timesteps), sigmas, sigmas[1:])):
        up = 0.0 if noise is None else after * sqrt(max(sigma**2 - after**2, 0)) / sigma
        down = sqrt(after**2 - up**2)
        eps = predict(denoise, x, t)
        x_bar = x / signal(sigma)
        x0 = x_bar - sigma * eps
        x_bar = x_bar + (down - sigma) * eps
        if up > 0:
            x_bar = x_bar + up * fresh(noise, x)
        x = x_bar * signal(after)
        x = going_on(x, (yield Step(i, t, x, eps, x0, s)))
