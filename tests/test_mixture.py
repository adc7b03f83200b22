"""mixture: the best denoiser is the score, minus the noise's mean given x_t, and nothing does better; known wrong twins do not pass for it."""

from math import sqrt

import pytest
import torch

from labkit.errors import LabkitError
from labkit.mixture import Mixture, best_eps, exact_denoiser, responsibilities
from labkit.samplers import ddim
from labkit.schedule import Schedule, Timestep

F64 = torch.float64
M = Mixture(torch.tensor([[-1.5, 0.3], [0.4, 1.2], [1.3, -0.8]], dtype=F64), 0.3, torch.tensor([0.2, 0.5, 0.3], dtype=F64))
LEVELS = (0.999, 0.6, 0.1, 0.005)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_q(x, a):
    v = a * M.std**2 + 1 - a
    away = (x[:, None] - sqrt(a) * M.means).square().sum(-1)
    return torch.logsumexp(M.weights.log() - away / (2 * v), -1)


@pytest.mark.parametrize("a", LEVELS)
def test_it_is_minus_the_score_times_the_noise_level(a):
    x = torch.randn(7, 2, generator=generator(), dtype=F64, requires_grad=True)
    score = torch.autograd.grad(log_q(x, a).sum(), x)[0]
    eps = best_eps(x.detach(), a, M)
    assert torch.allclose(eps, -sqrt(1 - a) * score, atol=1e-10)
    assert not torch.allclose(eps, -score, atol=1e-3)  # the twin without the noise level


@pytest.mark.parametrize("a", LEVELS)
def test_nothing_guesses_the_noise_better(a):
    """Its residual is orthogonal to every function of x_t: any change to it, here along three, makes the error larger."""
    g = generator(1)
    x0, eps = M.sample(200_000, g), torch.randn(200_000, 2, generator=g, dtype=F64)
    x_t = sqrt(a) * x0 + sqrt(1 - a) * eps
    best = best_eps(x_t, a, M)
    left = (eps - best).square().mean()
    for other in (best + 0.1, best + 0.1 * x_t, best * 0.9, best + 0.1 * x_t.sin()):
        assert (eps - other).square().mean() > left
    assert 0.0005 < left < 1


def test_responsibilities_are_shares_and_know_the_weights_where_nothing_is_left_to_see():
    x = torch.randn(5, 2, generator=generator(), dtype=F64)
    for a in LEVELS:
        assert torch.allclose(responsibilities(x, a, M).sum(1), torch.ones(5, dtype=F64))
    assert torch.allclose(responsibilities(x, 1e-9, M), M.weights.expand(5, 3), atol=1e-3)
    assert torch.allclose(responsibilities(M.means, 0.9999, M), torch.eye(3, dtype=F64), atol=1e-3)


def test_a_sampler_with_it_draws_the_mixture():
    x = torch.randn(4000, 2, generator=generator(2), dtype=F64)
    s = Schedule()
    for step in ddim(exact_denoiser(M, s), x, s, 50):
        pass
    nearest = torch.cdist(step.x, M.means).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / 4000
    assert torch.allclose(shares.double(), M.weights, atol=0.04)
    spread = (step.x - M.means[nearest]).std()
    assert abs(spread - M.std) < 0.06


def test_it_goes_by_the_level_that_a_timestep_carries():
    x, s = torch.randn(3, 2, generator=generator(), dtype=F64), Schedule()
    assert torch.equal(exact_denoiser(M, s)(x, Timestep(3.5, 0.4)), best_eps(x, 0.4, M))


def test_samples_have_the_mixtures_mean_and_come_again():
    x = M.sample(50_000, generator(3))
    assert torch.allclose(x.mean(0), M.weights @ M.means, atol=0.02) and torch.equal(x, M.sample(50_000, generator(3)))
    alike = Mixture(M.means, 0.0)
    assert torch.allclose(alike.shares, torch.full((3,), 1 / 3, dtype=F64)) and alike.sample(5, generator()).shape == (5, 2)


@pytest.mark.parametrize("args", [(torch.zeros(3), 0.1), (torch.zeros(3, 2), -0.1), (torch.zeros(3, 2), 0.1, torch.ones(2) / 2),
                                  (torch.zeros(2, 2), 0.1, torch.ones(2)), (torch.zeros(2, 2), 0.1, torch.tensor([1.5, -0.5]))])
def test_what_is_no_mixture_is_refused(args):
    with pytest.raises(LabkitError):
        Mixture(*args)
