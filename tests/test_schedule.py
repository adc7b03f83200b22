"""schedule: diffusers' values, the algebra of x0, eps and v, and the twins that must not pass for it."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from labkit.errors import LabkitError
from labkit.schedule import (
    BETA_SCHEDULES,
    SPACINGS,
    Schedule,
    ScheduleConfig,
    eps_from_v,
    eps_from_x0,
    eps_prediction,
    q_sample,
    rescale_zero_snr,
    v_from,
    x0_from_eps,
    x0_from_v,
)

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def diffusers(cls=DDIMScheduler, **change):
    config = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    return cls(**{**config, **change})


@pytest.mark.parametrize("T", [10, 1000])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_tables_equal_diffusers(name, T):
    ours = Schedule(ScheduleConfig(beta_schedule=name, num_train_timesteps=T))
    theirs = diffusers(beta_schedule=name, num_train_timesteps=T)
    assert ours.beta.dtype is ours.alpha_bar.dtype is F64 and ours.beta.shape == (T,)
    # theirs are float32; 1 - cos^2 ratios lose digits there, hence the absolute term
    torch.testing.assert_close(ours.beta, theirs.betas.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.alpha_bar, theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)


def test_known_values_of_stable_diffusion():
    s = Schedule()
    assert s.beta[0].item() == pytest.approx(0.00085) and s.beta[-1].item() == pytest.approx(0.012)
    assert s.alpha_bar[-1].item() == pytest.approx(0.004660, abs=1e-6)
    assert s.sigma[-1].item() == pytest.approx(14.6146, abs=1e-3)  # k-diffusion's sigma_max of SD 1.x
    assert s.sigma[0].item() == pytest.approx(0.0292, abs=1e-4)  # and its sigma_min
    torch.testing.assert_close(s.snr, 1 / s.sigma**2)


def test_scaled_linear_is_not_linear_and_not_unsquared():
    s = Schedule()
    assert (s.beta - torch.linspace(0.00085, 0.012, 1000, dtype=F64)).abs().max() > 1e-3
    unsquared = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64)  # the square forgotten: no signal is left
    assert torch.cumprod(1 - unsquared, 0)[-1] < 1e-20 < s.alpha_bar[-1]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_diffusers_for_any_number_of_steps(spacing, offset):
    ours = Schedule(ScheduleConfig(timestep_spacing=spacing, steps_offset=offset))
    for cls in (DDIMScheduler, DDPMScheduler):
        theirs = diffusers(cls, timestep_spacing=spacing, steps_offset=offset)
        for steps in range(1, 1000):
            theirs.set_timesteps(steps)
            t = ours.timesteps(steps)
            # trailing: theirs sometimes has one entry too many, t = -1 after the last (61 steps: 62 entries)
            assert torch.equal(t, theirs.timesteps[:steps]), steps
            assert theirs.timesteps[steps:].tolist() in ([], [-1])
            assert t.dtype is torch.int64 and t.min() >= 0


@pytest.mark.parametrize("to_one", [True, False])
def test_final_alpha(to_one):
    ours, theirs = Schedule(ScheduleConfig(set_alpha_to_one=to_one)), diffusers(set_alpha_to_one=to_one)
    assert float(ours.final_alpha_bar) == pytest.approx(float(theirs.final_alpha_cumprod), abs=1e-6)
    assert ours.alpha_bar_at(-1) == float(ours.final_alpha_bar)
    assert ours.alpha_bar_at(999) == float(ours.alpha_bar[999])


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_zero_terminal_snr_equals_diffusers(name):
    plain, s = (Schedule(ScheduleConfig(beta_schedule=name, rescale_betas_zero_snr=zero)) for zero in (False, True))
    torch.testing.assert_close(s.beta, rescale_zero_terminal_snr(plain.beta), rtol=1e-10, atol=1e-12)
    theirs = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=name, rescale_betas_zero_snr=True)
    torch.testing.assert_close(s.alpha_bar, theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
    assert s.alpha_bar[-1] == 2.0**-24 and s.sigma[-1].item() == pytest.approx(4096, rel=1e-6)
    assert bool(s.snr.isfinite().all()) and bool((s.sigma.diff() > 0).all())


def test_zero_terminal_snr_is_algorithm_1_and_not_its_twins():
    s = Schedule()
    root = torch.cumprod(1 - rescale_zero_snr(s.beta), 0).sqrt()
    old = s.alpha_bar.sqrt()
    assert root[0].item() == pytest.approx(old[0].item()) and root[-1].abs() < 1e-12  # where it starts, where it ends
    stretch = root[:-1] / (old - old[-1])[:-1]
    torch.testing.assert_close(stretch, stretch[:1].expand(999))  # between them the same line, stretched
    alpha_bar = s.alpha_bar[0] / (s.alpha_bar[0] - s.alpha_bar[-1]) * (s.alpha_bar - s.alpha_bar[-1])
    assert (root**2 - alpha_bar).abs().max() > 1e-2  # shifted without the root
    assert (root - (old - old[-1])).abs().max() > 1e-2  # shifted, not scaled back


def test_q_sample_and_velocity_equal_diffusers():
    s, theirs = Schedule(), diffusers(DDPMScheduler)
    x0, eps = randn(6, 4, 8, 8), randn(6, 4, 8, 8, seed=1)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(q_sample(x0, t, eps, s), theirs.add_noise(x0, eps, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(v_from(x0, t, eps, s), theirs.get_velocity(x0, eps, t), rtol=1e-4, atol=1e-5)


def test_q_sample_keeps_unit_variance_and_its_twins_do_not():
    s, t = Schedule(), 500
    x0, eps = randn(1, 4, 200, 200), randn(1, 4, 200, 200, seed=1)
    assert q_sample(x0, t, eps, s).var().item() == pytest.approx(1, abs=0.02)
    alpha, alpha_bar = 1 - s.beta[t], s.alpha_bar[t]
    alpha_for_alpha_bar = alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps
    missing_root = alpha_bar * x0 + (1 - alpha_bar) * eps
    rand_for_randn = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * torch.rand(x0.shape, dtype=F64)
    assert missing_root.var() < 0.9 and rand_for_randn.var() < 0.9 and rand_for_randn.mean() > 0.2
    # the first twin keeps the variance; what it gets wrong is how much of the picture is left
    signal = lambda x_t: ((x_t * x0).mean() / (x0**2).mean()).item()  # noqa: E731
    assert signal(q_sample(x0, t, eps, s)) == pytest.approx(alpha_bar.sqrt().item(), abs=0.01)
    assert signal(alpha_for_alpha_bar) > 0.99


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("t", [0, 1, 500, 990, torch.tensor([3, 700])])
def test_x0_eps_and_v_are_three_spellings_of_one_thing(t, name):
    s = Schedule(ScheduleConfig(beta_schedule=name))
    x0, eps = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    x_t, v = q_sample(x0, t, eps, s), v_from(x0, t, eps, s)
    for there, back in [
        (eps, eps_from_x0(x_t, t, x0, s)),
        (x0, x0_from_eps(x_t, t, eps, s)),
        (eps, eps_from_v(x_t, t, v, s)),
        (x0, x0_from_v(x_t, t, v, s)),
    ]:
        torch.testing.assert_close(back, there, rtol=1e-8, atol=1e-8)


def test_a_timestep_for_each_image_equals_one_at_a_time():
    s, x0, eps = Schedule(), randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1)
    t = torch.tensor([0, 400, 999])
    together = q_sample(x0, t, eps, s)
    for b in range(3):
        torch.testing.assert_close(together[b : b + 1], q_sample(x0[b : b + 1], int(t[b]), eps[b : b + 1], s))
        torch.testing.assert_close(together[b : b + 1], q_sample(x0[b : b + 1], t[b], eps[b : b + 1], s))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("t", [700, torch.tensor([700, 700])])
def test_dtype_of_x_is_kept(dtype, t):
    x0, eps = randn(2, 4, 2, 2), randn(2, 4, 2, 2, seed=1)
    low = q_sample(x0.to(dtype), t, eps.to(dtype), Schedule())
    assert low.dtype is dtype
    torch.testing.assert_close(low.double(), q_sample(x0, t, eps, Schedule()), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("kind, say", [("epsilon", None), ("v_prediction", v_from), ("sample", None)])
def test_eps_prediction_turns_any_network_into_an_eps_model(kind, say):
    s = Schedule(ScheduleConfig(prediction_type=kind))
    x0, eps, c = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1), randn(2, 5, 6)

    def network(x_t, t, condition):  # one that is always right
        assert condition is c
        return {"epsilon": eps, "sample": x0}.get(kind) if say is None else say(x0, t, eps, s)

    model = eps_prediction(network, s)
    for t in (10, torch.tensor([10, 900])):
        torch.testing.assert_close(model(q_sample(x0, t, eps, s), t, c), eps, rtol=1e-6, atol=1e-6)
    assert (model is network) == (kind == "epsilon")


def test_nothing_is_changed_in_place():
    s, x0, eps = Schedule(), randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1)
    before = x0.clone(), eps.clone()
    for f in (q_sample, x0_from_eps, eps_from_x0, v_from, eps_from_v, x0_from_v):
        f(x0, 500, eps, s)
    assert torch.equal(x0, before[0]) and torch.equal(eps, before[1])


@pytest.mark.parametrize("t", [-1, 1000, torch.tensor([0, 1000]), torch.tensor([-1, 5]), 1.5, torch.tensor([0.5, 2]),
                               torch.zeros(2, 2, dtype=torch.long), torch.tensor([1, 2, 3]), True, None, "3"])
def test_bad_timesteps_are_one_line(t):
    with pytest.raises(LabkitError) as error:
        q_sample(randn(2, 4, 2, 2), t, randn(2, 4, 2, 2), Schedule())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, "20", None, True, float("nan")])
def test_bad_steps_are_one_line(steps):
    with pytest.raises(LabkitError, match="steps"):
        Schedule().timesteps(steps)


def test_leading_steps_that_would_start_above_the_last_timestep():
    with pytest.raises(LabkitError, match="t=1000"):  # diffusers fails here with an index error, later
        Schedule().timesteps(1000)
    assert Schedule(ScheduleConfig(steps_offset=0)).timesteps(1000)[0] == 999
    assert Schedule().timesteps(np.int64(999))[0] == 999


@pytest.mark.parametrize(
    "change",
    [dict(beta_schedule="cosine"), dict(prediction_type="eps"), dict(timestep_spacing="karras"), dict(beta_end=1.5),
     dict(num_train_timesteps=0), dict(num_train_timesteps=10.0), dict(steps_offset=-1), dict(beta_start=0.0),
     dict(beta_start=-0.1), dict(beta_start=float("nan"))],
)
def test_bad_configs_are_one_line(change):
    with pytest.raises(LabkitError) as error:
        Schedule(ScheduleConfig(**change))
    assert "\n" not in str(error.value)
