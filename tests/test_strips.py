"""Decoding in strips is decoding: the same picture to rounding, whatever the strips, in less memory."""

import copy

import pytest
import torch
import torch.nn.functional as F

import labkit.diffusion
from labkit import strips as S
from labkit.errors import LabkitError
from labkit.models.config import VAEConfig
from labkit.models.vae import VAE
from labkit.packing import available, pack
from labkit.strips import by_strips, decode_in_strips, whole_norm
from labkit.tap import listen, taps
from labkit.winograd import WinogradConv
from tests import tiny

CONFIG = VAEConfig((8, 16, 16), 1, norm_num_groups=4, sample_size=32)  # f = 4; a stage that narrows, one that does not


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape and float((a - b).abs().max()) < tolerance * float(b.abs().max())


@pytest.fixture(scope="module")
def vae():
    return tiny.strong(VAE(CONFIG).eval())[0]


@torch.no_grad()
def latents(*shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return z + torch.linspace(-3, 3, shape[2])[:, None]  # statistics of rows that differ down the picture


@pytest.mark.parametrize("pixels", [1, 40, 64, 200, 10**9])  # a row each; divides; does not; larger than the picture
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 9, 5), (1, 4, 3, 11), (1, 4, 1, 1)])
@torch.no_grad()
def test_strips_are_the_whole(vae, shape, pixels):
    z = latents(*shape)
    before = z.clone()
    close(decode_in_strips(vae, z, pixels), vae.decode(z))
    assert torch.equal(z, before)


@torch.no_grad()
def test_double_precision_tells_rounding_from_error(vae):
    z = latents(2, 4, 7, 6).double()
    close(decode_in_strips(copy.deepcopy(vae).double(), z, 50), copy.deepcopy(vae).double().decode(z), 1e-12)


@torch.no_grad()
def test_half_precision(vae):
    z = latents(1, 4, 8, 8)
    out = decode_in_strips(copy.deepcopy(vae).bfloat16(), z.bfloat16(), 100)
    assert out.dtype == torch.bfloat16
    close(out.float(), vae.decode(z), 0.05)


@torch.no_grad()
def test_norms_of_each_strip_by_itself_are_another_picture(vae, monkeypatch):
    z = latents(1, 4, 8, 8)
    monkeypatch.setattr(S, "whole_norm", lambda norm, strips: norm)
    assert float((decode_in_strips(vae, z, 64) - vae.decode(z)).abs().max()) > 0.05


@torch.no_grad()
def test_strips_without_their_neighbours_have_seams(vae, monkeypatch):
    z = latents(1, 4, 8, 8)
    monkeypatch.setattr(S, "by_strips", lambda f, strips, scale=1: (f(strips.pop(0)) for _ in range(len(strips))))
    off = (decode_in_strips(vae, z, 64) - vae.decode(z)).abs()
    assert float(off.max()) > 0.05


@pytest.mark.parametrize("cached", [1, 6, 2**12])  # pixels: a row, two, all
@torch.no_grad()
def test_statistics_count_rows_and_the_spread_between_strips(vae, cached, monkeypatch):
    monkeypatch.setattr(S, "CACHED", cached)
    norm = torch.nn.GroupNorm(2, 4)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 4, 7, 3) + 5 * torch.arange(7.0)[:, None] ** 2
    parts = list(x.split([4, 2, 1], dim=2))
    normed = whole_norm(norm, parts)
    torch.testing.assert_close(torch.cat([normed(p) for p in parts], 2), norm(x), rtol=1e-5, atol=1e-5)
    var, mean = zip(*(torch.var_mean(p.unflatten(1, (2, -1)), dim=(2, 3, 4), correction=0) for p in parts))
    plain = torch.stack(var).mean(0)  # the twin: the mean of the variances, blind to rows and to what lies between the strips
    assert float((plain / torch.var(x.unflatten(1, (2, -1)), dim=(2, 3, 4), correction=0) - 1).abs().min()) > 0.3


@torch.no_grad()
def test_statistics_far_from_zero_keep_their_digits():
    norm = torch.nn.GroupNorm(2, 4)
    x = torch.randn(1, 4, 40, 30) + 1000  # where the mean of squares less the square of the mean has none left
    normed = whole_norm(norm, list(x.split(7, dim=2)))(x)
    assert float((normed.double() - F.group_norm(x.double(), 2)).abs().max()) < 1e-3
    assert float(((x * x).mean() - x.mean() ** 2 - x.var(correction=0)).abs()) > 0.01


@torch.no_grad()
def test_no_more_than_a_few_rows_are_seen_at_once_and_inputs_are_let_go():
    x = torch.randn(1, 2, 10, 4)
    parts, seen, left = list(x.split(3, dim=2)), [], []
    weight = torch.randn(2, 2, 3, 3)

    def f(window):
        seen.append(window.shape[2])
        left.append(len(parts))
        return F.conv2d(window, weight, padding=1)

    torch.testing.assert_close(torch.cat(list(by_strips(f, parts)), 2), F.conv2d(x, weight, padding=1))
    assert seen == [4, 5, 5, 2] and left == [3, 2, 1, 0] and parts == []


@torch.no_grad()
def test_taps_of_the_middle_see_it_whole_once(vae):
    z, shapes = latents(1, 4, 8, 6), []
    site = {"decoder.mid_block.attentions.0.probs": lambda probs, name: shapes.append(tuple(probs.shape))}
    with listen(vae, site):
        listened = decode_in_strips(vae, z, 60)
    assert shapes == [(1, 1, 48, 48)] and not any(tap.active for tap in taps(vae).values())
    close(listened, vae.decode(z))


@pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN kernels")
@torch.no_grad()
@pytest.mark.parametrize("wide", [1, 1000])  # by Winograd, directly
def test_packed_networks_decode_in_strips_too(vae, wide, monkeypatch):
    monkeypatch.setattr("labkit.packing.WIDE", wide)
    fast = pack(vae)
    assert any(type(m) is WinogradConv for m in fast.modules()) == (wide == 1)
    for B in (1, 2):
        z = latents(B, 4, 9, 8)
        close(decode_in_strips(fast, z, 100), vae.decode(z))


def test_what_cannot_be_decoded_is_told(vae):
    for z in (torch.zeros(1, 3, 8, 8), torch.zeros(4, 8, 8)):
        with pytest.raises(LabkitError, match="expected"):
            decode_in_strips(vae, z)
    with pytest.raises(LabkitError, match="positive number"):
        decode_in_strips(vae, torch.zeros(1, 4, 8, 8), pixels=0)


def test_a_lab_decodes_large_pictures_in_strips_by_itself_and_all_when_told(monkeypatch):
    lab, calls = tiny.build(), []

    def spy(vae, z):
        calls.append(tuple(z.shape))
        return decode_in_strips(vae, z, 64)

    monkeypatch.setattr(labkit.diffusion, "decode_in_strips", spy)
    z = latents(2, 4, 8, 8)  # pictures of 16x16
    whole = lab.decode(z)
    assert calls == []
    close(lab.decode(z, strips=True), whole)
    assert calls == [(1, 4, 8, 8)] * 2  # one after the other
    monkeypatch.setattr(labkit.diffusion, "LARGE", 16 * 16 - 1)
    close(lab.decode(z), whole)
    assert len(calls) == 4
    lab.decode(z, strips=False)
    assert len(calls) == 4
