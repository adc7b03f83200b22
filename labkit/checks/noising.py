"""Exercises of notebook 01: the forward process, in small steps and in one jump.

    q(x_t | x_{t-1}) = N( sqrt(1 - beta_t) x_{t-1}, beta_t I ),     alpha_bar_t = prod_{s <= t} (1 - beta_s)
    q(x_t | x0)      = N( sqrt(alpha_bar_t) x0, (1 - alpha_bar_t) I ),     SNR_t = alpha_bar_t / (1 - alpha_bar_t)

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (eq. 2 and 4). The references are labkit.schedule's own formulas.
"""

import torch
from torch import Tensor

from labkit.checks.check import Check, seeded
from labkit.schedule import Schedule, q_sample as labkit_q_sample, x0_from_eps as labkit_x0_from_eps

SCHEDULE = Schedule()
TIMES = ((0, 0), (1, 20), (300, 999), (500, 650))  # two images a case, each at its own t


def _at(table: Tensor, t: Tensor) -> Tensor:
    """table[t] as (B, 1, 1, 1), so that it multiplies images."""
    return table[t].view(-1, 1, 1, 1)


def _images(with_table: Tensor):
    return lambda: [(seeded(2, 3, 4, 5, seed=n), torch.tensor(t), seeded(2, 3, 4, 5, seed=10 + n), with_table) for n, t in enumerate(TIMES)]


def _alpha(alpha_bar: Tensor) -> Tensor:
    """alpha_t = 1 - beta_t, got back from its running product."""
    return torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


alpha_bar = Check(
    "alpha_bar",
    reference=lambda beta: torch.cumprod(1 - beta, dim=0),
    wrong={
        "That is $\\alpha_t = 1-\\beta_t$, what one step leaves; $\\bar\\alpha_t$ is the product of all of them up to t.": lambda beta: 1 - beta,
        "You multiplied the $\\beta_s$; what is multiplied is what each step leaves, $1-\\beta_s$.": lambda beta: torch.cumprod(beta, 0),
        "That is one minus the sum of the $\\beta_s$; shares of shares multiply, they do not add up.": lambda beta: 1 - torch.cumsum(beta, 0),
        "You multiplied all the way to the end and got one number; $\\bar\\alpha_t$ is the running product, one number for each t.": lambda beta: (1 - beta).prod(),
        "That is $\\sqrt{\\bar\\alpha_t}$, the factor of the picture; $\\bar\\alpha_t$ itself has no root.": lambda beta: torch.cumprod(1 - beta, 0).sqrt(),
        "Your product stops one step early: $\\bar\\alpha_t$ includes $1-\\beta_t$ itself.": lambda beta: torch.cat(
            [torch.ones(1, dtype=beta.dtype), torch.cumprod(1 - beta, 0)[:-1]]),
        "That is $1-\\bar\\alpha_t$, the variance of the noise.": lambda beta: 1 - torch.cumprod(1 - beta, 0),
    },
    task="`alpha_bar` is given the table of $\\beta_t$, (T,), and returns the table of their running products, equation (3): a line with `torch.cumprod`.",
    praise="at every t this is the share of the picture's power that is left.",
    cases=lambda: [(SCHEDULE.beta.clone(),), (torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64),)],
)

q_step = Check(
    "q_step",
    reference=lambda x, t, eps, beta: _at((1 - beta).sqrt(), t) * x + _at(beta.sqrt(), t) * eps,
    wrong={
        "The noise has the *variance* $\\beta_t$, so it is multiplied by $\\sqrt{\\beta_t}$; you multiplied by $\\beta_t$.": lambda x, t, eps, beta: (
            _at((1 - beta).sqrt(), t) * x + _at(beta, t) * eps),
        "The picture is not scaled down: without $\\sqrt{1-\\beta_t}$ the variance grows at every step.": lambda x, t, eps, beta: x + _at(beta.sqrt(), t) * eps,
        "The roots are missing, both of them.": lambda x, t, eps, beta: _at(1 - beta, t) * x + _at(beta, t) * eps,
        "The root over $1-\\beta_t$ is missing.": lambda x, t, eps, beta: _at(1 - beta, t) * x + _at(beta.sqrt(), t) * eps,
        "The two factors have changed places.": lambda x, t, eps, beta: _at(beta.sqrt(), t) * x + _at((1 - beta).sqrt(), t) * eps,
        "You used $\\bar\\alpha_t$, which belongs to the jump from $x_0$; one step has $1-\\beta_t$.": lambda x, t, eps, beta: labkit_jump(x, t, eps, beta),
    },
    task="`q_step` mixes $x_{t-1}$ with the noise `eps`, equation (1): $\\sqrt{1-\\beta_t}\\,x_{t-1} + \\sqrt{\\beta_t}\\,\\epsilon$.",
    praise="a variance of one stays one: $(1-\\beta_t) + \\beta_t = 1$.",
    cases=_images(SCHEDULE.beta * 20),
)


def labkit_jump(x: Tensor, t: Tensor, eps: Tensor, beta: Tensor) -> Tensor:
    table = torch.cumprod(1 - beta, 0)
    return _at(table.sqrt(), t) * x + _at((1 - table).sqrt(), t) * eps


q_sample = Check(
    "q_sample",
    reference=lambda x0, t, eps, table: labkit_q_sample(x0, t, eps, SCHEDULE),
    wrong={
        "You used $\\alpha_t$, the equation has $\\bar\\alpha_t$: that is one small step, not the jump.": lambda x0, t, eps, table: (
            _at(_alpha(table).sqrt(), t) * x0 + _at((1 - _alpha(table)).sqrt(), t) * eps),
        "The roots are missing: $\\bar\\alpha_t$ and $1-\\bar\\alpha_t$ are variances, pictures are multiplied by their roots.": lambda x0, t, eps, table: (
            _at(table, t) * x0 + _at(1 - table, t) * eps),
        "The root over $1-\\bar\\alpha_t$ is missing: that is a variance, the noise is multiplied by its root.": lambda x0, t, eps, table: (
            _at(table.sqrt(), t) * x0 + _at(1 - table, t) * eps),
        "The root over $\\bar\\alpha_t$ is missing.": lambda x0, t, eps, table: _at(table, t) * x0 + _at((1 - table).sqrt(), t) * eps,
        "The noise is multiplied by $1-\\sqrt{\\bar\\alpha_t}$; the equation has $\\sqrt{1-\\bar\\alpha_t}$, so that the *squares* sum to one.": (
            lambda x0, t, eps, table: _at(table.sqrt(), t) * x0 + _at(1 - table.sqrt(), t) * eps),
        "Signal and noise have changed places.": lambda x0, t, eps, table: _at((1 - table).sqrt(), t) * x0 + _at(table.sqrt(), t) * eps,
        "The picture is not scaled down by $\\sqrt{\\bar\\alpha_t}$; that is another parametrisation, with a variance that explodes.": (
            lambda x0, t, eps, table: x0 + _at((1 - table).sqrt(), t) * eps),
        "The noise is subtracted.": lambda x0, t, eps, table: _at(table.sqrt(), t) * x0 - _at((1 - table).sqrt(), t) * eps,
        "You read the table at t - 1. Papers count from 1, code from 0: `alpha_bar[t]` is right.": lambda x0, t, eps, table: (
            _at(table.sqrt(), (t - 1).clamp(min=0)) * x0 + _at((1 - table).sqrt(), (t - 1).clamp(min=0)) * eps),
        "All images got the t of the first one: `t` has one entry for each.": lambda x0, t, eps, table: (
            table[t[0]].sqrt() * x0 + (1 - table[t[0]]).sqrt() * eps),
    },
    task="`q_sample` jumps from $x_0$ to $x_t$, equation (2). `t` has one entry for each image: `alpha_bar[t].view(-1, 1, 1, 1)` multiplies images.",
    praise="one line, and any t can be reached without the steps between.",
    cases=_images(SCHEDULE.alpha_bar),
)

snr = Check(
    "snr",
    reference=lambda table: table / (1 - table),
    wrong={
        "That is $1/\\mathrm{SNR}_t = \\sigma_t^2$: noise over signal.": lambda table: (1 - table) / table,
        "That is the ratio of the amplitudes; the SNR is a ratio of powers, without roots.": lambda table: (table / (1 - table)).sqrt(),
        "That is $\\sigma_t$, the size of the noise beside a signal of size one; the SNR is $1/\\sigma_t^2$.": lambda table: ((1 - table) / table).sqrt(),
        "The logarithm comes later, in the figure; the SNR itself has none.": lambda table: (table / (1 - table)).log(),
        "That is in decibels; the SNR itself is the plain ratio.": lambda table: 10 * (table / (1 - table)).log10(),
        "That is the signal's power alone: divide it by the noise's, $1-\\bar\\alpha_t$.": lambda table: table.clone(),
    },
    task="`snr` is given the table of $\\bar\\alpha_t$ and returns the signal's power over the noise's, equation (4), for every t.",
    praise="this one number says how hard the network's task is at t; schedules differ in nothing else.",
    cases=lambda: [(SCHEDULE.alpha_bar.clone(),)],
)

x0_from_eps = Check(
    "x0_from_eps",
    reference=lambda x_t, t, eps, table: labkit_x0_from_eps(x_t, t, eps, SCHEDULE),
    wrong={
        "The division by $\\sqrt{\\bar\\alpha_t}$ is missing.": lambda x_t, t, eps, table: x_t - _at((1 - table).sqrt(), t) * eps,
        "You divided by $\\bar\\alpha_t$; equation (2) has its root.": lambda x_t, t, eps, table: (x_t - _at((1 - table).sqrt(), t) * eps) / _at(table, t),
        "The noise is taken off at full size; in $x_t$ it is multiplied by $\\sqrt{1-\\bar\\alpha_t}$.": lambda x_t, t, eps, table: (x_t - eps) / _at(table.sqrt(), t),
        "Only $x_t$ is divided; the division is of the whole difference. A bracket is missing.": lambda x_t, t, eps, table: (
            x_t / _at(table.sqrt(), t) - _at((1 - table).sqrt(), t) * eps),
        "The noise is added; it has to come off.": lambda x_t, t, eps, table: (x_t + _at((1 - table).sqrt(), t) * eps) / _at(table.sqrt(), t),
        "The root over $1-\\bar\\alpha_t$ is missing.": lambda x_t, t, eps, table: (x_t - _at(1 - table, t) * eps) / _at(table.sqrt(), t),
        "You multiplied by $\\sqrt{\\bar\\alpha_t}$ where a division undoes it.": lambda x_t, t, eps, table: (
            (x_t - _at((1 - table).sqrt(), t) * eps) * _at(table.sqrt(), t)),
    },
    task="`x0_from_eps` solves equation (2) for $x_0$.",
    praise="so whoever knows the noise knows the picture, and guessing one is guessing the other.",
    cases=_images(SCHEDULE.alpha_bar),
)
