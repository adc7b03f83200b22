"""Numbers about pictures: each equals what one computes by hand, and differs from its known wrong twin."""

import numpy as np
import pytest
import torch

from labkit.errors import LabkitError
from labkit.scenes.render import render_many
from labkit.scenes.verify import pixels_of, share
from labkit.training.data import TEST_SEED, scenes
from labkit.training.measures import apart, bootstrap, burnt, features, frechet, load_tower, psnr, saturation, ssim
from labkit.training.verifier import WORLD


def test_wilson_interval_known_values():
    found = share(8, 10)  # Wilson (1927) by hand; also Agresti & Coull's tables
    assert (found["share"], found["low"], found["high"]) == (0.8, pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert share(0, 20)["low"] == 0 and share(0, 20)["high"] == pytest.approx(0.1611, abs=1e-4)
    assert share(20, 20)["high"] == 1 and share(20, 20)["low"] == pytest.approx(0.8389, abs=1e-4)
    plain = 1.96 * (0.8 * 0.2 / 10) ** 0.5  # the wrong twin reaches above 1
    assert 0.8 + plain > 1
    for right, n in ((3, 2), (-1, 4), (0, 0)):
        with pytest.raises(LabkitError):
            share(right, n)


def test_bootstrap_draws_prompts_not_pictures():
    rng = np.random.default_rng(0)
    prompts = [[float(hit)] * 4 for hit in rng.random(100) < 0.7]  # four seeds that always agree say no more than one
    found = bootstrap([prompts])
    p = np.mean(prompts)
    assert found["share"] == pytest.approx(p, abs=1e-4)
    half = 1.96 * (p * (1 - p) / 100) ** 0.5  # the normal interval of 100 prompts; of 400 pictures it would be half as wide
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.15)
    assert bootstrap([prompts]) == found and bootstrap([[[1.0]] * 5]) == {"share": 1.0, "low": 1.0, "high": 1.0}


def test_bootstrap_of_groups_is_the_mean_of_means():
    few, many = [[1.0], [1.0]], [[0.0]] * 98
    assert bootstrap([few, many])["share"] == 0.5, "categories count alike, whatever their number of prompts"
    with pytest.raises(LabkitError):
        bootstrap([[]])


def test_psnr_of_known_errors():
    x = torch.full((2, 3, 16, 16), 0.5)
    y = x.clone()
    y[0] += 0.1
    y[1, 0] += 0.1  # a third of the values
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 20.0 + 4.7712]), rtol=1e-4, atol=1e-3)


def test_ssim_equals_a_plain_loop():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 14, 13, generator=g, dtype=torch.float64)
    y = (x + 0.2 * torch.randn(x.shape, generator=g, dtype=torch.float64)).clamp(0, 1)
    i = np.arange(11) - 5
    w = np.exp(-(i[:, None] ** 2 + i[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    values = []
    for c in range(3):
        for r in range(4):
            for s in range(3):
                a, b = (z[0, c, r : r + 11, s : s + 11].numpy() for z in (x, y))
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    assert ssim(x, y).item() == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(x, x).item() == pytest.approx(1) and ssim(x, 1 - x).item() < 0.1


def test_saturation_and_burnt_pixels():
    x = torch.full((3, 3, 4, 4), 0.5)
    x[1, 0], x[1, 2] = 0.9, 0.3
    x[2, 0, :2] = 1.0
    torch.testing.assert_close(saturation(x), torch.tensor([0.0, 0.6, 0.25]))
    torch.testing.assert_close(burnt(x), torch.tensor([0.0, 0.0, 0.5]))
    assert burnt(torch.full((1, 3, 2, 2), 0.999)).item() == 1 and burnt(torch.full((1, 3, 2, 2), 0.99)).item() == 0  # 255 and 252 of 8 bits


def test_frechet_of_known_gaussians():
    g = torch.Generator().manual_seed(0)
    white = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    white = (white - white.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T  # mean 0, covariance exactly I
    turn = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
    a = white * torch.tensor([1.0, 2.0, 3.0])
    b = white * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([1.0, 0.0, 2.0])
    assert frechet(a, b) == pytest.approx(5 + 1 + 0 + 4, abs=1e-6)  # |m|^2 + sum (s_a - s_b)^2 where the axes agree
    assert 5 + 14 + 9 - 2 * (4 + 16 + 9) < 0, "the wrong twin, without the root"
    assert frechet(a @ turn, b @ turn) == pytest.approx(10, abs=1e-6) and frechet(a, a) == pytest.approx(0, abs=1e-6)
    values, axes = torch.linalg.eigh(torch.cov((a @ turn).T))
    half = axes @ values.sqrt().diag() @ axes.T
    root = torch.linalg.eigvalsh(half @ torch.cov(b.T) @ half).sqrt().sum()  # where the axes do not agree: by the symmetric root
    assert frechet(a @ turn, b) == pytest.approx(float(5 + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * root), abs=1e-6)
    assert frechet(a @ turn, b) == pytest.approx(frechet(b, a @ turn)) and abs(frechet(a @ turn, b) - 10) > 0.5
    with pytest.raises(LabkitError):
        frechet(a[:1], b)


def test_distances_are_of_what_one_sees():
    """Two renders of a scene's twin in other light are farther apart than a picture from itself with a little noise."""
    tower, x = load_tower(), pixels_of(render_many(scenes(WORLD, TEST_SEED + 300, 3), workers=1))
    maps, vector = features(tower, x)
    assert all(torch.allclose(m.norm(dim=1), torch.ones(1), atol=1e-4) for m in maps) and vector.shape == (3, tower.dim)
    near = features(tower, torch.cat([x[:1], (x[:1] + 0.01 * torch.randn(x[:1].shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)]))[0]
    same = features(tower, x[[0, 0]])[0]
    assert apart(same) == pytest.approx(0, abs=1e-6) and apart(maps) > 3 * apart(near) > 0
    pairs = [apart([m[[i, j]] for m in maps]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert apart(maps) == pytest.approx(np.mean(pairs), rel=1e-4)
