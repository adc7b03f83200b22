"""guidance: the formula, its wrong signs, the rows of the batch, and no branch computed in vain."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from labkit.errors import LabkitError
from labkit.guidance import classifier_free, conditioned, in_eps, in_interval, rescaled
from labkit.samplers import euler
from labkit.samplers.sigmas import timestep_at
from labkit.schedule import Schedule, ScheduleConfig, Timestep, eps_from_v

F64 = torch.float64


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, C, U = randn(3, 4, 5, 6, seed=0), randn(3, 7, 8, seed=1), randn(3, 7, 8, seed=2)


class Model:
    """eps depends on x, t and c of its own row only; remembers the shapes of its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, c):
        self.calls.append((len(x), len(c)))
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1)
        assert len(t) in (1, len(x))
        return torch.tanh(x + c.mean((1, 2)).view(-1, 1, 1, 1)) + 0.001 * t


@pytest.mark.parametrize("w", [7.5, 0.3, 2, -1.0])
def test_classifier_free_is_the_formula(w):
    model = Model()
    eps_c, eps_u = model(X, 500, C), model(X, 500, U)
    eps = classifier_free(model, C, U, w)(X, 500)
    torch.testing.assert_close(eps, eps_u + w * (eps_c - eps_u))
    for twin in (
        w * eps_c + (w - 1) * eps_u,  # the sign as a widely read implementation documents it
        (1 + w) * eps_c - w * eps_u,  # the paper's own w, one less than Stable Diffusion's
        eps_c + w * (eps_c - eps_u),
        eps_c + w * (eps_u - eps_c),  # branches exchanged (the same at w = 1/2)
    ):
        assert not torch.allclose(eps, twin, rtol=1e-3)


def test_one_network_call_with_branch_major_rows():
    model = Model()
    seen = []
    denoise = classifier_free(lambda x, t, c: seen.append((x, c)) or model(x, t, c), C, U, 3.0)
    denoise(X, 10)
    assert model.calls == [(6, 6)] and denoise.branches == ("uncond", "cond")
    x, c = seen[0]
    assert torch.equal(x, torch.cat([X, X])) and torch.equal(c, torch.cat([U, C]))


@pytest.mark.parametrize(
    "w, branch", [(1, "cond"), (1.0, "cond"), (0, "uncond"), (0.0, "uncond"), (torch.ones(3), "cond"),
                  (torch.zeros(3), "uncond")]
)
def test_a_branch_that_does_not_count_is_not_computed(w, branch):
    model = Model()
    denoise = classifier_free(model, C, U, w)
    assert torch.equal(denoise(X, 500), Model()(X, 500, C if branch == "cond" else U))
    assert model.calls == [(3, 3)] and denoise.branches == (branch,)


def test_conditioned():
    model = Model()
    denoise = conditioned(model, C)
    assert torch.equal(denoise(X, 500), Model()(X, 500, C)) and denoise.branches == ("cond",)


def test_a_scale_for_each_image():
    model, w = Model(), [0.0, 1.0, 7.5]
    together = classifier_free(model, C, U, torch.tensor(w))
    assert together.branches == ("uncond", "cond")
    for b in range(3):
        alone = classifier_free(Model(), C[b : b + 1], U[b : b + 1], w[b])(X[b : b + 1], 500)
        torch.testing.assert_close(together(X, 500)[b : b + 1], alone)


def test_a_timestep_for_each_image_reaches_both_branches():
    t = torch.tensor([0, 400, 999])
    together = classifier_free(Model(), C, U, 4.0)(X, t)
    for b in range(3):
        alone = classifier_free(Model(), C[b : b + 1], U[b : b + 1], 4.0)(X[b : b + 1], int(t[b]))
        torch.testing.assert_close(together[b : b + 1], alone)


def test_one_condition_serves_every_image():
    shared = classifier_free(Model(), C, U[:1], 4.0)(X, 500)
    torch.testing.assert_close(shared, classifier_free(Model(), C, U[:1].expand(3, -1, -1), 4.0)(X, 500))
    torch.testing.assert_close(conditioned(Model(), C[:1])(X, 5), Model()(X, 5, C[:1].expand(3, -1, -1)))


def test_dtype_is_kept_and_nothing_changed_in_place():
    x, c, u = X.half(), C.half(), U.half()
    before = x.clone(), c.clone(), u.clone()
    assert classifier_free(Model(), c, u, torch.tensor([2.0, 3.0, 4.0]))(x, 500).dtype is torch.float16
    assert classifier_free(Model(), c, u, 7.5)(x, 500).dtype is torch.float16
    assert all(torch.equal(a, b) for a, b in zip((x, c, u), before))


@pytest.mark.parametrize(
    "w", [float("nan"), float("inf"), -float("inf"), torch.tensor([1.0, float("nan"), 2.0]), None, "strong",
          torch.ones(3, 1), torch.ones(0)]
)
def test_bad_scales_are_one_line(w):
    with pytest.raises(LabkitError) as error:
        classifier_free(Model(), C, U, w)
    assert "\n" not in str(error.value)


# --- rescale (Lin et al. 2023) --------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("w", [7.5, torch.tensor([2.0, 7.5, 1.0])])
def test_rescale_equals_diffusers(w, phi):
    eps_c, eps_u = Model()(X, 500, C), Model()(X, 500, U)
    guided = eps_u + (w.view(-1, 1, 1, 1) if isinstance(w, torch.Tensor) else w) * (eps_c - eps_u)
    eps = classifier_free(Model(), C, U, w, rescale=phi)(X, 500)
    torch.testing.assert_close(eps, rescale_noise_cfg(guided, eps_c, guidance_rescale=phi), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(eps, rescaled(guided, eps_c, phi))
    assert torch.equal(eps, guided) == (phi == 0)


def test_rescale_gives_back_the_spread_of_each_image_and_its_twins_do_not():
    guided, eps_c = 3 * X * torch.tensor([1.0, 2.0, 5.0]).view(-1, 1, 1, 1).double(), X * 0.5 + 1
    spread = lambda e: e.std(dim=(1, 2, 3))  # noqa: E731
    torch.testing.assert_close(spread(rescaled(guided, eps_c, 1.0)), spread(eps_c))
    halfway = rescaled(guided, eps_c, 0.5)
    torch.testing.assert_close(spread(halfway), (spread(guided) + spread(eps_c)) / 2)
    for twin in (
        0.5 * guided * (guided.std() / eps_c.std()) + 0.5 * guided,  # the ratio upside down
        0.5 * guided * (eps_c.std() / guided.std()) + 0.5 * guided,  # one std for the batch: neighbours matter
        0.5 * guided * (spread(eps_c) / spread(guided)).view(-1, 1, 1, 1) ** 2 + 0.5 * guided,  # variances
        0.5 * (guided - guided.mean()) * (spread(eps_c) / spread(guided)).view(-1, 1, 1, 1) + 0.5 * guided,  # centred
    ):
        assert not torch.allclose(halfway, twin, rtol=1e-3, atol=1e-3)


def test_rescale_of_a_v_network_acts_on_v_as_in_diffusers():
    s = Schedule(ScheduleConfig(prediction_type="v_prediction"))
    v_c, v_u = Model()(X, 500, C), Model()(X, 500, U)
    theirs = eps_from_v(X, 500, rescale_noise_cfg(v_u + 7.5 * (v_c - v_u), v_c, guidance_rescale=0.7), s)
    denoise = in_eps(classifier_free(Model(), C, U, 7.5, rescale=0.7), s)
    torch.testing.assert_close(denoise(X, 500), theirs)
    assert denoise.branches == ("uncond", "cond")
    on_eps = classifier_free(lambda x, t, c: eps_from_v(x, t, Model()(x, t, c), s), C, U, 7.5, rescale=0.7)(X, 500)
    assert not torch.allclose(on_eps, theirs, rtol=1e-2)  # what it would be on eps: another picture
    plain = in_eps(classifier_free(Model(), C, U, 7.5), s)(X, 500)  # without it the order does not matter
    torch.testing.assert_close(plain, classifier_free(lambda x, t, c: eps_from_v(x, t, Model()(x, t, c), s), C, U, 7.5)(X, 500))


@pytest.mark.parametrize("phi", [-0.1, 1.1, float("nan"), None, "0.7", True])
def test_bad_rescales_are_one_line(phi):
    with pytest.raises(LabkitError, match="rescale") as error:
        classifier_free(Model(), C, U, 3.0, rescale=phi)
    assert "\n" not in str(error.value)


# --- interval (Kynkaanniemi et al. 2024) ----------------------------------------------------------------------------


def test_guidance_in_an_interval_costs_one_branch_outside():
    model = Model()
    guided, plain = classifier_free(model, C, U, 7.5), conditioned(model, C)
    denoise = in_interval(guided, plain, 200, 700)
    for t, inside in ((999, False), (701, False), (700, True), (Timestep(450.5, 0.3), True), (200, True), (199, False), (0, False)):
        model.calls.clear()
        eps = denoise(X, t)
        assert model.calls == ([(6, 6)] if inside else [(3, 3)])
        assert denoise.branches == (("uncond", "cond") if inside else ("cond",))
        assert torch.equal(eps, (guided if inside else plain)(X, t))
        assert not torch.allclose(eps, (plain if inside else guided)(X, t), rtol=1e-3)


def test_branches_are_those_of_the_call_in_progress():
    seen = []
    denoise = None

    def model(x, t, c):
        seen.append((t, denoise.branches, len(x)))
        return Model()(x, t, c)

    denoise = in_interval(classifier_free(model, C, U, 3.0), conditioned(model, C), 100, 600)
    s = Schedule()
    for _ in euler(denoise, X, s, 4):
        pass
    assert seen == [(751, ("cond",), 3), (501, ("uncond", "cond"), 6), (251, ("uncond", "cond"), 6), (1, ("cond",), 3)]


def test_an_interval_of_sigmas_and_of_timesteps_for_each_image():
    s, model = Schedule(), Model()
    low, high = (timestep_at(s, sigma) for sigma in (0.28, 2.9))  # the paper's for its latent model
    assert s.sigma[int(low)] <= 0.28 < s.sigma[int(low) + 1] and s.sigma[int(high)] <= 2.9 < s.sigma[int(high) + 1]
    denoise = in_interval(classifier_free(model, C, U, 3.0), conditioned(model, C), low, high)
    denoise(X, torch.tensor([300, 400, 500]))
    denoise(X, torch.tensor([980, 990, 999]))
    assert model.calls == [(6, 6), (3, 3)]
    with pytest.raises(LabkitError, match="in and out"):
        denoise(X, torch.tensor([300, 400, 999]))
    for low, high in ((5, 4), (float("nan"), 4)):
        with pytest.raises(LabkitError, match="lower"):
            in_interval(denoise, denoise, low, high)


def test_shapes_that_do_not_fit_are_one_line():
    for call in (
        lambda: classifier_free(Model(), C, U[:, :5], 3.0),
        lambda: classifier_free(Model(), C[:2], U, 3.0)(X, 5),
        lambda: classifier_free(Model(), C, U, torch.tensor([1.0, 2.0]))(X, 5),
        lambda: conditioned(Model(), C[:2])(X, 5),
    ):
        with pytest.raises(LabkitError) as error:
            call()
        assert "\n" not in str(error.value)
