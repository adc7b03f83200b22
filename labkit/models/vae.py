"""The KL autoencoder: a picture of H x W x 3 to a latent of H/f x W/f x 4 and back.

    q(z | x) = N(z; mu(x), diag sigma(x)^2),   z = mu + sigma * noise                         Kingma & Welling 2013
    KL(q || N(0, I)) = 1/2 sum (mu^2 + sigma^2 - 1 - log sigma^2)                              ibid., appendix B

With f = 8 and 4 channels a 512x512 picture (786,432 numbers) becomes 16,384: 48 times fewer. The diffusion runs on
`scaling_factor * z`, which has about unit variance (LDM, appendix G). Parameter names are those of diffusers' AutoencoderKL.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from labkit.errors import LabkitError
from labkit.models.config import VAEConfig
from labkit.models.layers import Attention, GroupNorm, ResnetBlock
from labkit.models.unet import Downsample, Upsample


@dataclass(frozen=True)
class DiagonalGaussian:
    """What the encoder says of a picture: mean and log variance, each (B, 4, h, w), not yet scaled."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def mode(self) -> Tensor:
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, with noise from N(0, I) of the mean's shape."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL divergence to N(0, I) in nats, summed over each latent: (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class VAE(nn.Module):
    """encode: (B, 3, H, W) in [-1, 1] -> DiagonalGaussian over (B, 4, H/f, W/f); decode: the way back."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        f = self.config.factor
        if image.ndim != 4 or image.shape[1] != self.config.in_channels or image.shape[2] % f or image.shape[3] % f:
            raise LabkitError(f"image has shape {tuple(image.shape)}, expected (B, {self.config.in_channels}, H, W) with H and W multiples of {f}")
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)  # each (B, 4, h, w)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise LabkitError(f"z has shape {tuple(z.shape)}, expected (B, {self.config.latent_channels}, h, w)")
        return self.decoder(self.post_quant_conv(z))  # (B, 3, H, W)


class Encoder(nn.Module):
    """Convolutions down to 1/f, a middle with attention, and twice four channels out: mean and log variance."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage(config, widths[max(i - 1, 0)], w, config.layers_per_block, down=i < len(widths) - 1) for i, w in enumerate(widths))
        self.mid_block = Middle(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, C0, H, W)
        for layer in (layer for block in self.down_blocks for layer in block.layers()):
            h = layer(h)  # (B, Ci, H/2^i, W/2^i)
        h = self.mid_block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))  # (B, 8, h, w)


class Decoder(nn.Module):
    """The mirror image, with one ResNet block more at each resolution."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList(
            Stage(config, widths[max(i - 1, 0)], w, config.layers_per_block + 1, up=i < len(widths) - 1) for i, w in enumerate(widths))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))  # (B, C, h, w)
        for layer in (layer for block in self.up_blocks for layer in block.layers()):
            h = layer(h)  # one after the other: a call of the whole block would keep its input, the largest map, until it ends
        return self.conv_out(F.silu(self.conv_norm_out(h)))  # (B, 3, H, W)


class Stage(nn.Module):
    """The ResNet blocks of one resolution, then a halving (encoder) or doubling (decoder) if asked for."""

    def __init__(self, config: VAEConfig, c_in: int, c_out: int, layers: int, down: bool = False, up: bool = False) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, None, config.norm_num_groups, eps=1e-6) for i in range(layers))
        if down:
            self.downsamplers = nn.ModuleList([Downsample(c_out, padding=0)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def layers(self) -> list[nn.Module]:
        """What a map goes through, in this order."""
        return [*self.resnets, *getattr(self, "downsamplers", getattr(self, "upsamplers", ()))]


class Middle(nn.Module):
    """ResNet block, one head of attention over all places, ResNet block."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        attention = Attention(width, heads=1, qkv_bias=True)
        attention.group_norm = GroupNorm(config.norm_num_groups, width, eps=1e-6)  # lives here in the checkpoints
        self.attentions = nn.ModuleList([attention])
        self.resnets = nn.ModuleList(ResnetBlock(width, width, None, config.norm_num_groups, eps=1e-6) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        h = self.resnets[0](h)  # (B, C, h, w)
        places = rearrange(self.attentions[0].group_norm(h), "b c h w -> b (h w) c")
        h = h + rearrange(self.attentions[0](places), "b (h w) c -> b c h w", h=h.shape[2])
        return self.resnets[1](h)
