"""guidance: the formula, its wrong signs, the rows of the batch, and no branch computed in vain."""

import pytest
import torch

from labkit.errors import LabkitError
from labkit.guidance import classifier_free, conditioned

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
