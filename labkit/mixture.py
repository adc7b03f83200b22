"""A mixture of Gaussians, for which the best possible denoiser is known: what a network is compared with when truth is wanted.

    q(x0)      = sum_k w_k N(mu_k, s^2 I)
    q(x_t)     = sum_k w_k N(sqrt(a) mu_k, v I),    v = a s^2 + 1 - a,    a = alpha_bar_t
    r_k(x_t)   = softmax_k( log w_k - |x_t - sqrt(a) mu_k|^2 / 2v )                      how probably x_t came from k
    E[eps|x_t] = sqrt(1 - a) sum_k r_k (x_t - sqrt(a) mu_k) / v  =  -sqrt(1 - a) grad log q(x_t)

Bayes' rule, and Gaussians under linear maps; the last equality is Tweedie's formula (Robbins 1956, Efron 2011). No network trained
with the squared error can do better, and the error that is left over, E |eps - E[eps|x_t]|^2, is not zero.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from labkit.errors import LabkitError
from labkit.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Mixture:
    """`means` (K, D), one spread `std` for all, and `weights` (K,) that sum to one (None: all alike)."""

    means: Tensor
    std: float
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        weights = self.shares
        if self.means.ndim != 2 or weights.shape != self.means.shape[:1] or not self.std >= 0:
            raise LabkitError(f"A mixture has means (K, D), weights (K,) and a spread of 0 or more; these are {tuple(self.means.shape)}, "
                              f"{tuple(weights.shape)} and {self.std}.")
        if bool((weights <= 0).any()) or abs(float(weights.sum()) - 1) > 1e-6:
            raise LabkitError(f"The weights are {weights.tolist()}: they must be positive and sum to one.")

    @property
    def shares(self) -> Tensor:
        """The weights (K,), equal ones where none were given."""
        K = len(self.means)
        return torch.full((K,), 1 / K, dtype=self.means.dtype) if self.weights is None else self.weights

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n points x0, (n, D)."""
        which = torch.multinomial(self.shares.double(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[which] + self.std * noise  # (n, D)


def responsibilities(x_t: Tensor, alpha_bar: float, mixture: Mixture) -> Tensor:
    """r_k: how probably each x_t (B, D) came from each Gaussian, (B, K)."""
    away = x_t[:, None] - sqrt(alpha_bar) * mixture.means.to(x_t)  # (B, K, D)
    v = alpha_bar * mixture.std**2 + 1 - alpha_bar
    return torch.softmax(mixture.shares.to(x_t).log() - away.square().sum(-1) / (2 * v), dim=-1)  # (B, K)


def best_eps(x_t: Tensor, alpha_bar: float, mixture: Mixture) -> Tensor:
    """E[eps | x_t], (B, D): the answer that the squared error rewards most."""
    away = x_t[:, None] - sqrt(alpha_bar) * mixture.means.to(x_t)  # (B, K, D)
    v = alpha_bar * mixture.std**2 + 1 - alpha_bar
    return sqrt(1 - alpha_bar) / v * (responsibilities(x_t, alpha_bar, mixture)[..., None] * away).sum(1)  # (B, D)


def exact_denoiser(mixture: Mixture, schedule: Schedule):
    """eps = denoise(x_t, t) with the best eps there is: what samplers take in place of a network; x_t is (B, D)."""
    return lambda x_t, t: best_eps(x_t, schedule.alpha_bar_at(t), mixture)
