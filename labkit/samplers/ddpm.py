"""DDPM: ancestral sampling, one draw from the posterior q(x_s | x_t, x0) at a time.

    x0_hat = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t)                            a = alpha_bar, s < t the next timestep
    mu     = sqrt(a_s) b / (1 - a_t) x0_hat + sqrt(a_t / a_s) (1 - a_s) / (1 - a_t) x_t,          b = 1 - a_t / a_s
    x_s    = mu + sqrt((1 - a_s) / (1 - a_t) b) z,     z ~ N(0, I)

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (eq. 6 and 7, the smaller of its two variances). With all T
timesteps b is beta_t; with fewer, b is the noise that the forward process adds from s to t.
"""

from collections.abc import Callable, Iterator
from math import sqrt

from torch import Tensor

from labkit.samplers.step import Denoiser, Step, and_next, check_noise, fresh, going_on, predict
from labkit.schedule import Schedule


def ddpm(
    denoise: Denoiser, x: Tensor, schedule: Schedule, steps: int, noise: Callable[[], Tensor]
) -> Iterator[Step]:
    """Sample from x = x_T ~ N(0, I), (B, C, h, w), in `steps` noisy steps; `noise()` gives fresh noise (`Noise.draw`).

    Equal to diffusers' DDPMScheduler ("fixed_small", unclipped) for any number of steps. The last step arrives at
    alpha_bar = 1 and adds no noise, whatever `set_alpha_to_one` says. Raises LabkitError on bad steps or noise.
    """
    timesteps = schedule.timesteps(steps).tolist()
    check_noise(noise)

    def run(x: Tensor) -> Iterator[Step]:
        for i, (t, s) in enumerate(and_next(timesteps)):
            a_t = schedule.alpha_bar_at(t)
            a_s = 1.0 if s is None else schedule.alpha_bar_at(s)
            b = 1 - a_t / a_s
            eps = predict(denoise, x, t)
            x0 = (x - sqrt(1 - a_t) * eps) / sqrt(a_t)
            x = sqrt(a_s) * b / (1 - a_t) * x0 + sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t) * x
            if s is not None:
                x = x + sqrt((1 - a_s) / (1 - a_t) * b) * fresh(noise, x)
            x = going_on(x, (yield Step(i, t, x, eps, x0, s)))

    return run(x)
