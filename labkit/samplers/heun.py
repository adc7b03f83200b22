"""Heun: an Euler step, a look at the slope where it lands, and the step again with the mean of both slopes.

    x_bar' = x_bar_t + (sigma_s - sigma_t) eps(x_t, t)                                      x_bar = x_t / sqrt(alpha_bar)
    x_bar_s = x_bar_t + (sigma_s - sigma_t) (eps(x_t, t) + eps(x'_s, s)) / 2

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (alg. 1 without churn). Second
order in the step, at two network calls a step: 2 N - 1 in all, for the last step, to sigma = 0, is Euler's.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from labkit.samplers.sigmas import sigma_levels, signal
from labkit.samplers.step import Denoiser, Step, and_next, going_on, predict
from labkit.schedule import Schedule


def heun(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    karras: bool = False,
    noise: Callable[[], Tensor] | None = None,
) -> Iterator[Step]:
    """Sample from x = x_T, (B, C, h, w), in `steps` steps and 2 steps - 1 calls; equal to diffusers' HeunDiscreteScheduler.

    A Step's `t`, `eps` and `x0` are those of its first call. `karras` and `noise` are as in `euler`. Raises LabkitError
    on bad steps.
    """
    timesteps, sigmas = sigma_levels(schedule, steps, karras)

    def run(x: Tensor) -> Iterator[Step]:
        for i, ((t, s), sigma, after) in enumerate(zip(and_next(timesteps), sigmas, sigmas[1:])):
            eps = predict(denoise, x, t)
            x_bar = x / signal(sigma)
            slope = eps
            if after > 0:
                there = (x_bar + (after - sigma) * eps) * signal(after)
                slope = (eps + predict(denoise, there, s)) / 2
            x = (x_bar + (after - sigma) * slope) * signal(after)
            x = going_on(x, (yield Step(i, t, x, eps, x_bar - sigma * eps, s)))

    return run(x)
