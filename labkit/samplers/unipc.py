"""UniPC: predict with the x0 of the last steps; when the next call has said what x0 is there, correct the latent for free.

    lambda = -log sigma,   h = lambda_s - lambda_t,   B = e^-h - 1,   m = x0_hat at t,   m_k = x0_hat k steps before
    r_k = (lambda_k - lambda_t) / h,   D_k = (m_k - m) / r_k,   k = 1 .. p - 1;   corrector also r_p = 1, D_p = m_s - m
    x_s = sqrt((1 - a_s) / (1 - a_t)) x_t - sqrt(a_s) B (m + sum_k rho_k D_k)
    sum_k rho_k r_k^(j-1) = j! g_j / B,   g_1 = B / -h - 1,   g_(j+1) = g_j / -h - 1 / (j+1)!

Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models" (alg. 5 to 8: data
prediction, B_2(h) = e^h - 1). A single rho is 1/2, as the authors and diffusers have it. One network call a step.
"""

from collections.abc import Callable, Iterator
from math import expm1, factorial, inf, log

import torch
from torch import Tensor

from labkit.errors import LabkitError
from labkit.samplers.sigmas import lambda_levels, signal
from labkit.samplers.step import Denoiser, Step, and_next, going_on, predict
from labkit.schedule import Schedule


def unipc(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    order: int = 2,
    karras: bool = False,
    noise: Callable[[], Tensor] | None = None,
) -> Iterator[Step]:
    """Sample from x = x_T ~ N(0, I), (B, C, h, w), in `steps` steps with predictors of order 1, 2 or 3, and correctors.

    Equal to diffusers' UniPCMultistepScheduler with its defaults ("bh2"; orders rise from 1 at the start and fall to 1 at
    the end, whose step goes to sigma = 0). `Step.x` is the predicted latent, which the next step will correct. `karras`
    is as in `dpm_solver`, `noise` is never drawn. Raises LabkitError on bad steps or order.
    """
    if order not in (1, 2, 3):
        raise LabkitError(f"order is {order!r}: UniPC is of order 1, 2 or 3 here.")
    timesteps, sigmas = lambda_levels(schedule, steps, karras)

    def run(x: Tensor) -> Iterator[Step]:
        m: list[Tensor] = []  # x0_hat of all steps so far that are still needed, the latest last
        start, p = x, 0       # where the step before began (after its correction), and its order
        for i, (t, s) in enumerate(and_next(timesteps)):
            eps = predict(denoise, x, t)
            x0 = x / signal(sigmas[i]) - sigmas[i] * eps
            if i > 0:
                x = _update(start, sigmas, i - 1, m, p, arrived=x0)
            m = [*m[1 - order :], x0] if order > 1 else [x0]
            start, p = x, min(order, i + 1, steps - i)
            x = _update(start, sigmas, i, m, p)
            x = going_on(x, (yield Step(i, t, x, eps, x0, s)))

    return run(x)


def _update(x: Tensor, sigmas: list[float], i: int, m: list[Tensor], p: int, arrived: Tensor | None = None) -> Tensor:
    """x at level i taken to level i + 1 by the p latest of m; with `arrived`, the x0_hat found there, it is the corrector."""
    sigma, after, now = sigmas[i], sigmas[i + 1], m[-1]
    h = log(sigma / after) if after > 0 else inf
    r = [log(sigma / sigmas[i - k]) / h for k in range(1, p)]
    D = [(m[-1 - k] - now) / r[k - 1] for k in range(1, p)]
    if arrived is not None:
        r, D = [*r, 1.0], [*D, arrived - now]
    best = now
    for rho, D_k in zip(_weights(r, h), D):
        best = best + rho * D_k
    return after * signal(after) / (sigma * signal(sigma)) * x - signal(after) * expm1(-h) * best


def _weights(r: list[float], h: float) -> list[float]:
    """The rho that make the update exact for polynomials in lambda."""
    if len(r) < 2:
        return [0.5] * len(r)
    B = expm1(-h)
    g, b = B / -h - 1, []
    for j in range(1, len(r) + 1):
        b.append(factorial(j) * g / B)
        g = g / -h - 1 / factorial(j + 1)
    powers = torch.tensor([[r_k**j for r_k in r] for j in range(len(r))], dtype=torch.float64)
    return torch.linalg.solve(powers, torch.tensor(b, dtype=torch.float64)).tolist()
