"""Exercises of notebook 05: one step of five samplers.

    DDIM    x_s = sqrt(a_s) x0_hat + sqrt(1 - a_s) eps,    x0_hat = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t)     Song, Meng & Ermon 2020, eq. 12
    DDPM    x_s = mu(x0_hat, x_t) + sqrt((1 - a_s) / (1 - a_t) b) z,    b = 1 - a_t / a_s                     Ho et al. 2020, eq. 6 and 7
    Euler   x_bar_s = x_bar_t + (sigma_s - sigma_t) eps                                                       Karras et al. 2022, alg. 1
    Heun    the same with the mean of the slopes at both ends                                                 ibid.
    2M      D = x0 + (x0 - x0_before) h / (2 h_before)                                                        Lu et al. 2022, alg. 2

a is alpha_bar at the timesteps t and s < t. tests/test_checks.py holds the references to labkit's own samplers.
"""

from math import sqrt

import torch
from torch import Tensor

from labkit.checks.check import Check, seeded

LEVELS = ((0.005, 0.05), (0.3, 0.62), (0.9, 0.998), (0.4, 1.0))


def _x0(x_t: Tensor, eps: Tensor, a_t: float) -> Tensor:
    return (x_t - sqrt(1 - a_t) * eps) / sqrt(a_t)


def _steps():
    return [(seeded(2, 4, 3, 3, seed=n), seeded(2, 4, 3, 3, seed=50 + n), a_t, a_s) for n, (a_t, a_s) in enumerate(LEVELS)]


ddim_step = Check(
    "ddim_step",
    reference=lambda x_t, eps, a_t, a_s: sqrt(a_s) * _x0(x_t, eps, a_t) + sqrt(1 - a_s) * eps,
    wrong={
        "The noise is put back at the level of t; at the next timestep it is less, $\\sqrt{1-\\bar\\alpha_s}$.": lambda x_t, eps, a_t, a_s: (
            sqrt(a_s) * _x0(x_t, eps, a_t) + sqrt(1 - a_t) * eps),
        "You stopped at $\\hat x_0$: that is the guess of the finished picture, which has to be noised again to the level of s.": (
            lambda x_t, eps, a_t, a_s: _x0(x_t, eps, a_t)),
        "No noise is put back: the picture is scaled to level s, but $\\sqrt{1-\\bar\\alpha_s}\\,\\epsilon$ is missing.": lambda x_t, eps, a_t, a_s: (
            sqrt(a_s) * _x0(x_t, eps, a_t)),
        "$\\hat x_0$ is not divided by $\\sqrt{\\bar\\alpha_t}$.": lambda x_t, eps, a_t, a_s: (
            sqrt(a_s) * (x_t - sqrt(1 - a_t) * eps) + sqrt(1 - a_s) * eps),
        "The roots over $\\bar\\alpha_s$ and $1-\\bar\\alpha_s$ are missing.": lambda x_t, eps, a_t, a_s: a_s * _x0(x_t, eps, a_t) + (1 - a_s) * eps,
        "You used $\\alpha$ in place of $\\bar\\alpha$: what one step leaves, not what all of them do.": lambda x_t, eps, a_t, a_s: (
            (x_t - sqrt(1 - a_t / a_s) * eps) / sqrt(a_t / a_s)),
        "t and s have changed places: you go from s to t, which adds noise.": lambda x_t, eps, a_t, a_s: sqrt(a_t) * _x0(x_t, eps, a_s) + sqrt(1 - a_t) * eps,
        "$\\hat x_0$ is not scaled down by $\\sqrt{\\bar\\alpha_s}$ on the way back.": lambda x_t, eps, a_t, a_s: _x0(x_t, eps, a_t) + sqrt(1 - a_s) * eps,
    },
    task="`ddim_step` goes from $x_t$ to $x_s$: guess $\\hat x_0$ by notebook 01's equation, then noise it again, with the same `eps`, to the level `a_s`, equation (1).",
    praise="guess the end, then go back to where the next step starts.",
    cases=_steps,
)


def _posterior(x_t: Tensor, eps: Tensor, a_t: float, a_s: float) -> tuple[Tensor, float]:
    """Mean and variance of q(x_s | x_t, x0_hat)."""
    b = 1 - a_t / a_s
    return sqrt(a_s) * b / (1 - a_t) * _x0(x_t, eps, a_t) + sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t) * x_t, (1 - a_s) / (1 - a_t) * b


def _ddpm(x_t: Tensor, eps: Tensor, z: Tensor, a_t: float, a_s: float, std=sqrt) -> Tensor:
    mean, variance = _posterior(x_t, eps, a_t, a_s)
    return mean + std(variance) * z


ddpm_step = Check(
    "ddpm_step",
    reference=_ddpm,
    wrong={
        "`z` is multiplied by the variance; it takes the root of it to get that variance.": lambda x_t, eps, z, a_t, a_s: _ddpm(x_t, eps, z, a_t, a_s, float),
        "That is the mean alone: the fresh noise `z` is missing, and all pictures come out too smooth.": lambda x_t, eps, z, a_t, a_s: (
            _posterior(x_t, eps, a_t, a_s)[0]),
        "You took $b$ itself as the variance. Ho et al. allow it as the *larger* choice; the equation here is the posterior's, times $(1-\\bar\\alpha_s)/(1-\\bar\\alpha_t)$.": (
            lambda x_t, eps, z, a_t, a_s: _posterior(x_t, eps, a_t, a_s)[0] + sqrt(1 - a_t / a_s) * z),
        "That is DDIM's step with noise on top: in DDPM the fresh noise replaces part of `eps`, it does not come in addition.": lambda x_t, eps, z, a_t, a_s: (
            sqrt(a_s) * _x0(x_t, eps, a_t) + sqrt(1 - a_s) * eps + sqrt(_posterior(x_t, eps, a_t, a_s)[1]) * z),
        "The two weights of the mean have changed places.": lambda x_t, eps, z, a_t, a_s: (
            sqrt(a_s) * (1 - a_t / a_s) / (1 - a_t) * x_t + sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t) * _x0(x_t, eps, a_t)
            + sqrt(_posterior(x_t, eps, a_t, a_s)[1]) * z),
        "You used `eps`, the predicted noise, where fresh noise `z` is added.": lambda x_t, eps, z, a_t, a_s: _ddpm(x_t, eps, eps, a_t, a_s),
    },
    task="`ddpm_step` draws $x_s$ from the posterior, equation (4): the mean of $\\hat x_0$ and $x_t$ with its two weights, plus the root of the variance times `z`.",
    praise="where DDIM walks, DDPM walks and is pushed, and both arrive.",
    cases=lambda: [(x_t, eps, seeded(*x_t.shape, seed=90 + n), a_t, a_s) for n, (x_t, eps, a_t, a_s) in enumerate(_steps())],
)

euler_step = Check(
    "euler_step",
    reference=lambda x_bar, eps, sigma_t, sigma_s: x_bar + (sigma_s - sigma_t) * eps,
    wrong={
        "The sign: $\\sigma$ falls, so $\\sigma_s-\\sigma_t$ is negative and noise comes off. You add noise.": lambda x_bar, eps, t, s: x_bar + (t - s) * eps,
        "You took off all the noise; a step goes only from $\\sigma_t$ to $\\sigma_s$.": lambda x_bar, eps, t, s: x_bar - t * eps,
        "The length of the step is the *difference* of the two $\\sigma$; you used $\\sigma_s$.": lambda x_bar, eps, t, s: x_bar + s * eps,
        "That steps in $\\log\\sigma$; the equation is in $\\sigma$ itself.": lambda x_bar, eps, t, s: x_bar + torch.log(torch.tensor((s + 1e-9) / t)).item() * eps,
        "The difference of the *squares* is the variance that comes off when noise is independent; along the road it is the difference of the $\\sigma$.": (
            lambda x_bar, eps, t, s: x_bar - (t**2 - s**2) ** 0.5 * eps),
    },
    task="`euler_step` goes straight on along the slope, equation (3): $\\bar x_s = \\bar x_t + (\\sigma_s-\\sigma_t)\\,\\epsilon$.",
    praise="put this line into a loop, and it is a whole sampler.",
    cases=lambda: [(seeded(2, 4, 3, 3, seed=n), seeded(2, 4, 3, 3, seed=60 + n), t, s) for n, (t, s) in enumerate(((14.6, 7.0), (2.0, 1.1), (0.4, 0.0)))],
)


def _slope(x_bar: Tensor, sigma: float) -> Tensor:
    """A slope that bends: what a denoiser of a single point at 1 would say, and a little of a wave."""
    return (x_bar - 1) / (sigma + 0.5) + 0.3 * (x_bar + sigma).sin()


def _heun(x_bar: Tensor, t: float, s: float, slope, share: float = 0.5) -> Tensor:
    first = slope(x_bar, t)
    return x_bar + (s - t) * ((1 - share) * first + share * slope(x_bar + (s - t) * first, s))


heun_step = Check(
    "heun_step",
    reference=_heun,
    wrong={
        "That is Euler's step: the second slope, at the place where Euler lands, is missing.": lambda x, t, s, slope: _heun(x, t, s, slope, 0),
        "You used the second slope alone; Heun takes the mean of both.": lambda x, t, s, slope: _heun(x, t, s, slope, 1),
        "You added the two slopes; the step takes their mean. A factor ½ is missing.": lambda x, t, s, slope: (
            x + (s - t) * (slope(x, t) + slope(x + (s - t) * slope(x, t), s))),
        "The second slope is taken at the new place but still at $\\sigma_t$; there it is $\\sigma_s$.": lambda x, t, s, slope: (
            x + (s - t) * (slope(x, t) + slope(x + (s - t) * slope(x, t), t)) / 2),
        "The second slope is taken at the old place; first go there with Euler's step.": lambda x, t, s, slope: x + (s - t) * (slope(x, t) + slope(x, s)) / 2,
        "The last move starts from where Euler landed; it starts from $\\bar x_t$ again.": lambda x, t, s, slope: _again(x, t, s, slope),
        "That is the midpoint method: a good one, of second order too, but Heun looks at the *end* of the step.": lambda x, t, s, slope: (
            x + (s - t) * slope(x + (s - t) / 2 * slope(x, t), (s + t) / 2)),
    },
    task="`heun_step`: Euler's step, the slope where it lands (at `sigma_s`), then the step again from the start with the mean of both slopes, equation (5).",
    praise="two calls of the network for one step, and an error that falls with the square of its length.",
    cases=lambda: [(seeded(2, 4, 3, 3, seed=n), t, s, _slope) for n, (t, s) in enumerate(((14.6, 7.0), (2.0, 1.1), (0.4, 0.1)))],
)


def _again(x: Tensor, t: float, s: float, slope) -> Tensor:
    there = x + (s - t) * slope(x, t)
    return there + (s - t) * (slope(x, t) + slope(there, s)) / 2


look_ahead = Check(
    "look_ahead",
    reference=lambda x0, before, h, h_before: x0 + (x0 - before) * (h / (2 * h_before)),
    wrong={
        "The ratio is upside down: half of *this* step over the one before, $h/(2h_{before})$.": lambda x0, before, h, h_before: (
            x0 + (x0 - before) * (h_before / (2 * h))),
        "A factor ½ is missing: the middle of the step stands for the step.": lambda x0, before, h, h_before: x0 + (x0 - before) * (h / h_before),
        "The sign: what was before is subtracted, the trend goes on in the same direction.": lambda x0, before, h, h_before: (
            x0 - (x0 - before) * (h / (2 * h_before))),
        "That is right only where all steps are equally long; use $h/(2h_{before})$.": lambda x0, before, h, h_before: x0 + (x0 - before) / 2,
        "You returned the trend alone; it is added to $\\hat x_0$.": lambda x0, before, h, h_before: (x0 - before) * (h / (2 * h_before)),
        "That is the mean of the two guesses, which looks back; here you look ahead.": lambda x0, before, h, h_before: (x0 + before) / 2,
    },
    task="`look_ahead` continues the trend of the last two guesses $\\hat x_0$ to the middle of the coming step, equation (6).",
    praise="second order for one call a step: the past is free.",
    cases=lambda: [(seeded(2, 4, 3, 3, seed=n), seeded(2, 4, 3, 3, seed=70 + n), h, b) for n, (h, b) in enumerate(((0.5, 0.4), (0.2, 0.9)))],
)
