"""The convolution by Winograd's filtering is the convolution; in strips, with what is done to their rows on the way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from labkit import winograd
from labkit.packing import available
from labkit.winograd import G, WinogradConv, rows_at_once, transform_in, transform_out, transformed, windows

pytestmark = pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN kernels")

SHAPES = [(1, 8, 8), (2, 9, 5), (1, 3, 11), (1, 1, 1), (3, 13, 1), (1, 64, 40)]  # B, h, w


def far(a, b):
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


def layer(c_in=5, c_out=7):
    torch.manual_seed(0)
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def filtered(d, g, transform=G):
    """F(4, 3) of six numbers and a kernel of three, by the module's own transforms, in float64."""
    d, out, y = list(d.double()), torch.empty(6, dtype=torch.float64), torch.empty(4, dtype=torch.float64)
    transform_in(d, out)
    transform_out(list(out * (torch.tensor(transform, dtype=torch.float64) @ g.double())), y)
    return y


def test_transforms_filter_exactly():
    torch.manual_seed(0)
    d, g = torch.randn(6), torch.randn(3)
    truth = F.conv1d(d.double()[None, None], g.double()[None, None])[0, 0]
    assert far(filtered(d, g), truth) < 1e-14
    assert far(filtered(d, g.flip(0)), truth) > 0.1  # a true convolution, which networks do not mean
    twin = [tuple(4 * x for x in G[0]), *G[1:]]  # the row of zero without its quarter
    assert far(filtered(d, g, twin), truth) > 0.1


def test_every_entry_of_the_transforms():
    """B^T and A^T as matrices, read off by unit vectors, beside those of the paper (section 4.1 has them for 2D)."""
    B = torch.empty(6, 6)
    transform_in(list(torch.eye(6)), B)
    assert B.tolist() == [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
    A = torch.empty(4, 6)
    transform_out(list(torch.eye(6)), A)
    assert A.tolist() == [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


@pytest.mark.parametrize("strip", [1, 40, 2**12])  # four rows at a time, some, all
@pytest.mark.parametrize("B, h, w", SHAPES)
@torch.no_grad()
def test_it_is_the_convolution(B, h, w, strip, monkeypatch):
    monkeypatch.setattr(winograd, "STRIP", strip)
    conv = layer()
    x = torch.randn(B, 5, h, w)
    before = x.clone()
    out = WinogradConv(conv)(x)
    assert far(out, conv(x)) < 1e-5 and torch.equal(x, before)
    assert far(WinogradConv(conv)(x.to(memory_format=torch.channels_last)), conv(x)) < 1e-5
    if h > 1:
        conv.weight.copy_(conv.weight.flip(2))  # the kernel's rows from the wrong end
        assert far(out, conv(x)) > 0.05


@pytest.mark.parametrize("channels", [32, 512])
@torch.no_grad()
def test_float32_loses_one_digit_at_most(channels):
    conv, x = layer(channels, channels), torch.randn(1, channels, 16, 16)
    assert far(WinogradConv(conv)(x).double(), F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)) < 5e-6


@pytest.mark.parametrize("strip", [1, 40, 2**12])
@torch.no_grad()
def test_what_is_done_before_and_added_after(strip, monkeypatch):
    monkeypatch.setattr(winograd, "STRIP", strip)
    conv, x, skip = layer(), torch.randn(2, 5, 10, 6), torch.randn(2, 7, 10, 6)
    out = WinogradConv(conv)(x, lambda rows, into: torch.add(rows, 2, out=into), lambda rows: skip[:, :, rows])
    assert far(out, conv(x + 2) + skip) < 1e-5  # the padding is of zeros, not of twos
    assert far(out, F.conv2d(F.pad(x, (1, 1, 1, 1)) + 2, conv.weight, conv.bias) + skip) > 0.05


@pytest.mark.parametrize("h", [1, 4, 7, 16, 17])
def test_windows_are_the_rows_with_their_neighbours(h, monkeypatch):
    monkeypatch.setattr(winograd, "STRIP", 8 * 3)  # eight rows
    x = torch.randn(1, 2, h, 3)
    seen, padded = 0, F.pad(x, (0, 0, 1, 5))
    for top, window in windows(x, winograd.copied):
        assert top == seen and window.is_contiguous(memory_format=torch.channels_last)
        assert window.shape[2] <= 10 and (window.shape[2] - 2) % 4 == 0
        assert torch.equal(window, padded[:, :, top : top + window.shape[2]])
        seen += window.shape[2] - 2
    assert h <= seen < h + 4


def test_strips_are_smaller_where_maps_are_wider():
    for B, w in ((1, 512), (1, 64), (4, 64), (1, 10**5)):
        rows = rows_at_once(torch.empty(B, 1, 1, w))
        assert rows % 4 == 0 and (rows == 4 or rows * B * w <= winograd.STRIP < (rows + 4) * B * w)


@torch.no_grad()
def test_weights_are_saved_as_they_were():
    conv = layer()
    saved = WinogradConv(conv).state_dict()
    assert list(saved) == ["weight", "bias"] and torch.equal(saved["weight"], conv.weight) and torch.equal(saved["bias"], conv.bias)
    assert len(transformed(conv.weight)) == 6
