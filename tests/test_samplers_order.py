"""The order of each sampler, on a mixture of Gaussians whose denoiser is known in closed form; and one sampler in three notations.

Halving the step must divide the error by 2^order. Samplers that step through Karras' sigmas all end at the table's lowest
sigma, whatever the number of steps, and the mixture's denoiser goes by the exact level a Timestep carries, so no rounding
of timesteps gets in the way; what is compared is the latent there, before the last step to sigma = 0. DDIM has integer
timesteps: of 1001 it visits 0, k, 2k, ... 1000, for k that divide 1000.

The corrector lifts UniPC-p to order p + 1 (Zhao et al. 2023, sec. 3.1): UniPC-2 is of order 3, its predictor alone of 2.
"""

import sys
from math import log, sqrt

import pytest
import torch

from labkit.samplers import ddim, dpm_solver, euler, heun, unipc
from labkit.samplers.sigmas import karras_sigmas, sigma_levels, signal
from labkit.schedule import Schedule, ScheduleConfig, Timestep

F64 = torch.float64
MEANS = torch.tensor([[-1.5, 0.3], [0.4, 1.2], [1.3, -0.8]], dtype=F64)  # (3, 2), each with weight 1/3
D = 0.5  # and this spread


def eps_of(x, a):
    """E[eps | x_t = x] for x0 of the mixture: x (B, 2), a = alpha_bar; the softmax of who it was, then each one's own answer."""
    away = x[:, None] - sqrt(a) * MEANS  # (B, 3, 2)
    var = a * D**2 + 1 - a
    share = torch.softmax(-away.square().sum(-1) / (2 * var), dim=-1)  # (B, 3)
    return sqrt(1 - a) * (share[..., None] * away).sum(1) / var


def denoiser(s):
    return lambda x, t: eps_of(x, s.alpha_bar_at(t))


def start():
    return torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64)


def exact(s, sigmas):
    """The probability-flow ODE from x_T = start() at sigmas[0] to sigmas[-1], by classical Runge-Kutta in x_bar: (8, 2)."""
    slope = lambda x_bar, sigma: eps_of(x_bar / sqrt(1 + sigma**2), 1 / (1 + sigma**2))  # noqa: E731
    x = start() * sqrt(1 + sigmas[0] ** 2)
    for sigma, after in zip(sigmas, sigmas[1:]):
        h = after - sigma
        k1 = slope(x, sigma)
        k2 = slope(x + h / 2 * k1, sigma + h / 2)
        k3 = slope(x + h / 2 * k2, sigma + h / 2)
        k4 = slope(x + h * k3, after)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x / sqrt(1 + sigmas[-1] ** 2)


def slope_of(errors, steps):
    """The order that the errors show: the least-squares slope of log error over log step size."""
    x, y = torch.tensor([-log(n) for n in steps], dtype=F64), torch.tensor([log(e) for e in errors], dtype=F64)
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def errors_at_the_lowest_sigma(run, s, steps, truth):
    return [(list(run(denoiser(s), start(), s, n + 1))[-2].x - truth).square().mean().sqrt().item() for n in steps]


KARRAS = {  # sampler, its order, and how much the measured slope may differ
    "euler": (lambda *a: euler(*a, karras=True), 1, 0.15),
    "dpm_solver 1": (lambda *a: dpm_solver(*a, order=1, karras=True), 1, 0.15),
    "heun": (lambda *a: heun(*a, karras=True), 2, 0.25),
    "dpm_solver 2M": (lambda *a: dpm_solver(*a, karras=True), 2, 0.25),
    "unipc 1": (lambda *a: unipc(*a, order=1, karras=True), 2, 0.25),
    "unipc 2": (lambda *a: unipc(*a, karras=True), 3, 0.25),
}


@pytest.fixture(scope="module")
def reference():
    """A schedule of linspace spacing, so that Karras' sigmas run over all of the table, and its solution to 1e-10."""
    s = Schedule(ScheduleConfig(timestep_spacing="linspace"))
    ends = s.sigma[0].item(), s.sigma[-1].item()
    coarse, truth = (exact(s, karras_sigmas(*ends, n)) for n in (401, 801))
    assert (coarse - truth).abs().max() < 1e-8
    return s, truth


@pytest.mark.parametrize("name", KARRAS)
def test_orders(name, reference):
    (run, order, margin), steps = KARRAS[name], (40, 80, 160)
    errors = errors_at_the_lowest_sigma(run, *reference[:1], steps, reference[1])
    assert abs(slope_of(errors, steps) - order) < margin, errors
    assert errors[-1] < 0.02  # and it is the right solution that they approach


def test_order_of_ddim():
    s, steps = Schedule(ScheduleConfig(1001, timestep_spacing="linspace")), (50, 100, 200)
    truth = exact(s, karras_sigmas(s.sigma[0].item(), s.sigma[-1].item(), 801))
    errors = errors_at_the_lowest_sigma(ddim, s, steps, truth)
    assert abs(slope_of(errors, steps) - 1) < 0.15, errors


def twin(mistake):
    """2M and Heun written again, in sigma, each with one mistake that leaves it a sampler, of a lower order."""

    def run(denoise, x, s, steps):
        timesteps, sigmas = sigma_levels(s, steps, karras=True)
        x_bar, before, last_h = x / signal(sigmas[0]), None, None
        for i, (t, sigma, after) in enumerate(zip(timesteps[:-1], sigmas, sigmas[1:])):
            eps = denoise(x_bar * signal(sigma), t)
            x0, h = x_bar - sigma * eps, log(sigma / after)
            if "heun" in mistake:
                there = x_bar + (after - sigma) * eps
                told = Timestep(t, signal(sigma) ** 2) if mistake == "heun, told the old timestep twice" else timesteps[i + 1]
                second = denoise(there * signal(after), told)
                x_bar = x_bar + (after - sigma) * (second if mistake == "heun, the second slope alone" else (eps + second) / 2)
            else:
                D = x0 if before is None else x0 + (x0 - before) * h / last_h * (1 if mistake == "2M, without its half" else 0.5)
                x_bar = after / sigma * x_bar + (1 - after / sigma) * D
            before, last_h = x0, h
        return x_bar * signal(sigmas[-2])

    return run


@pytest.mark.parametrize(
    "mistake, order",
    [("2M", 2), ("2M, without its half", 1), ("heun", 2), ("heun, the second slope alone", 1), ("heun, told the old timestep twice", 1)],
)
def test_wrong_twins_lose_their_order(mistake, order, reference):
    s, truth = reference
    steps = (40, 80, 160)
    errors = [(twin(mistake)(denoiser(s), start(), s, n + 1) - truth).square().mean().sqrt().item() for n in steps]
    assert abs(slope_of(errors, steps) - order) < 0.35, errors


def test_unipc_without_its_corrector_is_of_a_lower_order(reference, monkeypatch):
    module, steps = sys.modules[unipc.__module__], (40, 80, 160)
    update = module._update
    predicted = []

    def predict_only(*given, arrived=None):
        if arrived is None:
            predicted.append(update(*given))
        return predicted[-1]

    monkeypatch.setattr(module, "_update", predict_only)
    errors = errors_at_the_lowest_sigma(KARRAS["unipc 2"][0], *reference[:1], steps, reference[1])
    assert abs(slope_of(errors, steps) - 2) < 0.25, errors


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_ddim_euler_and_dpm_solver_1_are_one_sampler_in_three_notations(steps):
    """The same formula in x_t and eps, in x_bar and sigma, and in x_0 and lambda; trailing steps, which all three share."""
    s = Schedule(ScheduleConfig(timestep_spacing="trailing", set_alpha_to_one=True))
    runs = [list(run(denoiser(s), start(), s, steps)) for run in (ddim, euler, lambda *a: dpm_solver(*a, order=1))]
    for one, two, three in zip(*runs, strict=True):
        assert one.t == two.t == three.t
        for field in ("x", "x0", "eps"):
            a, b, c = (getattr(step, field) for step in (one, two, three))
            assert (a - b).abs().max() < 1e-10 and (a - c).abs().max() < 1e-10
    if steps > 2:
        for other in (heun, dpm_solver, unipc):
            assert (list(other(denoiser(s), start(), s, steps))[-1].x - runs[0][-1].x).abs().max() > 1e-4
