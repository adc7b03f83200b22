"""Exercises of notebook 02: the best denoiser of a mixture, what the network is told, its loss, its target, the weights of its errors.

    r_k = softmax_k( -|x_t - sqrt(a) mu_k|^2 / 2v ),    v = a s^2 + 1 - a,    a = alpha_bar_t        Bayes' rule (labkit.mixture)
    gamma(t) = [cos(t w_0), ..., sin(t w_0), ...],    w_i = 10000^(-i / (d/2))                       Ho et al. 2020, app. B
    L = mean || eps - eps_theta(x_t, t) ||^2                                                         ibid., eq. 14
    v = sqrt(a) eps - sqrt(1 - a) x0                                                                 Salimans & Ho 2022, app. D
    w_t = min(SNR_t, gamma) / SNR_t                                                                  Hang et al. 2023, sec. 3.4
"""

import math

import torch
from torch import Tensor

from labkit.checks.check import Check, seeded
from labkit.mixture import Mixture, responsibilities as labkit_responsibilities
from labkit.models.layers import timestep_embedding as labkit_embedding
from labkit.schedule import Schedule, q_sample, v_from

SCHEDULE = Schedule()
TIMES = ((0, 20), (300, 999), (500, 650))


def _away(x_t: Tensor, means: Tensor, scale: float) -> Tensor:
    """Squared distances to the scaled means, (B, K)."""
    return (x_t[:, None] - scale * means).square().sum(-1)


def _shares(scale, variance, sign: float = -1.0, two: float = 2.0, dim: int = 1):
    """The answer with other letters in it; `scale` and `variance` are functions of (a, std)."""
    return lambda x_t, a, means, std: torch.softmax(sign * _away(x_t, means, scale(a)) / (two * variance(a, std)), dim=dim)


def _v(a: float, std: float) -> float:
    return a * std**2 + 1 - a


responsibilities = Check(
    "responsibilities",
    reference=lambda x_t, a, means, std: labkit_responsibilities(x_t, a, Mixture(means, std)),
    wrong={
        "The means are multiplied by $\\bar\\alpha_t$; in $x_t$ they stand at $\\sqrt{\\bar\\alpha_t}\\,\\mu_k$.": _shares(lambda a: a, _v),
        "The means are not scaled: in $x_t$ they stand at $\\sqrt{\\bar\\alpha_t}\\,\\mu_k$.": _shares(lambda a: 1.0, _v),
        "The variance lacks what the Gaussians have of their own: $v=\\bar\\alpha_t s^2+1-\\bar\\alpha_t$.": _shares(math.sqrt, lambda a, s: 1 - a),
        "The Gaussians' own variance shrinks with the picture: $\\bar\\alpha_t s^2$, not $s^2$.": _shares(math.sqrt, lambda a, s: s**2 + 1 - a),
        "The spread $s$ is not squared in the variance.": _shares(math.sqrt, lambda a, s: a * s + 1 - a),
        "The 2 in $2v$ is missing.": _shares(math.sqrt, _v, two=1.0),
        "You divided by the standard deviation $\\sqrt v$; a Gaussian's exponent has the variance.": _shares(math.sqrt, lambda a, s: _v(a, s) ** 0.5),
        "The sign: what is *far* gets the larger share.": _shares(math.sqrt, _v, sign=1.0),
        "The shares sum to one over the points; they have to over the Gaussians, `dim=1`.": _shares(math.sqrt, _v, dim=0),
        "These are densities, not shares: they do not sum to one. `softmax` divides by their sum.": lambda x_t, a, means, std: (
            torch.exp(-_away(x_t, means, math.sqrt(a)) / (2 * _v(a, std)))),
        "The squared distance has no root.": lambda x_t, a, means, std: torch.softmax(-_away(x_t, means, math.sqrt(a)).sqrt() / (2 * _v(a, std)), 1),
    },
    task="`responsibilities` says for each point $x_t$, (B, 2), how probably it came from each of the K Gaussians, (B, K), equation (2).",
    praise="this softmax over possible origins is all that the best denoiser knows, and it looks like attention for a reason.",
    cases=lambda: [(seeded(6, 2, seed=n), a, seeded(3, 2, seed=20 + n), std) for n, (a, std) in enumerate(((0.9, 0.3), (0.3, 0.5), (0.05, 0.25)))],
)


def _embedding(t: Tensor, dim: int, base: float = 10_000.0, last: int = 0, order=("cos", "sin")) -> Tensor:
    half = dim // 2
    w = torch.exp(-math.log(base) * torch.arange(half, dtype=torch.float64) / (half - last))
    angle = t.double()[:, None] * w
    return torch.cat([getattr(angle, f)() for f in order], dim=-1)


timestep_embedding = Check(
    "timestep_embedding",
    reference=labkit_embedding,
    wrong={
        "Sines come first in your vector; here, as in Stable Diffusion, cosines do.": lambda t, dim: _embedding(t, dim, order=("sin", "cos")),
        "The exponent is divided by d/2 - 1, as in DDPM's own code; Stable Diffusion's divides by d/2.": lambda t, dim: _embedding(t, dim, last=1),
        "Cosine and sine of each frequency stand side by side; here all cosines come first.": lambda t, dim: (
            torch.stack(_embedding(t, dim).chunk(2, dim=1), dim=-1).flatten(1)),
        "The frequencies rise with i: a minus is missing in the exponent.": lambda t, dim: _embedding(t, dim, base=1e-4),
        "The exponent is -i/d where it should be -i/(d/2), so your slowest wave is a hundred times too fast.": lambda t, dim: _embedding(t, dim, base=100.0),
        "Your base is 1,000, the number of timesteps; the formula's is 10,000.": lambda t, dim: _embedding(t, dim, base=1000.0),
        "All of it is cosines.": lambda t, dim: _embedding(t, dim, order=("cos", "cos")),
    },
    task="`timestep_embedding` turns timesteps (B,) into (B, dim) numbers, equation (3): dim/2 cosines, then the dim/2 sines of the same angles.",
    praise="fast waves tell neighbouring timesteps apart, slow ones early from late.",
    cases=lambda: [(torch.tensor([0, 1, 500, 999]), 8), (torch.tensor([3]), 32)],
)


def _network(x_t: Tensor, t: Tensor) -> Tensor:
    """Something that depends on all that it is given."""
    return (x_t * (1 + t.view(-1, 1).double() / 1000)).sin() + 0.1


def _loss(of=lambda error: error.square().mean(), target=lambda x0, eps, x_t: eps, shown=lambda x0, x_t: x_t, told=lambda t: t):
    def loss(network, x0, t, eps, table):
        a = table[t].view(-1, 1)
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
        return of(network(shown(x0, x_t), told(t)) - target(x0, eps, x_t))

    return loss


def _alpha_loss(network, x0, t, eps, table):
    return _loss()(network, x0, t, eps, torch.cat([table[:1], table[1:] / table[:-1]]))


noise_loss = Check(
    "noise_loss",
    reference=lambda network, x0, t, eps, table: (network(q_sample(x0, t, eps, SCHEDULE), t) - eps).square().mean(),
    wrong={
        "The target is the clean $x_0$; this loss is about the noise, `eps`.": _loss(target=lambda x0, eps, x_t: x0),
        "The target is $x_t$, which the network is shown: it would learn to copy.": _loss(target=lambda x0, eps, x_t: x_t),
        "The network is shown the clean $x_0$; it has to find the noise in $x_t$.": _loss(shown=lambda x0, x_t: x0),
        "The network is told t = 0 for all of them; it has to know how much noise to expect.": _loss(told=lambda t: 0 * t),
        "That is the mean *absolute* error; its best answer is the median, and the theory needs the mean.": _loss(of=lambda error: error.abs().mean()),
        "You summed the squared errors; the mean does not depend on the batch's size.": _loss(of=lambda error: error.square().sum()),
        "There is a root over the mean square; the loss has none.": _loss(of=lambda error: error.square().mean().sqrt()),
        "You noised with $\\alpha_t$; $x_t$ is made with $\\bar\\alpha_t$.": _alpha_loss,
        "The errors are averaged before they are squared, so they cancel.": _loss(of=lambda error: error.mean().square()),
        "One loss for each example is good to have; training needs their mean, one number.": _loss(of=lambda error: error.square().mean(1)),
    },
    task="`noise_loss` makes $x_t$ of `x0` and `eps`, asks `network(x_t, t)` for the noise, and returns the mean squared error, equation (4).",
    praise="that is DDPM's whole training objective.",
    cases=lambda: [(_network, seeded(2, 2, seed=n), torch.tensor(t), seeded(2, 2, seed=30 + n), SCHEDULE.alpha_bar) for n, t in enumerate(TIMES)],
)


def _roots(t: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    a = table[t].view(-1, 1)
    return a.sqrt(), (1 - a).sqrt()


def _mix(weights):
    """signal * x0 + noise * eps with weights = function of (sqrt(a), sqrt(1 - a))."""
    def value(x0, t, eps, table):
        for_x0, for_eps = weights(*_roots(t, table))
        return for_x0 * x0 + for_eps * eps

    return value


v_target = Check(
    "v_target",
    reference=lambda x0, t, eps, table: v_from(x0, t, eps, SCHEDULE),
    wrong={
        "That is $-v$: the noise has the plus, the picture the minus.": _mix(lambda a, s: (s, -a)),
        "With a plus between them and these factors it is no velocity; the picture is subtracted.": _mix(lambda a, s: (s, a)),
        "That is $x_t$ itself.": _mix(lambda a, s: (a, s)),
        "The factors have changed places: $\\epsilon$ has $\\sqrt{\\bar\\alpha_t}$, $x_0$ has $\\sqrt{1-\\bar\\alpha_t}$.": _mix(lambda a, s: (-a, s)),
        "The roots are missing.": _mix(lambda a, s: (-(s**2), a**2)),
        "That is $\\epsilon - x_0$, the velocity of rectified flow (Liu et al. 2022); here the factors follow the schedule.": _mix(lambda a, s: (-1, 1)),
    },
    task="`v_target` is what a v-predicting network is trained to say, equation (5), of `x0` and `eps`.",
    praise="at the noisy end it asks for the picture, at the clean end for the noise: never for what is already there to see.",
    cases=lambda: [(seeded(2, 2, seed=n), torch.tensor(t), seeded(2, 2, seed=40 + n), SCHEDULE.alpha_bar) for n, t in enumerate(TIMES)],
)

min_snr = Check(
    "min_snr",
    reference=lambda snr, gamma: snr.clamp(max=gamma) / snr,
    wrong={
        "You clamped the wrong way, `min` for `max`: the *small* SNRs are raised. A widely used repository had this bug until 2026.": (
            lambda snr, gamma: snr.clamp(min=gamma) / snr),
        "That is the weight of an error of $x_0$; for an error of $\\epsilon$ it is divided by the SNR.": lambda snr, gamma: snr.clamp(max=gamma),
        "That is the weight for networks that predict v: they divide by SNR + 1.": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
        "The minimum is missing: where the SNR is below $\\gamma$ the weight is 1.": lambda snr, gamma: gamma / snr,
        "The fraction is upside down.": lambda snr, gamma: snr / snr.clamp(max=gamma),
    },
    task="`min_snr` is given the table of SNRs and the number `gamma` and returns the weights of the squared errors of $\\epsilon$, equation (6).",
    praise="one at the noisy end, falling as $\\gamma/\\mathrm{SNR}$ at the clean end.",
    cases=lambda: [(SCHEDULE.snr.clone(), 5.0), (torch.tensor([100.0, 5.0, 1.0, 0.01], dtype=torch.float64), 5.0), (SCHEDULE.snr.clone(), 1.0)],
)
