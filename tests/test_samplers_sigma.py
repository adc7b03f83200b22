"""Euler, Heun, DPM-Solver++ and UniPC equal diffusers' schedulers of those names, call by call over whole trajectories.

diffusers computes these in float32 whatever it is given: its sigmas are float32, Euler and DPM-Solver++ cast the latent too.
`in_float64` gives its modules a torch and a numpy whose float32 is float64; so run, it and labkit agree to 1e-9 (measured:
below). As it is, in float32, they agree to what float32 carries through 50 steps.
"""

import copy
import pickle
from math import sqrt

import numpy
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.schedulers import (
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_heun_discrete,
    scheduling_unipc_multistep,
)
from tiny import UNET, strong

from labkit.device import Noise
from labkit.errors import LabkitError
from labkit.models.layers import timestep_embedding
from labkit.models.unet import UNet
from labkit.samplers import SAMPLERS, dpm_solver, euler, euler_ancestral, first_latent, heun, unipc
from labkit.samplers.sigmas import karras_sigmas, lambda_levels, sigma_at, sigma_levels, timestep_at
from labkit.schedule import SPACINGS, Schedule, ScheduleConfig, Timestep, eps_from_v, eps_prediction, q_sample, v_from

F64 = torch.float64
CASES = {  # name: our sampler, their class, their options, does it think in sigma
    "euler": (euler, EulerDiscreteScheduler, {}, True),
    "euler, karras": (lambda *a, **k: euler(*a, karras=True, **k), EulerDiscreteScheduler, {"use_karras_sigmas": True}, True),
    "euler ancestral": (euler_ancestral, EulerAncestralDiscreteScheduler, {}, True),
    "heun": (heun, HeunDiscreteScheduler, {}, True),
    "heun, karras": (lambda *a, **k: heun(*a, karras=True, **k), HeunDiscreteScheduler, {"use_karras_sigmas": True}, True),
    "dpm 1": (lambda *a, **k: dpm_solver(*a, order=1, **k), DPMSolverMultistepScheduler, {"solver_order": 1}, False),
    "dpm 2M": (dpm_solver, DPMSolverMultistepScheduler, {}, False),
    "dpm 2M, karras": (SAMPLERS["dpm_solver_karras"], DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, False),
    "unipc 1": (lambda *a, **k: unipc(*a, order=1, **k), UniPCMultistepScheduler, {"solver_order": 1}, False),
    "unipc 2": (unipc, UniPCMultistepScheduler, {}, False),
    "unipc 3": (lambda *a, **k: unipc(*a, order=3, **k), UniPCMultistepScheduler, {"solver_order": 3}, False),
    "unipc 2, karras": (lambda *a, **k: unipc(*a, karras=True, **k), UniPCMultistepScheduler, {"use_karras_sigmas": True}, False),
}
MODULES = {
    EulerDiscreteScheduler: scheduling_euler_discrete,
    EulerAncestralDiscreteScheduler: scheduling_euler_ancestral_discrete,
    HeunDiscreteScheduler: scheduling_heun_discrete,
    DPMSolverMultistepScheduler: scheduling_dpmsolver_multistep,
    UniPCMultistepScheduler: scheduling_unipc_multistep,
}


class Double:
    """A library whose float32 is float64."""

    def __init__(self, library):
        self.library, self.float32 = library, library.float64

    def __getattr__(self, name):
        return getattr(self.library, name)


@pytest.fixture
def in_float64(monkeypatch):
    for module in MODULES.values():
        monkeypatch.setattr(module, "torch", Double(torch))
        monkeypatch.setattr(module, "np", Double(numpy))


def curved(x, t, c=None):
    return torch.sin(2 * x + 0.003 * float(t)) * 0.7 + 0.3 * x


def start(dtype=F64):
    return Noise([0, 1], (4, 3, 2)).draw().to(dtype)


def scheduler(case, schedule, steps):
    cls, options = CASES[case][1:3]
    c = schedule.config
    if c.rescale_betas_zero_snr:
        options = {**options, "rescale_betas_zero_snr": True}
    theirs = cls(
        num_train_timesteps=c.num_train_timesteps, beta_start=c.beta_start, beta_end=c.beta_end,
        beta_schedule=c.beta_schedule, prediction_type=c.prediction_type, timestep_spacing=c.timestep_spacing,
        steps_offset=c.steps_offset, **options,
    )  # fmt: skip
    theirs.set_timesteps(steps)
    theirs.set_begin_index(0)  # else it starts at the second where rounding makes the first two timesteps one
    return theirs


def their_way(case, schedule, steps, x, generator=None, told=None):
    """diffusers' trajectory from the VP latent x, in VP: what the network would see next, the last one at sigma = 0."""
    theirs, latents = scheduler(case, schedule, steps), []
    vp = lambda x, sigma: x / (sigma**2 + 1) ** 0.5  # noqa: E731
    x = x * (theirs.sigmas[0] ** 2 + 1) ** 0.5 if CASES[case][3] else x
    options = {"generator": generator} if generator is not None else {}
    for i, t in enumerate(theirs.timesteps):
        seen = theirs.scale_model_input(x, t)
        told is not None and told.append(t.item())
        x = theirs.step(curved(seen, t), t, x, **options).prev_sample
        latents.append(vp(x, theirs.sigmas[i + 1]) if CASES[case][3] else x)
    if "heun" in case:
        latents = latents[1:-1:2] + latents[-1:]  # after the second call of each step, and the last step's only one
    return latents


def our_way(case, schedule, steps, x, noise=None, told=None):
    model = eps_prediction(curved, schedule)

    def denoise(x, t):
        told is not None and told.append(float(t))
        return model(x, t, None)

    return list(CASES[case][0](denoise, x, schedule, steps, noise=noise))


def apart(ours, theirs):
    assert len(ours) == len(theirs)
    return max(((a.x - b).abs().max() / (1 + b.abs().max())).item() for a, b in zip(ours, theirs))


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("case", CASES)
def test_whole_trajectories_equal_diffusers(case, kind, spacing, steps, in_float64):
    s = Schedule(ScheduleConfig(prediction_type=kind, timestep_spacing=spacing))
    told, theirs_told = [], []
    draws = torch.Generator().manual_seed(5)
    noise = lambda: torch.randn(2, 4, 3, 2, generator=draws, dtype=F64)  # noqa: E731
    ours = our_way(case, s, steps, start(), noise, told)
    generator = torch.Generator().manual_seed(5) if case == "euler ancestral" else None
    theirs = their_way(case, s, steps, start(), generator, theirs_told)
    assert all(b.dtype is F64 for b in theirs)
    torch.testing.assert_close(torch.tensor(told, dtype=F64), torch.tensor(theirs_told, dtype=F64), rtol=1e-9, atol=1e-9)
    assert apart(ours, theirs) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_as_diffusers_is_in_float32(case):
    """The everyday case: nothing replaced, float32 latents, one seed an image."""
    s = Schedule()
    noise, generators = Noise([5, 6], (4, 3, 2)), [torch.Generator().manual_seed(n) for n in (5, 6)]
    ours = our_way(case, s, 20, start(torch.float32), noise.draw)
    theirs = their_way(case, s, 20, start(torch.float32), generators if case == "euler ancestral" else None)
    assert ours[-1].x.dtype is torch.float32 and theirs[-1].dtype is torch.float32
    assert apart(ours, theirs) < 2e-4


@pytest.mark.parametrize("case", [case for case in CASES if "heun" not in case])
def test_zero_terminal_snr_equals_diffusers(case, in_float64):
    """alpha_bar ends at 2^-24 in both; diffusers' Heun has no such option."""
    s = Schedule(ScheduleConfig(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True))
    draws = torch.Generator().manual_seed(5)
    noise = lambda: torch.randn(2, 4, 3, 2, generator=draws, dtype=F64)  # noqa: E731
    generator = torch.Generator().manual_seed(5) if case == "euler ancestral" else None
    ours, theirs = our_way(case, s, 10, start(), noise), their_way(case, s, 10, start(), generator)
    assert apart(ours, theirs) < 1e-9
    plain = Schedule(ScheduleConfig(prediction_type="v_prediction", timestep_spacing="trailing"))
    assert apart(our_way(case, plain, 10, start(), noise), theirs) > 1e-3


@pytest.mark.parametrize("case", ["dpm 2M, karras", "unipc 2, karras", "euler, karras"])
def test_karras_sigmas_under_cosine_betas_equal_diffusers(case, in_float64):
    """DPM-Solver++ alone then leaves timesteps unrounded, and loses their fractions when it makes integers of them."""
    s, told, theirs_told = Schedule(ScheduleConfig(beta_schedule="squaredcos_cap_v2")), [], []
    ours, theirs = our_way(case, s, 12, start(), None, told), their_way(case, s, 12, start(), None, theirs_told)
    torch.testing.assert_close(torch.tensor(told, dtype=F64), torch.tensor(theirs_told, dtype=F64), rtol=1e-7, atol=1e-7)
    assert apart(ours, theirs) < 1e-7


# --- wrong twins: what the comparison above sees --------------------------------------------------------------------


def test_wrong_twins_are_far_from_diffusers(in_float64):
    """Each once a bug of somebody's: the comparison's bound is a hundred thousand times smaller than what they do."""
    s, x = Schedule(), start()
    theirs = {case: their_way(case, s, 10, x) for case in ("euler", "heun", "dpm 2M", "unipc 2")}
    far = lambda xs, case: max((a - b).abs().max().item() for a, b in zip(xs, theirs[case], strict=True)) > 1e-4  # noqa: E731

    def wrong_euler(mistake):
        ts, sigmas = sigma_levels(s, 10)
        x_bar, way = x * sqrt(sigmas[0] ** 2 + 1), []
        for t, sigma, after in zip(ts, sigmas, sigmas[1:]):
            scale = {"input unscaled": 1.0, "scaled by sigma": sigma}.get(mistake, sqrt(sigma**2 + 1))
            x_bar = x_bar + (after - sigma) * curved(x_bar / scale, t + (mistake == "timesteps off by one"))
            way.append(x_bar / sqrt(after**2 + 1))
        return way

    assert not far(wrong_euler(None), "euler")
    for mistake in ("input unscaled", "scaled by sigma", "timesteps off by one"):
        assert far(wrong_euler(mistake), "euler"), mistake
    assert far([step.x for step in euler(curved, x, s, 10)], "heun")
    assert far([step.x for step in heun(curved, x, s, 10)], "euler")
    assert far([step.x for step in dpm_solver(curved, x, s, 10, order=1)], "dpm 2M")
    assert far([step.x for step in dpm_solver(curved, x, s, 10)], "unipc 2")
    assert far([step.x for step in unipc(curved, x, s, 10, order=3)], "unipc 2")
    assert far([step.x for step in euler(curved, x, s, 10)], "dpm 2M")  # whose timesteps are others, too


# --- the levels themselves ------------------------------------------------------------------------------------------


def test_karras_sigmas_are_equation_5():
    sigmas = karras_sigmas(0.03, 14.6, 9)
    assert sigmas[0] == pytest.approx(14.6) and sigmas[-1] == pytest.approx(0.03)
    roots = [sigma ** (1 / 7) for sigma in sigmas]
    gaps = [a - b for a, b in zip(roots, roots[1:])]
    assert max(gaps) - min(gaps) < 1e-12 < gaps[0]  # even in the seventh root, and in nothing else
    for rho in (1, 6, 8):
        twin = karras_sigmas(0.03, 14.6, 9, rho)
        assert abs(twin[4] - sigmas[4]) > 0.01
    assert karras_sigmas(0.03, 14.6, 1) == pytest.approx([14.6])


def test_sigma_and_timestep_are_each_others_inverse_at_the_table_and_close_between():
    s = Schedule()
    for t in (0, 1, 500, 998, 999):
        assert sigma_at(s, t) == s.sigma[t].item()
        assert timestep_at(s, sigma_at(s, t)) == pytest.approx(t, abs=1e-9)
    assert sigma_at(s, 500.5) == pytest.approx((s.sigma[500] + s.sigma[501]).item() / 2)
    assert timestep_at(s, (s.sigma[500] * s.sigma[501]).sqrt().item()) == pytest.approx(500.5)  # halfway in log sigma
    assert timestep_at(s, 0.0) == 0 and timestep_at(s, 1e-3) == 0 and timestep_at(s, 100.0) == 999


def test_levels_fall_to_zero_and_ints_are_of_the_table():
    for spacing in SPACINGS:
        s = Schedule(ScheduleConfig(timestep_spacing=spacing))
        for levels in (sigma_levels, lambda_levels):
            for karras in (False, True):
                ts, sigmas = levels(s, 7, karras)
                assert len(ts) == 7 and len(sigmas) == 8 and sigmas[-1] == 0
                assert all(a > b for a, b in zip(sigmas, sigmas[1:]))
                for t, sigma in zip(ts, sigmas):
                    assert s.alpha_bar_at(t) == pytest.approx(1 / (1 + sigma**2), rel=1e-9)
                    assert isinstance(t, (int, Timestep)) and (karras or isinstance(t, Timestep) == (t != int(t)))


def test_the_same_seed_starts_where_diffusers_starts():
    z = start()
    for spacing in SPACINGS:
        s = Schedule(ScheduleConfig(timestep_spacing=spacing))
        for case, name in (("euler", "euler"), ("heun", "heun"), ("euler ancestral", "euler_ancestral"), ("dpm 2M", "dpm_solver")):
            theirs = scheduler(case, s, 10)
            expected = z * theirs.init_noise_sigma
            if CASES[case][3]:
                expected = expected / (theirs.sigmas[0] ** 2 + 1) ** 0.5
            torch.testing.assert_close(first_latent(name, z, s, 10), expected.to(F64), rtol=1e-6, atol=1e-6)
            assert (first_latent(name, z, s, 10) is z) == (spacing == "leading" or not CASES[case][3])


def test_a_timestep_between_two_carries_its_level_through_everything():
    s, x0, eps = Schedule(), start(), curved(start(), 3)
    t = Timestep(500.25, 0.2)
    for again in (t, copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert again == 500.25 and again.alpha_bar == 0.2 and s.alpha_bar_at(again) == 0.2
        assert f"{again}" == "500.25" and str(Timestep(43.0, 0.2)) == "43"  # what figures say
    x_t = q_sample(x0, t, eps, s)
    torch.testing.assert_close(x_t, sqrt(0.2) * x0 + sqrt(0.8) * eps)
    torch.testing.assert_close(eps_from_v(x_t, t, v_from(x0, t, eps, s), s), eps)
    with pytest.raises(LabkitError):  # a float alone says nothing of its level
        q_sample(x0, 500.25, eps, s)


def test_the_unet_is_told_fractions():
    (unet,) = strong(UNet(UNET))
    x, c = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 48)
    with torch.no_grad():
        low, between, high = (unet(x, t, c) for t in (500, Timestep(500.5, 0.2), 501))
        told = torch.tensor(500.5)
        torch.testing.assert_close(between, unet(x, told, c))
    assert not torch.allclose(between, low, atol=1e-5) and not torch.allclose(between, high, atol=1e-5)
    theirs = get_timestep_embedding(told[None], 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(told[None], 32), theirs)


# --- how often the network is called, and what is refused -----------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_call_a_step_and_two_for_heun(name):
    s, seen, noise = Schedule(), [], Noise([0, 1], (4, 3, 2))
    steps = list(SAMPLERS[name](lambda x, t: seen.append((t, x)) or curved(x, t), start(), s, 6, noise=noise.draw))
    assert len(steps) == 6 and len(seen) == (11 if name == "heun" else 6)
    for step, (t, x) in zip(steps, seen[:1] + seen[2::2] if name == "heun" else seen, strict=True):
        assert step.t == t
        torch.testing.assert_close(q_sample(step.x0, step.t, step.eps, s), x)  # eps and x0 are two readings of one latent
    last_noise = 1 - s.final_alpha_bar if name == "ddim" else 0
    assert (steps[-1].x - steps[-1].x0).abs().max() <= 3 * last_noise**0.5 + 1e-12  # all others end at sigma = 0


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda x, s: euler(curved, x, s, 0), "steps is 0"),
        (lambda x, s: heun(curved, x, s, 1001), "at most 1000"),
        (lambda x, s: dpm_solver(curved, x, s, 1000, karras=True), "steps_offset"),
        (lambda x, s: dpm_solver(curved, x, s, 5, order=3), "order is 3"),
        (lambda x, s: unipc(curved, x, s, 5, order=4), "order is 4"),
        (lambda x, s: unipc(curved, x, s, "5"), "steps is '5'"),
        (lambda x, s: euler_ancestral(curved, x, s, 5, None), "noise"),
        (lambda x, s: unipc(curved, x, Schedule(ScheduleConfig(steps_offset=0)), 1000), "one timestep more"),
        (lambda x, s: karras_sigmas(0.0, 14.0, 5), "levels"),
        (lambda x, s: karras_sigmas(2.0, 1.0, 5), "levels"),
        (lambda x, s: karras_sigmas(0.1, 1.0, 0), "levels"),
    ],
)
def test_bad_arguments_are_told_at_once_in_one_line(call, says):
    with pytest.raises(LabkitError, match=says) as error:
        call(start(), Schedule())
    assert "\n" not in str(error.value)
