"""models: taps that change nothing, attention that is the same fused and explicit, and twins that diffusers tells apart."""

import weakref

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import TEXT, UNET, VAE_, strong

from labkit.errors import LabkitError
from labkit.models import clip, formats, layers, unet, vae
from labkit.models.clip import CausalAttention, CLIPText
from labkit.models.layers import Attention
from labkit.models.unet import UNet
from labkit.models.vae import VAE
from labkit.tap import Tap, listen, taps


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, C, T = randn(2, 4, 8, 12), randn(2, 16, 48, seed=1), torch.tensor([3, 900])  # not square
IMAGE, Z = randn(2, 3, 16, 24, seed=2), randn(2, 4, 8, 12, seed=3)
IDS = torch.randint(0, 700, (2, 16), generator=torch.Generator().manual_seed(4))
CALLS = {
    "unet": (UNet, UNET, lambda m: m(X, T, C)),
    "vae": (VAE, VAE_, lambda m: torch.cat([m.encode(IMAGE).mean, m.encode(IMAGE).logvar, m.decode(Z)[..., :8, :12]], 1)),
    "clip": (CLIPText, TEXT, lambda m: m(IDS)),
}


@pytest.fixture(params=CALLS)
def case(request):
    kind, config, call = CALLS[request.param]
    network = strong(kind(config))[0].eval()
    return network, lambda: call(network).detach()


def relative(a, b):
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def test_the_decoder_lets_go_of_a_map_when_the_next_is_there():
    network, maps, alive = strong(VAE(VAE_))[0].eval(), [], []
    for block in network.decoder.up_blocks:
        for layer in block.layers():
            layer.register_forward_pre_hook(lambda module, x: alive.append(sum(map() is not None for map in maps)))
            layer.register_forward_hook(lambda module, x, y: maps.append(weakref.ref(y)))
    network.decode(Z)
    assert len(maps) > 4 and alive == [0] + [1] * (len(maps) - 1)


# --- taps ------------------------------------------------------------------------------------------------------------


def test_every_attention_has_its_tap_and_the_unet_its_stream():
    for kind, config, _ in CALLS.values():
        network = kind(config)
        expected = [f"{name}.probs" for name, m in network.named_modules() if isinstance(m, (Attention, CausalAttention))]
        assert expected and sorted(taps(network, "*.probs")) == sorted(expected)
    cross, own = taps(UNet(UNET), "*.attn2.probs"), taps(UNet(UNET), "*.attn1.probs")
    assert len(cross) == len(own) == 4  # one down, one in the middle, two up
    streams = list(taps(UNet(UNET), "*resid"))
    assert streams == ["down_blocks.0.resid", "down_blocks.1.resid", "mid_block.resid", "up_blocks.0.resid", "up_blocks.1.resid"]


def test_weights_do_not_know_of_taps(case):
    network, _ = case
    inside = {name for name, m in network.named_modules() if isinstance(m, Tap)}
    assert inside and not any(key.startswith(tuple(f"{name}." for name in inside)) for key in network.state_dict())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with listen(network, {"*": lambda x, name: None}):
        assert list(network.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_fused_and_explicit_attention_are_the_same(case):
    network, call = case
    for module in [m for m in network.modules() if isinstance(m, (Attention, CausalAttention))]:
        width = (module.to_q if isinstance(module, Attention) else module.q_proj).in_features
        args = [3 * randn(2, 10, width, seed=5)]
        if isinstance(module, Attention) and module.to_k.in_features != width:
            args.append(3 * randn(2, 7, module.to_k.in_features, seed=6))
        fused, seen = module(*args), []
        with listen(module, {"probs": lambda x, name: seen.append(x)}):
            explicit = module(*args)
        assert (fused - explicit).abs().max() <= 1e-5 * fused.abs().max()
        assert seen[0].shape == (2, module.num_heads, 10, args[-1].shape[1])
        assert (seen[0].sum(-1) - 1).abs().max() < 1e-5 and seen[0].min() >= 0
    plain = call()
    with listen(network, {"*.probs": lambda x, name: None}):
        assert relative(call(), plain) < 1e-5


def test_group_norm_is_float32_under_autocast_and_torchs_own_elsewhere():
    norm, x = strong(layers.GroupNorm(2, 8))[0], randn(2, 8, 4, 4)
    whole = F.group_norm(x, 2, norm.weight, norm.bias)
    assert torch.equal(norm(x), whole)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = x.bfloat16()
        assert norm(coarse).dtype == torch.float32 and torch.equal(norm(coarse), F.group_norm(coarse.float(), 2, norm.weight, norm.bias))
        assert torch.equal(norm(x), whole), "what comes in float32 is not rounded on the way"
    assert norm.bfloat16()(coarse).dtype == torch.bfloat16, "a network in bfloat16 stays in it"


def test_causal_attention_never_sees_what_comes_after():
    network, seen = strong(CLIPText(TEXT))[0], []
    with listen(network, {"*.probs": lambda x, name: seen.append(x)}):
        network(IDS)
    assert all(bool((probs.triu(1) == 0).all()) for probs in seen)
    changed = IDS.clone()
    changed[:, 9:] = 5
    assert torch.allclose(network(changed)[:, :9], network(IDS)[:, :9], atol=1e-6)


def test_bit_identical_after_listening_also_after_an_error(case):
    network, call = case
    plain = call()

    def fail(x, name):
        raise KeyboardInterrupt

    with listen(network, {"*": lambda x, name: x * 1.5}):
        assert relative(call(), plain) > 1e-3  # it was really listened at
    assert torch.equal(call(), plain)
    with pytest.raises(KeyboardInterrupt), listen(network, {"*.probs": fail}):
        call()
    assert torch.equal(call(), plain)


def test_listening_at_nothing_raises(case):
    with pytest.raises(LabkitError, match="no tap matches"):
        with listen(case[0], {"*.attn3.probs": print}):
            pass


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: UNet(UNET)(X[:, :3], 1, C),
        lambda: UNet(UNET)(X[..., :7], 1, C),
        lambda: UNet(UNET)(X[0], 1, C),
        lambda: UNet(UNET)(X, 1, C[:1]),
        lambda: UNet(UNET)(X, 1, C[..., :40]),
        lambda: UNet(UNET)(X, 1, C[0]),
        lambda: VAE(VAE_).encode(IMAGE[:, :1]),
        lambda: VAE(VAE_).encode(IMAGE[..., :23]),
        lambda: VAE(VAE_).decode(Z[:, :3]),
        lambda: VAE(VAE_).decode(Z[0]),
        lambda: CLIPText(TEXT)(torch.zeros(1, 17, dtype=torch.long)),
    ],
)
def test_wrong_shapes_are_one_clear_line(call):
    with pytest.raises(LabkitError) as error:
        call()
    assert "\n" not in str(error.value) and any(word in str(error.value) for word in ("expected", "context"))


# --- known wrong twins -----------------------------------------------------------------------------------------------


def theirs(part: str, network) -> torch.Tensor:
    """What diffusers or transformers makes of the same weights and inputs."""
    if part == "unet":
        other = diffusers.UNet2DConditionModel.from_config(formats.unet_to_diffusers(UNET)).eval()
        other.load_state_dict(network.state_dict())
        return other(X, T, C).sample.detach()
    if part == "vae":
        other = diffusers.AutoencoderKL.from_config(formats.vae_to_diffusers(VAE_)).eval()
        other.load_state_dict(network.state_dict())
        q = other.encode(IMAGE).latent_dist
        return torch.cat([q.mean, q.logvar, other.decode(Z).sample[..., :8, :12]], 1).detach()
    other = transformers.CLIPTextModel(transformers.CLIPTextConfig(**formats.text_to_transformers(TEXT, 0, 1, 1))).eval()
    other.load_state_dict(network.state_dict())
    return other(IDS).last_hidden_state.detach()


fused = F.scaled_dot_product_attention


def sines_first(t, dim):
    return torch.cat(layers.timestep_embedding(t, dim).chunk(2, -1)[::-1], -1)


def scale_1_over_d(q, k, v, **options):
    return fused(q, k, v, **{**options, "scale": 1 / q.shape[-1]})


def no_mask(q, k, v, is_causal=False):
    return fused(q, k, v)


def gate_first(self, x):
    gate, value = self.proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate)


def smooth(self, x):
    return self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))


def pad_all_round(self, x):
    return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)


def no_temb(self, x, temb=None):
    return layers_resnet(self, x, None)


layers_resnet = layers.ResnetBlock.forward
TWINS = {
    "as it is": ("unet", None, None, None),
    "as it is, vae": ("vae", None, None, None),
    "as it is, clip": ("clip", None, None, None),
    "sines before cosines": ("unet", unet, "timestep_embedding", sines_first),
    "scale 1/d, not 1/sqrt(d)": ("unet", F, "scaled_dot_product_attention", scale_1_over_d),
    "gate and value exchanged": ("unet", layers.GEGLU, "forward", gate_first),
    "bilinear upsampling": ("unet", unet.Upsample, "forward", smooth),
    "timestep never added": ("unet", layers.ResnetBlock, "forward", no_temb),
    "symmetric padding": ("vae", unet.Downsample, "forward", pad_all_round),
    "scale 1/d in the vae": ("vae", F, "scaled_dot_product_attention", scale_1_over_d),
    "gelu, not quick gelu": ("clip", clip.MLP, "forward", lambda self, h: self.fc2(F.gelu(self.fc1(h)))),
    "no causal mask": ("clip", F, "scaled_dot_product_attention", no_mask),
}


@pytest.fixture(scope="module")
def references():
    return {part: theirs(part, strong(kind(config))[0].eval()) for part, (kind, config, _) in CALLS.items()}


@pytest.mark.parametrize("twin", TWINS)
def test_wrong_twins_are_told_apart(twin, references, monkeypatch):
    part, where, name, wrong = TWINS[twin]
    kind, config, call = CALLS[part]
    if where is not None:
        monkeypatch.setattr(where, name, wrong)  # before it is built: attention takes its kernel then
    network = strong(kind(config))[0].eval()
    error = relative(call(network).detach(), references[part])
    assert error < 2e-5 if where is None else error > 2e-4


def test_the_vaes_log_variance_is_clamped_and_its_sample_uses_the_root():
    q = vae.DiagonalGaussian(torch.tensor([[[[1.0]]]]), torch.tensor([[[[2.0]]]]))
    assert torch.allclose(q.sample(torch.ones(1, 1, 1, 1)), torch.tensor(1 + 2.718281828))  # exp(2 / 2), not exp(2)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(1.0, q.std), torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(q.kl(), expected.flatten())
