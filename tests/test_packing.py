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
from labkit.models.layers import Attention, ResnetBlock
from labkit.models.unet import UNet, Upsample
from labkit.models.vae import VAE
from labkit.packing import LONG, ROWS, PackedConv, PackedLinear, PackedPointwise, PackedUpsample, StripResnet, available, optimize, pack, tiled_attention
from labkit.tap import taps
from labkit.winograd import WinogradConv
from tests import tiny

pytestmark = pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN kernels")
HALF = pytest.mark.skipif(not available(torch.bfloat16), reason="this processor has no products of bfloat16")

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


@pytest.fixture
def narrow(monkeypatch):
    """Narrow networks, too, go by strips and Winograd."""
    monkeypatch.setattr("labkit.packing.WIDE", 1)


VAE_CONFIG = VAEConfig(block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8, sample_size=32)  # f = 4; one stage narrows


@torch.no_grad()
def test_vae_is_the_same_function(narrow):
    vae = tiny.strong(VAE(VAE_CONFIG).eval())[0]
    before = copy.deepcopy(vae.state_dict())
    fast, image = pack(vae), torch.randn(2, 3, 32, 24)
    close(fast.encode(image).mean, vae.encode(image).mean)
    assert sum(type(m) is StripResnet for m in fast.modules()) == sum(type(m) is ResnetBlock for m in vae.decoder.modules()) == 8
    assert not any(type(m) is WinogradConv for m in fast.encoder.modules())  # seldom used, so it keeps to the weights' size
    found = fast.state_dict()
    assert list(found) == list(before) and all(torch.equal(found[name], before[name]) for name in before)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


@torch.no_grad()
def test_a_part_can_be_left_as_it_is(narrow):
    vae = tiny.strong(VAE(VAE_CONFIG).eval())[0]
    fast, image = pack(vae, but="encoder"), torch.randn(1, 3, 32, 24)
    assert all(mine.data_ptr() == its.data_ptr() for mine, its in zip(fast.encoder.parameters(), vae.encoder.parameters(), strict=True))
    assert len(list(fast.encoder.parameters())) > 20 and any(type(m) is WinogradConv for m in fast.decoder.modules())
    assert torch.equal(fast.encode(image).mean, vae.encode(image).mean)
    close(fast.decode(image[:, :1].repeat(1, 4, 1, 1)), vae.decode(image[:, :1].repeat(1, 4, 1, 1)))


@pytest.mark.parametrize("strip", [1, 100, 2**12])  # pixels: four rows at a time, an odd number of strips, most maps whole
@pytest.mark.parametrize("shape", [(1, 4, 40, 40), (2, 4, 9, 5), (1, 4, 3, 11), (3, 4, 1, 1)])  # the first attends in tiles in the middle
@torch.no_grad()
def test_decoding_is_the_same_function(shape, strip, narrow, monkeypatch):
    monkeypatch.setattr("labkit.winograd.STRIP", strip)
    vae = tiny.strong(VAE(VAE_CONFIG).eval())[0]
    z = torch.randn(shape) + torch.linspace(-3, 3, shape[2])[:, None]  # rows that differ down the picture
    kept = z.clone()
    out, plain = pack(vae).decode(z), vae.decode(z)
    close(out, plain)
    close(pack(vae).decode(z.clone()), plain)
    assert out.shape == plain.shape and torch.equal(z, kept)


@pytest.mark.parametrize("c_in, c_out", [(16, 16), (24, 8)])  # without and with a convolution in the skip
@torch.no_grad()
def test_a_block_in_strips_is_the_block(c_in, c_out, narrow, monkeypatch):
    monkeypatch.setattr("labkit.winograd.STRIP", 50)
    network = nn.Module()
    network.decoder = nn.ModuleList([tiny.strong(ResnetBlock(c_in, c_out, None, 4, eps=1e-6))[0]])
    block, fast = network.decoder[0], pack(network).decoder[0]
    x = 5 * torch.randn(2, c_in, 11, 6) + torch.linspace(-9, 9, 11)[:, None]
    kept = x.clone()
    close(fast(x), block(x))
    assert type(fast) is StripResnet and torch.equal(x, kept)  # also where the skip is x itself
    monkeypatch.setattr("labkit.packing.whole_norm", lambda norm, strips: lambda rows, out: out.copy_(norm(rows)))
    assert float((fast(x) - block(x)).norm() / block(x).norm()) > 0.02  # the twin: each strip with statistics of its own


@torch.no_grad()
def test_narrow_blocks_and_other_networks_are_left_to_direct_convolutions():
    vae = VAE(VAEConfig(block_out_channels=(16, 128), layers_per_block=1, norm_num_groups=8, sample_size=32)).eval()
    decoder = pack(vae).decoder
    assert [type(m) for m in decoder.mid_block.resnets] == [StripResnet] * 2
    assert [type(m) for m in decoder.up_blocks[0].resnets] == [StripResnet] * 2
    assert [type(m) for m in decoder.up_blocks[1].resnets] == [ResnetBlock] * 2  # 128 to 16, 16 to 16
    z = torch.randn(2, 4, 6, 10)
    close(pack(vae).decode(z), vae.decode(z))


@HALF
@torch.no_grad()
def test_only_float32_is_filtered(narrow):
    vae = tiny.strong(VAE(VAE_CONFIG).eval())[0]
    z = torch.randn(1, 4, 8, 8)
    plain, fast = vae.decode(z), pack(copy.deepcopy(vae).bfloat16())
    assert not any(type(m) in (StripResnet, WinogradConv) for m in fast.modules())
    close(fast.decode(z.bfloat16()).float(), plain, 0.05)


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


@pytest.mark.parametrize("h, w, B", [(1, 1, 1), (3, 5, 2), (8, 8, 1), (18, 3, 2)])
@torch.no_grad()
def test_upsampling_is_doubling_and_a_convolution(h, w, B, monkeypatch):
    monkeypatch.setattr("labkit.winograd.STRIP", 40)
    torch.manual_seed(0)
    layer, x = Upsample(6), torch.randn(B, 6, h, w)
    out = PackedUpsample(layer)(x)
    assert out.shape == (B, 6, 2 * h, 2 * w)
    close(out, layer(x))
    flipped = copy.deepcopy(layer)
    flipped.conv.weight.copy_(layer.conv.weight.flip(2))  # rows of the kernel folded from the wrong end
    assert float((PackedUpsample(flipped)(x) - layer(x)).norm() / layer(x).norm()) > 0.05


@HALF
@torch.no_grad()
def test_half_precision():
    torch.manual_seed(0)
    unet, x, c = UNet(CONFIG).eval(), torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    plain = unet(x, torch.tensor(5), c)
    fast = pack(unet.bfloat16())
    out = fast(x.bfloat16(), torch.tensor(5), c.bfloat16())
    assert out.dtype == torch.bfloat16
    close(out.float(), plain, 0.05)


def test_gradients_are_refused_not_lost(narrow):
    fast = pack(UNet(CONFIG).eval())
    x, c = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    with pytest.raises(LabkitError, match="no gradients"):
        fast(x.requires_grad_(), torch.tensor(5), c)
    with pytest.raises(LabkitError, match="no gradients"):
        fast(x.detach(), torch.tensor(5), c.requires_grad_())
    decoder = pack(VAE(VAE_CONFIG).eval()).decoder
    for network in (decoder.mid_block.resnets[0], decoder.up_blocks[0].upsamplers[0]):
        with pytest.raises(LabkitError, match="no gradients"):
            network(torch.randn(1, 32, 8, 8, requires_grad=True))
    with pytest.raises(LabkitError, match="no gradients"):  # those of the norms' weights
        decoder.mid_block.resnets[0](torch.randn(1, 32, 8, 8))


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
    with pytest.raises(LabkitError, match="no products of bfloat16: load the model with dtype='float32'"):
        monkeypatch.setattr("labkit.packing.available", lambda dtype=torch.float32: dtype is torch.float32)
        elsewhere.unet = copy.deepcopy(lab.unet).to(torch.bfloat16)
        optimize(elsewhere)
