"""DPM-Solver++: the linear part of the ODE solved exactly, what the network says of x0 held or extrapolated along lambda.

    lambda = log(sqrt(a) / sqrt(1 - a)) = -log sigma,     h = lambda_s - lambda_t,     D = x0_hat at t           a = alpha_bar
    1:   x_s = sqrt((1 - a_s) / (1 - a_t)) x_t - sqrt(a_s) (e^-h - 1) D
    2M:  the same with  D + (D - D_before) / (2 r),       r = h_before / h

Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models" (eq. 9 and alg. 2). Order 1
is DDIM. 2M remembers the x0_hat of the step before, so that second order costs one network call a step.
"""

from collections.abc import Callable, Iterator
from math import expm1, inf, log

from torch import Tensor

from labkit.errors import LabkitError
from labkit.samplers.sigmas import lambda_levels, signal
from labkit.samplers.step import Denoiser, Step, and_next, going_on, predict
from labkit.schedule import Schedule


def dpm_solver(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    order: int = 2,
    karras: bool = False,
    noise: Callable[[], Tensor] | None = None,
) -> Iterator[Step]:
    """Sample from x = x_T ~ N(0, I), (B, C, h, w), in `steps` steps, of order 1 or 2 (multistep).

    Equal to diffusers' DPMSolverMultistepScheduler with its defaults: the last step goes to sigma = 0 and, like the first,
    is of order 1. `karras` spreads the sigmas as Karras et al. do; the network is then told the nearest timestep
    (with cosine betas the one below, by a quirk of theirs). `noise` is never drawn. Raises LabkitError on bad steps or order.
    """
    if order not in (1, 2):
        raise LabkitError(f"order is {order!r}: DPM-Solver++ is of order 1 or 2 here.")
    whole = int if schedule.config.beta_schedule == "squaredcos_cap_v2" else round
    timesteps, sigmas = lambda_levels(schedule, steps, karras, whole)

    def run(x: Tensor) -> Iterator[Step]:
        before, h_before = None, 0.0
        for i, ((t, s), sigma, after) in enumerate(zip(and_next(timesteps), sigmas, sigmas[1:])):
            eps = predict(denoise, x, t)
            x0 = x / signal(sigma) - sigma * eps
            h = log(sigma / after) if after > 0 else inf
            D = x0
            if order == 2 and before is not None and after > 0:
                D = x0 + (x0 - before) * (h / (2 * h_before))
            x = after * signal(after) / (sigma * signal(sigma)) * x - signal(after) * expm1(-h) * D
            before, h_before = x0, h
            x = going_on(x, (yield Step(i, t, x, eps, x0, s)))

    return run(x)
