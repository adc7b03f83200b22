"""The fast model draws what the plain one draws, leaves it alone, and can do all that it can, but for gradients."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import labkit
from labkit.errors import LabkitError
from labkit.models.config import UNetConfig, VAEConfig
from labkit.models.layers import Attention
from labkit.models.unet import UNet, Upsample
from labkit.models.vae import VAE
from labkit.packing import LONG, ROWS, PackedConv, PackedLinear, PackedPointwise, PackedUpsample, available, optimize, pack, tiled_attention
from labkit.tap import taps

pytestmark = pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN kernels")

CONFIG = UNetConfig(block_out_channels=(32, 64), cross_attention=(True, False), num_attention_heads=(2, 4), layers_per_block=1,
                    cross_attention_dim=24, norm_num_groups=8, sample_size=8)  # fmt: skip


def close(a, b, tolerance=1e-5):
    assert float((a - b).norm() / b.norm()) < tolerance


@pytest.fixture(scope="module")
def lab():
    return labkit.load("tabletop", "cpu")


@pytest.mark.parametrize("linear", [False, True])
@torch.no_grad()
def test_unet_is_the_same_function(linear):
    torch.manual_seed(0)
    unet = UNet(replace(CONFIG, use_linear_projection=linear)).eval()
    before = copy.deepcopy(unet.state_dict())
    fast = pack(unet)
    for h, w, B in ((8, 8, 2), (16, 8, 1), (32, 32, 1)):  # other sizes than that of the first call; the last attends in tiles
        x, c, t = torch.randn(B, 4, h, w), torch.randn(B, 5, 24), torch.tensor(300)
        close(fast(x, t, c), unet(x, t, c))
    assert not any(isinstance(m, (nn.Linear, nn.Conv2d)) for m in fast.modules())
    assert {type(m) for m in fast.modules()} >= {PackedConv, PackedLinear, PackedPointwise, PackedUpsample}
    assert not any(isinstance(m, (PackedConv, PackedLinear, PackedPointwise)) for m in unet.modules())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    found = fast.state_dict()
    assert list(found) == list(before) and all(torch.equal(found[name], before[name]) for name in before)


@torch.no_grad()
def test_vae_is_the_same_function():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8, sample_size=32)).eval()
    fast, image = pack(vae), torch.randn(2, 3, 32, 24)
    close(fast.encode(image).mean, vae.encode(image).mean)
    z = torch.randn(1, 4, 40, 40)  # the middle's one head has 1600 places, so it attends in tiles
    close(fast.decode(z), vae.decode(z))


@torch.no_grad()
def test_keys_follow_the_text():
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval()
    fast, x = pack(unet), torch.randn(1, 4, 8, 8)
    texts = torch.randn(3, 1, 5, 24)
    for c in (texts[0], texts[0], texts[1], texts[0].clone(), texts[2][:, :3]):
        close(fast(x, torch.tensor(10), c), unet(x, torch.tensor(10), c))
    c = texts[0].clone()
    fast(x, torch.tensor(10), c)
    c.mul_(-2)  # the same tensor with other content
    close(fast(x, torch.tensor(10), c), unet(x, torch.tensor(10), c))


@torch.no_grad()
def test_keys_and_values_are_computed_once(monkeypatch):
    fast, x, c = pack(UNet(CONFIG).eval()), torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    keys = [m.to_k for name, m in fast.named_modules() if name.endswith("attn2")]
    fast(x, torch.tensor(900), c)
    first = [layer.last[1] for layer in keys]
    fast(torch.randn(1, 4, 8, 8), torch.tensor(800), c)
    assert len(keys) > 1 and all(layer.last[1] is y for layer, y in zip(keys, first))
    assert not any(layer.remember for name, m in fast.named_modules() if name.endswith("attn1") for layer in (m.to_q, m.to_k, m.to_v))


@pytest.mark.parametrize("N, L", [(1, LONG), (ROWS, LONG), (ROWS + 1, LONG + 3), (7, LONG - 1), (2 * ROWS - 1, 77)])
@torch.no_grad()
def test_tiled_attention_is_attention(N, L):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 10) for n in (N, L, L))
    out = tiled_attention(q, k, v)
    close(out, F.scaled_dot_product_attention(q, k, v))
    assert float((out - F.scaled_dot_product_attention(q, k, v, scale=1.0)).norm() / out.norm()) > 0.1  # without 1 / sqrt(d)


@pytest.mark.parametrize("h, w, B", [(1, 1, 1), (3, 5, 2), (8, 8, 1)])
@torch.no_grad()
def test_upsampling_is_doubling_and_a_convolution(h, w, B):
    torch.manual_seed(0)
    layer, x = Upsample(6), torch.randn(B, 6, h, w)
    out = PackedUpsample(layer)(x)
    assert out.shape == (B, 6, 2 * h, 2 * w)
    close(out, layer(x))
    flipped = copy.deepcopy(layer)
    flipped.conv.weight.copy_(layer.conv.weight.flip(2))  # rows of the kernel folded from the wrong end
    assert float((PackedUpsample(flipped)(x) - layer(x)).norm() / layer(x).norm()) > 0.05


@torch.no_grad()
def test_half_precision():
    torch.manual_seed(0)
    unet, x, c = UNet(CONFIG).eval(), torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    plain = unet(x, torch.tensor(5), c)
    fast = pack(unet.bfloat16())
    out = fast(x.bfloat16(), torch.tensor(5), c.bfloat16())
    assert out.dtype == torch.bfloat16
    close(out.float(), plain, 0.05)


def test_gradients_are_refused_not_lost():
    fast = pack(UNet(CONFIG).eval())
    x, c = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    with pytest.raises(LabkitError, match="no gradients"):
        fast(x.requires_grad_(), torch.tensor(5), c)
    with pytest.raises(LabkitError, match="no gradients"):
        fast(x.detach(), torch.tensor(5), c.requires_grad_())


def test_same_picture_maps_and_files(lab, tmp_path):
    fast = optimize(lab)
    with labkit.record(lab) as trace:
        plain = lab.generate("a red sphere left of a blue cube", seed=3, progress=False)
    with labkit.record(fast) as again:
        drawn = fast.generate("a red sphere left of a blue cube", seed=3, progress=False)
    close(drawn.latents, plain.latents, 1e-4)
    torch.testing.assert_close(again.heatmap("sphere").map, trace.heatmap("sphere").map, rtol=1e-3, atol=1e-5)
    assert not any(tap.active for tap in (*taps(fast.unet).values(), *taps(lab.unet).values()))
    assert not any(isinstance(m, PackedLinear) for m in lab.unet.modules())
    from labkit.checkpoint import load_pipeline, save_pipeline

    saved = load_pipeline(save_pipeline(fast, tmp_path / "model"))
    for part in ("unet", "vae"):
        for name, value in getattr(lab, part).state_dict().items():
            assert torch.equal(getattr(saved, part).state_dict()[name], value), name


def test_listeners_of_the_original_do_not_hear_the_copy(lab):
    with labkit.record(lab):
        fast = optimize(lab)
    assert not any(tap.active for tap in taps(fast.unet).values())


def test_twice_is_once_and_attention_is_left_where_it_was(lab):
    fast = optimize(lab)
    assert optimize(fast) is fast is not lab
    assert all(m.attend is F.scaled_dot_product_attention for m in lab.unet.modules() if isinstance(m, Attention))


def test_what_cannot_be_optimised_is_told(lab, monkeypatch):
    monkeypatch.setattr("labkit.packing.KERNELS", ("_no_such_kernel",))
    with pytest.raises(LabkitError, match="oneDNN"):
        optimize(lab)
    with pytest.raises(LabkitError, match="on a CPU, this one is on meta"):
        elsewhere = copy.copy(lab)
        elsewhere.unet = copy.deepcopy(lab.unet).to("meta")
        optimize(elsewhere)
