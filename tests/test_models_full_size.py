"""Our networks against diffusers' and transformers': the true geometry of Stable Diffusion 1.5, and gradients on small ones.

The full-size networks get random weights, in one set of tensors which both implementations share (3.4 GB for the U-Net), so the
comparison needs the memory of one network. Configs are written out as the published config.json files have them.
"""

import pytest
import torch
from labkit.models import formats
from labkit.models.clip import CLIPText
from labkit.models.config import SD15_TEXT, SD15_UNET, SD15_VAE, CLIPTextConfig, UNetConfig, VAEConfig
from labkit.models.unet import UNet
from labkit.models.vae import VAE

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SD15_UNET_JSON = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
    "cross_attention_dim": 768, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
    "norm_num_groups": 32, "out_channels": 4, "sample_size": 64, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
SD15_VAE_JSON = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
SD15_TEXT_JSON = {
    "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768,
    "vocab_size": 49408,
}  # fmt: skip


def build_theirs(part: str, raw: dict):
    if part == "unet":
        return diffusers.UNet2DConditionModel.from_config(raw)
    if part == "vae":
        return diffusers.AutoencoderKL.from_config(raw)
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**raw, attn_implementation="sdpa"))


FULL = {
    "unet": (UNet, SD15_UNET, SD15_UNET_JSON, formats.unet_config, 859_520_964),
    "vae": (VAE, SD15_VAE, SD15_VAE_JSON, formats.vae_config, 83_653_863),
    "text_encoder": (CLIPText, SD15_TEXT, SD15_TEXT_JSON, formats.text_config, 123_060_480),
}


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights that keep activations of order one; norms and biases random too. Cut from one stream of noise at odd places, for speed."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    period = 16_000_057 if sum(sizes.values()) > 10**7 else 100_003
    noise = torch.randn(period, generator=torch.Generator().manual_seed(0)).repeat(4)
    weights, at = {}, 0
    for name, shape in shapes.items():
        n = sizes[name]
        at = (at + 1_000_003) % period
        values = noise[at : at + n].view(shape)
        weights[name] = values * (n / shape[0]) ** -0.5 if len(shape) > 1 else values * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return weights


def both_with_the_same_weights(part: str):
    """Ours and theirs at full size, built without memory and given the very same tensors, strictly and by name."""
    build, config, raw, *_ = FULL[part]
    with torch.device("meta"):
        ours, theirs = build(config), build_theirs(part, raw)
    weights = random_weights({n: tuple(t.shape) for n, t in ours.state_dict().items()})
    ours.load_state_dict(weights, strict=True, assign=True)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)  # and back
    if part == "text_encoder":  # a table of 0, 1, 2, ... that is not in its state dict, and so is still on the meta device
        theirs.embeddings.position_ids = torch.arange(77)[None]
    return ours.eval(), theirs.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and torch.isfinite(a).all() and b.std() > 1e-3
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("part", FULL)
def test_parameters_of_stable_diffusion_1_5(part):
    build, config, raw, to_config, count = FULL[part]
    assert to_config(raw) == config
    with torch.device("meta"):
        ours, theirs = build(config), build_theirs(part, raw)
    assert sum(p.numel() for p in ours.parameters()) == count
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@torch.no_grad()
def test_full_size_unet_equals_diffusers():
    ours, theirs = both_with_the_same_weights("unet")
    g = torch.Generator().manual_seed(1)
    x, c = torch.randn(1, 4, 16, 16, generator=g), torch.randn(1, 77, 768, generator=g)
    assert relative(ours(x, 501, c), theirs(x, 501, c).sample) < 1e-4


@torch.no_grad()
def test_full_size_vae_equals_diffusers():
    ours, theirs = both_with_the_same_weights("vae")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mine, yours = ours.encode(image), theirs.encode(image).latent_dist
    assert relative(mine.mean, yours.mean) < 1e-4 and relative(mine.std, yours.std) < 1e-4
    assert relative(ours.decode(mine.mean), theirs.decode(mine.mean).sample) < 1e-4


@torch.no_grad()
def test_full_size_text_encoder_equals_transformers():
    ours, theirs = both_with_the_same_weights("text_encoder")
    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(1))
    assert relative(ours(ids), theirs(ids).last_hidden_state) < 1e-4


# --- small ones: every kind of block, forward and gradients -------------------------------------------------------------------

SMALL_UNETS = {
    "as in SD 1.x": UNetConfig((32, 64, 64), (True, True, False), (4, 4, 4), 2, 24, norm_num_groups=8, sample_size=8),
    "as in SD 2.x": UNetConfig((32, 64), (True, False), (2, 4), 2, 24, norm_num_groups=8, use_linear_projection=True, sample_size=8),
    "as tabletop": UNetConfig((16, 32, 48), (True, True, False), (4, 4, 4), 1, 24, norm_num_groups=16, sample_size=8),
    "attention below only": UNetConfig((16, 32), (False, True), (2, 2), 1, 24, norm_num_groups=8, sample_size=8),
}


def load_ours_into(theirs: torch.nn.Module, ours: torch.nn.Module):
    ours.load_state_dict(random_weights({n: tuple(t.shape) for n, t in ours.state_dict().items()}))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def same_gradients(ours, theirs, outputs, expected, inputs):
    """Outputs, gradients of every parameter and of the inputs agree within 1e-4 of the largest entry."""
    for a, b in zip(outputs, expected):
        assert relative(a, b) < 1e-4
    down = [torch.randn(o.shape, generator=torch.Generator().manual_seed(2)) for o in outputs]
    names = list(dict(ours.named_parameters()))
    mine = torch.autograd.grad(outputs, [*ours.parameters(), *inputs], down)
    yours = torch.autograd.grad(expected, [dict(theirs.named_parameters())[n] for n in names] + inputs, down)
    for name, a, b in zip(names + ["input"] * len(inputs), mine, yours):
        if name.endswith(("k_proj.bias", "to_k.bias")):  # no gradient but rounding: a softmax does not see what all its entries share
            assert a.abs().max() < 1e-3
        else:
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6, name


@pytest.mark.parametrize("name", SMALL_UNETS)
def test_small_unets_equal_diffusers_with_gradients(name):
    config = SMALL_UNETS[name]
    ours, theirs = UNet(config), build_theirs("unet", formats.unet_to_diffusers(config))
    load_ours_into(theirs, ours)
    g = torch.Generator().manual_seed(1)
    x, c = torch.randn(2, 4, 8, 16, generator=g).requires_grad_(), torch.randn(2, 5, 24, generator=g).requires_grad_()
    t = torch.tensor([3, 981])
    same_gradients(ours, theirs, [ours(x, t, c)], [theirs(x, t, c).sample], [x, c])


@pytest.mark.parametrize("layers", [1, 2])
def test_small_vaes_equal_diffusers_with_gradients(layers):
    config = VAEConfig((16, 32, 32), layers, norm_num_groups=8, scaling_factor=0.5, sample_size=32)
    ours, theirs = VAE(config), build_theirs("vae", formats.vae_to_diffusers(config))
    load_ours_into(theirs, ours)
    g = torch.Generator().manual_seed(1)
    image, noise = torch.randn(2, 3, 16, 32, generator=g).requires_grad_(), torch.randn(2, 4, 4, 8, generator=g)
    mine, yours = ours.encode(image), theirs.encode(image).latent_dist
    z = yours.mean + yours.std * noise
    same_gradients(
        ours, theirs,
        [ours.decode(mine.sample(noise)), mine.mean, mine.logvar, mine.kl()],
        [theirs.decode(z).sample, yours.mean, yours.logvar, yours.kl()],
        [image],
    )  # fmt: skip


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_small_text_encoders_equal_transformers_with_gradients(act):
    config = CLIPTextConfig(300, 12, 32, 64, 3, 4, act)
    ours, theirs = CLIPText(config), build_theirs("text_encoder", formats.text_to_transformers(config, 298, 299, 299))
    load_ours_into(theirs, ours)
    ids = torch.randint(0, 298, (3, 12), generator=torch.Generator().manual_seed(1))
    same_gradients(ours, theirs, [ours(ids)], [theirs(ids).last_hidden_state], [])
