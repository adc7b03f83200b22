"""samplers: diffusers' trajectories step by step, a target whose answer is known, and the twins that must fail.

The networks are analytic. `CURVED` is any smooth function of x, t and nothing else: enough to compare trajectories.
`exact_gaussian` is the true denoiser of x0 ~ N(m, d^2), for which the sampled mean and variance are known.
"""

from itertools import islice
from math import sqrt

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler

from labkit.device import Noise
from labkit.errors import LabkitError
from labkit.samplers import SAMPLERS, ddim, ddim_inverse, ddpm
from labkit.schedule import Schedule, ScheduleConfig, eps_prediction

F64 = torch.float64
SPACED = [(spacing, steps) for spacing in ("leading", "trailing") for steps in (1, 2, 10, 50)] + [("trailing", 30)]


def curved(x, t, c=None):
    return torch.sin(2 * x + 0.003 * t) * 0.7 + 0.3 * x


def start(dtype=F64):
    return Noise([0, 1], (4, 6, 5)).draw().to(dtype)


def last(steps):
    return list(steps)[-1]


def close(a, b, tolerance=1e-9):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())  # assert_close costs more than the samplers do


def scheduler(cls, schedule, exact=True, **change):
    """diffusers' scheduler of the same config; with `exact` its float32 tables are replaced by our float64 ones."""
    c = schedule.config
    theirs = cls(
        num_train_timesteps=c.num_train_timesteps, beta_start=c.beta_start, beta_end=c.beta_end,
        beta_schedule=c.beta_schedule, prediction_type=c.prediction_type, timestep_spacing=c.timestep_spacing,
        steps_offset=c.steps_offset, clip_sample=False, **change,
    )
    if exact:
        theirs.alphas_cumprod = schedule.alpha_bar
        theirs.final_alpha_cumprod = theirs.initial_alpha_cumprod = schedule.final_alpha_bar
        theirs.one = torch.ones((), dtype=F64)
    return theirs


# --- equal to diffusers, step by step ---------------------------------------------------------------------------


@pytest.mark.parametrize("eta, to_one", [(0.0, False), (0.0, True), (0.5, True), (1.0, False)])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing, steps", SPACED)
def test_ddim_equals_diffusers(spacing, steps, kind, eta, to_one):
    s = Schedule(ScheduleConfig(prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=to_one))
    theirs = scheduler(DDIMScheduler, s, set_alpha_to_one=to_one)
    theirs.set_timesteps(steps)
    model = eps_prediction(curved, s)
    mine, x = Noise([5, 6], (4, 6, 5)), start()
    generators = [torch.Generator().manual_seed(n) for n in (5, 6)]
    trajectory = ddim(lambda x, t: model(x, t, None), x, s, steps, eta, mine.draw)
    for t, step in zip(theirs.timesteps.tolist(), trajectory, strict=True):
        z = torch.cat([torch.randn(1, 4, 6, 5, generator=g) for g in generators]).double() if eta else None
        theirs_next = theirs.step(curved(x, t), t, x, eta=eta, variance_noise=z)
        assert step.t == t
        close(step.x0, theirs_next.pred_original_sample)
        close(step.x, theirs_next.prev_sample)
        x = theirs_next.prev_sample


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing, steps", SPACED + [("linspace", 1), ("linspace", 2), ("linspace", 10)])
def test_ddpm_equals_diffusers(spacing, steps, kind):
    s = Schedule(ScheduleConfig(prediction_type=kind, timestep_spacing=spacing))
    theirs = scheduler(DDPMScheduler, s)
    theirs.set_timesteps(steps)
    model = eps_prediction(curved, s)
    x, generator = start()[:1], torch.Generator().manual_seed(5)
    noise = torch.Generator().manual_seed(5)
    draw = lambda: torch.randn(1, 4, 6, 5, generator=noise, dtype=F64)  # noqa: E731
    trajectory = ddpm(lambda x, t: model(x, t, None), x, s, steps, draw)
    for t, step in zip(theirs.timesteps.tolist(), trajectory, strict=True):
        theirs_next = theirs.step(curved(x, t), t, x, generator=generator)
        assert step.t == t
        close(step.x0, theirs_next.pred_original_sample)
        close(step.x, theirs_next.prev_sample)  # they clamp variance at 1e-20
        x = theirs_next.prev_sample


@pytest.mark.parametrize("cls, sampler", [(DDIMScheduler, ddim), (DDPMScheduler, ddpm)])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_whole_trajectories_in_float32_with_their_own_tables(cls, sampler, name):
    """The everyday case: nothing patched, float32 latents, the noise of one seed an image."""
    s = Schedule(ScheduleConfig(beta_schedule=name))
    theirs = scheduler(cls, s, exact=False, **({"set_alpha_to_one": False} if cls is DDIMScheduler else {}))
    theirs.set_timesteps(20)
    mine, yours = Noise([5, 6], (4, 6, 5)), [torch.Generator().manual_seed(n) for n in (5, 6)]
    x = start(torch.float32)
    ours = last(sampler(curved, x, s, 20, noise=mine.draw)).x
    for t in theirs.timesteps.tolist():
        x = theirs.step(curved(x, t), t, x, generator=yours).prev_sample
    assert ours.dtype is torch.float32
    assert (ours - x).norm() / x.norm() < 2e-4


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("spacing, steps", SPACED)
def test_inverse_equals_diffusers(spacing, steps, to_one):
    s = Schedule(ScheduleConfig(timestep_spacing=spacing, set_alpha_to_one=to_one))
    theirs = scheduler(DDIMInverseScheduler, s, set_alpha_to_one=to_one)
    theirs.set_timesteps(steps)
    x = start() * 0.8
    for t, step in zip(theirs.timesteps.tolist(), ddim_inverse(curved, x, s, steps), strict=True):
        theirs_next = theirs.step(curved(x, t), t, x)
        assert step.t == t
        close(step.x, theirs_next.prev_sample)
        close(step.x0, theirs_next.pred_original_sample)
        x = theirs_next.prev_sample


def test_inverse_of_a_v_network_reads_v_at_the_level_the_network_was_told():
    """The one place where we differ from diffusers on purpose, and by how much: the level of v, nothing else."""
    s = Schedule(ScheduleConfig(prediction_type="v_prediction"))
    theirs = scheduler(DDIMInverseScheduler, s, set_alpha_to_one=False)
    theirs.set_timesteps(10)
    model, x = eps_prediction(curved, s), start()
    same_level = scheduler(DDIMInverseScheduler, Schedule(), set_alpha_to_one=False)
    same_level.set_timesteps(10)
    step = next(ddim_inverse(lambda x, t: model(x, t, None), x, s, 10))
    t = theirs.timesteps[0].item()
    close(step.x, same_level.step(model(x, t, None), t, x).prev_sample)
    assert not torch.allclose(step.x, theirs.step(curved(x, t), t, x).prev_sample, rtol=1e-6)


# --- a target that is known -------------------------------------------------------------------------------------

M, D = 1.5, 0.4  # x0 ~ N(M, D^2) in every element


def exact_gaussian(s):
    """eps(x_t, t) = sqrt(1 - a) (x_t - sqrt(a) M) / (a D^2 + 1 - a): the posterior mean of eps, in closed form."""

    def denoise(x, t):
        a = s.alpha_bar_at(t)
        return sqrt(1 - a) * (x - sqrt(a) * M) / (a * D**2 + 1 - a)

    return denoise


def noisy_gaussian(s, z):
    """x_T as the forward process leaves it: not quite N(0, I), which DDIM would remember (Lin et al. 2023)."""
    a = s.alpha_bar_at(999)
    return sqrt(a) * M + sqrt(a * D**2 + 1 - a) * z.double()


def reaches_the_target(x) -> bool:
    return abs(x.mean().item() - M) < 0.02 and abs(x.std().item() - D) < 0.02


CASES = {
    "ddim": lambda d, x, s, z: ddim(d, x, s, 250),
    "ddim, eta 1": lambda d, x, s, z: ddim(d, x, s, 250, 1.0, z),
    "ddpm": lambda d, x, s, z: ddpm(d, x, s, 250, z),
}


@pytest.mark.parametrize("case", CASES)
def test_a_gaussian_is_sampled_with_its_mean_and_spread(case):
    s = Schedule(ScheduleConfig(timestep_spacing="trailing", set_alpha_to_one=True))
    noise = Noise(range(4), (4, 40, 40))
    x = last(CASES[case](exact_gaussian(s), noisy_gaussian(s, noise.draw()), s, noise.draw)).x
    assert reaches_the_target(x), (x.mean(), x.std())


@pytest.mark.parametrize(
    "twin",
    ["alpha for alpha_bar", "rand for randn", "missing root", "noise added with its variance", "eps with the wrong sign"],
)
def test_wrong_twins_miss_the_target(twin):
    """DDIM (eta = 1) written again with one mistake each: the test above would see every one of them."""
    s = Schedule(ScheduleConfig(timestep_spacing="trailing", set_alpha_to_one=True))
    noise = Noise(range(4), (4, 40, 40))

    def wrong(denoise, x, mistake):
        generator = torch.Generator().manual_seed(0)
        table = 1 - s.beta if mistake == "alpha for alpha_bar" else s.alpha_bar
        for t in s.timesteps(250).tolist():
            a_t, a_s = float(table[t]), float(table[t - 4]) if t >= 4 else 1.0
            eps = denoise(x, t)
            if mistake == "eps with the wrong sign":
                eps = -eps
            root = (lambda a: a) if mistake == "missing root" else sqrt
            x0 = (x - root(1 - a_t) * eps) / root(a_t)
            var = max((1 - a_s) / (1 - a_t) * (1 - a_t / a_s), 0)
            z = noise.draw().double()
            if mistake == "rand for randn":
                z = torch.rand(x.shape, generator=generator, dtype=F64)
            std = var if mistake == "noise added with its variance" else sqrt(var)
            x = root(a_s) * x0 + sqrt(max(1 - a_s - var, 0)) * eps + std * z
        return x

    x_T = noisy_gaussian(s, noise.draw())
    assert reaches_the_target(wrong(exact_gaussian(s), x_T, None))
    assert not reaches_the_target(wrong(exact_gaussian(s), x_T, twin))


def test_final_alpha_decides_how_much_noise_is_left():
    """With alpha_bar = 1 after the last step x is the prediction itself; with that of t = 0 it is not."""
    for to_one in (True, False):
        s = Schedule(ScheduleConfig(set_alpha_to_one=to_one))
        step = last(ddim(curved, start(), s, 10))
        assert torch.equal(step.x, step.x0) == to_one
        expected = s.final_alpha_bar.sqrt() * step.x0 + (1 - s.final_alpha_bar).sqrt() * step.eps
        torch.testing.assert_close(step.x, expected)
    assert torch.equal(*(lambda step: (step.x, step.x0))(last(ddpm(curved, start(), s, 10, start))))


def test_zero_terminal_snr_is_within_its_smallest_signal_of_diffusers():
    """diffusers' DDIM keeps alpha_bar = 0 at the end, where eps says nothing of x0; we have 2^-24, whose root is 2^-12."""
    s = Schedule(ScheduleConfig(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True))
    theirs = scheduler(DDIMScheduler, s, exact=False, rescale_betas_zero_snr=True, set_alpha_to_one=False)
    theirs.set_timesteps(10)
    x, model = start(), eps_prediction(curved, s)
    ours = list(ddim(lambda x, t: model(x, t, None), x, s, 10))
    first = theirs.step(curved(x, 999), 999, x)
    assert 0 < (ours[0].x0 - first.pred_original_sample).abs().max() < 1.01 * 2**-12 * x.abs().max()  # x0 = 2^-12 x - v, not -v
    for t in theirs.timesteps.tolist():
        x = theirs.step(curved(x, t), t, x).prev_sample
    assert (ours[-1].x - x).norm() < 2**-12 * x.norm()


def test_linspace_steps_arrive_where_the_next_one_starts():
    """diffusers' DDIM goes from t to t - T // steps here, 499 for two steps, and then tells the network t = 0."""
    s = Schedule(ScheduleConfig(timestep_spacing="linspace", set_alpha_to_one=True))
    first, second = ddim(curved, start(), s, 2)
    a = s.alpha_bar[0]
    torch.testing.assert_close(first.x, a.sqrt() * first.x0 + (1 - a).sqrt() * first.eps)
    assert (first.t, second.t) == (999, 0)


# --- inversion: there and back ----------------------------------------------------------------------------------


def mixture(s):
    """The exact denoiser of a mixture of five narrow Gaussians in 16 dimensions, and 16 samples of it."""
    g = torch.Generator().manual_seed(0)
    means, d = 1.2 * torch.randn(5, 16, generator=g, dtype=F64), 0.3
    x0 = means[torch.randint(5, (16,), generator=g)] + d * torch.randn(16, 16, generator=g, dtype=F64)

    def denoise(x, t):
        a = s.alpha_bar_at(t)
        away = x.flatten(1)[:, None] - sqrt(a) * means                           # (B, 5, 16)
        var = a * d**2 + 1 - a
        share = torch.softmax(-(away**2).sum(-1) / (2 * var), dim=-1)            # (B, 5)
        return (sqrt(1 - a) * (share[..., None] * away).sum(1) / var).view_as(x)

    return denoise, x0.view(16, 1, 4, 4)


def there_and_back(steps, **how):
    s = Schedule()
    denoise, x0 = mixture(s)
    x_T = last(ddim_inverse(denoise, x0, s, steps, **how)).x
    return (last(ddim(denoise, x_T, s, steps)).x - x0).square().mean().sqrt().item(), x_T.std().item()


def test_inversion_comes_back_and_refining_makes_it_exact():
    later, own = there_and_back(20), there_and_back(20, told="own")
    assert later[0] < 0.12 < 0.18 < own[0]  # why "later" is the default
    assert abs(later[1] - 1) < 0.1 < abs(own[1] - 1)  # and what it finds is as strong as noise
    assert there_and_back(100)[0] < 0.03  # both are right in the limit of many steps
    assert there_and_back(100, told="own")[0] < 0.03
    assert there_and_back(20, refine=1)[0] < later[0] / 3
    assert there_and_back(100, refine=8)[0] < 1e-6


def test_own_convention_tells_the_network_the_latents_own_timestep():
    told = []
    s = Schedule()
    list(ddim_inverse(lambda x, t: told.append(t) or curved(x, t), start(), s, 4, told="own"))
    assert told == [0, 1, 251, 501]
    told.clear()
    list(ddim_inverse(lambda x, t: told.append(t) or curved(x, t), start(), s, 4))
    assert told == [1, 251, 501, 751]


# --- generators, noise and bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_stopping_early_costs_nothing_more(name):
    calls = []
    noise = Noise([0, 1], (4, 6, 5))
    steps = SAMPLERS[name](lambda x, t: calls.append(t) or curved(x, t), start(), Schedule(), 50, noise=noise.draw)
    assert calls == []  # nothing runs before it is asked for
    assert [step.i for step in islice(steps, 3)] == [0, 1, 2]
    paid = 6 if name == "heun" else 3
    assert len(calls) == paid
    steps.close()
    assert list(steps) == [] and len(calls) == paid


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_is_changed_in_place_and_steps_stay_as_they_were(name):
    x, noise = start(), Noise([0, 1], (4, 6, 5))
    before = x.clone()
    seen, kept = [], []
    for step in SAMPLERS[name](curved, x, Schedule(), 5, noise=noise.draw):
        seen.append(step)
        kept.append([step.x.clone(), step.eps.clone(), step.x0.clone()])
    assert torch.equal(x, before)
    for step, (x_, eps_, x0_) in zip(seen, kept):
        assert torch.equal(step.x, x_) and torch.equal(step.eps, eps_) and torch.equal(step.x0, x0_)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_neighbours(name):
    def draw_one(seeds):
        noise = Noise(seeds, (4, 6, 5))
        return last(SAMPLERS[name](curved, noise.draw(), Schedule(), 20, noise=noise.draw)).x

    torch.testing.assert_close(draw_one([3, 42])[1:], draw_one([42]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(draw_one([42, 0, 0])[:1], draw_one([42]), rtol=1e-6, atol=1e-6)


def test_every_step_of_ddpm_draws_fresh_noise():
    drawn = []
    noise = Noise([0, 1], (4, 6, 5))
    list(ddpm(curved, start(), Schedule(), 5, lambda: drawn.append(noise.draw()) or drawn[-1]))
    assert len(drawn) == 4  # none at the last step
    assert all(not torch.equal(a, b) for a in drawn for b in drawn if a is not b)


def test_half_precision_is_kept():
    noise = Noise([0, 1], (4, 6, 5))
    for step in ddpm(curved, start(torch.bfloat16), Schedule(), 3, noise.draw):
        assert step.x.dtype is step.x0.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "call",
    [
        lambda x, s: ddim(curved, x, s, 0),
        lambda x, s: ddim(curved, x, s, -3),
        lambda x, s: ddim(curved, x, s, 2000),
        lambda x, s: ddim(curved, x, s, 5, eta=1.0),
        lambda x, s: ddim(curved, x, s, 5, eta=-0.1, noise=start),
        lambda x, s: ddim(curved, x, s, 5, eta=float("nan"), noise=start),
        lambda x, s: ddim(curved, x, s, 5, eta=1.0, noise=Noise([0], (4, 6, 5))),
        lambda x, s: ddpm(curved, x, s, 5, None),
        lambda x, s: ddpm(curved, x, s, 0, start),
        lambda x, s: ddim_inverse(curved, x, s, 0),
        lambda x, s: ddim_inverse(curved, x, s, 5, told="now"),
        lambda x, s: ddim_inverse(curved, x, s, 5, refine=-1),
    ],
)
def test_bad_arguments_are_told_at_once_in_one_line(call):
    with pytest.raises(LabkitError) as error:
        call(start(), Schedule())  # not iterated: the mistake is told where it was made
    assert "\n" not in str(error.value)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(LabkitError, match="denoiser"):
        next(ddim(lambda x, t: curved(x, t)[:1], start(), Schedule(), 5))
    with pytest.raises(LabkitError, match="noise"):
        next(ddpm(curved, start(), Schedule(), 5, lambda: torch.zeros(1, 4, 6, 5)))
