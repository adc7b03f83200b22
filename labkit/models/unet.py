"""The U-Net that predicts the noise: eps_theta(x_t, t, c).

    L = E_{x0, eps, t} || eps - eps_theta(sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, t, c) ||^2        LDM, eq. 3

Down through resolutions keeping what was seen (skips), a middle with attention, up again with the skips joined on. Text
enters by cross-attention in the transformers, time by an embedding added in every ResNet block. In SD 1.5 (64x64 latents)
the transformers sit at 64x64, 32x32, 16x16 and in the 8x8 middle, with eight heads everywhere.

    temb = MLP(gamma(t)) + MLP'([pooled text, gamma(height), gamma(width), ...])                            SDXL, section 2.2

SDXL adds what a `Condition` has besides states to the time embedding: the text as one vector, and sizes in pixels.
Parameter names are those of diffusers' UNet2DConditionModel. `resid` taps carry the residual stream after each block.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.errors import LabkitError
from labkit.models.condition import Condition
from labkit.models.config import UNetConfig
from labkit.models.layers import GroupNorm, ResnetBlock, SpatialTransformer, TimestepMLP, timestep_embedding
from labkit.tap import Tap


class UNet(nn.Module):
    """eps = unet(x_t, t, c): x_t (B, 4, h, w), t () or (B,) timesteps 0..999, c (B, L, D) text states -> (B, 4, h, w).

    SDXL's c is a Condition. A network for inpainting takes nine channels: x_t, the mask, the latent of the masked picture.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, temb = config.block_out_channels, config.time_embed_dim
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], temb)
        if config.addition_time_embed_dim:
            self.add_embedding = TimestepMLP(config.projection_class_embeddings_input_dim, temb)
        self.down_blocks = nn.ModuleList(Down(config, level) for level in range(len(widths)))
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList(Up(config, level) for level in reversed(range(len(widths))))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.out = Tap()  # (B, 4, h, w) what is predicted: eps, v or x0

    def forward(self, x_t: Tensor, t: Tensor | int, c: Tensor | Condition) -> Tensor:
        self.check(x_t, c)
        temb, c = self.embed(x_t, t, c), states_of(c)  # (B, temb), (B, L, D)
        h = self.conv_in(x_t)  # (B, C0, h, w)
        skips = [h]
        for block in self.down_blocks:
            h, seen = block(h, temb, c)  # (B, Ci, h/2^i, w/2^i)
            skips += seen
        h = self.mid_block(h, temb, c)
        for block in self.up_blocks:
            h = block(h, skips, temb, c)  # pops its skips
        return self.out(self.conv_out(F.silu(self.conv_norm_out(h))))  # (B, 4, h, w)

    def embed(self, x_t: Tensor, t: Tensor | int, c: Tensor | Condition) -> Tensor:
        """What every ResNet block is told: the timestep, and for SDXL the pooled text and the sizes; (B, temb)."""
        t = torch.as_tensor(t, device=x_t.device).expand(x_t.shape[0])  # (B,)
        temb = self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).to(x_t.dtype))  # (B, temb)
        if isinstance(c, Condition):
            sizes = timestep_embedding(c.sizes.flatten(), self.config.addition_time_embed_dim)  # (B * 6, 256)
            told = torch.cat([c.pooled.to(x_t.dtype), sizes.to(x_t.dtype).view(len(c), -1)], dim=1)  # (B, 2816)
            temb = temb + self.add_embedding(told)
        return temb

    def check(self, x_t: Tensor, c: Tensor | Condition) -> None:
        """Raise LabkitError where the shapes cannot be right."""
        config, multiple = self.config, 2 ** (len(self.config.block_out_channels) - 1)
        if x_t.ndim != 4 or x_t.shape[1] != config.in_channels or x_t.shape[2] % multiple or x_t.shape[3] % multiple:
            raise LabkitError(f"x_t has shape {tuple(x_t.shape)}, expected (B, {config.in_channels}, h, w) with h and w multiples of {multiple}")
        per_size = config.addition_time_embed_dim
        if isinstance(c, Condition) != bool(per_size):
            is_, expected = type(c).__name__, "a Condition (text states, pooled text, sizes)" if per_size else "text states (B, tokens, D) alone"
            raise LabkitError(f"c is a {is_}, this U-Net reads {expected}; take the condition from the model's own encode_text.")
        if per_size and c.pooled.shape[1] + per_size * c.sizes.shape[1] != config.projection_class_embeddings_input_dim:
            raise LabkitError(
                f"c has a pooled text of {c.pooled.shape[1]} and {c.sizes.shape[1]} sizes, expected {config.projection_class_embeddings_input_dim}"
                f" numbers together, {per_size} for each size"
            )
        c = states_of(c)
        if c.ndim != 3 or c.shape[0] != x_t.shape[0] or c.shape[2] != config.cross_attention_dim:
            raise LabkitError(f"c has shape {tuple(c.shape)}, expected ({x_t.shape[0]}, tokens, {config.cross_attention_dim})")


class Down(nn.Module):
    """One resolution on the way down: ResNet blocks, each followed by a transformer where this level has them; then halve."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        width, last = config.block_out_channels[level], level == len(config.block_out_channels) - 1
        ins = [config.block_out_channels[max(level - 1, 0)]] + [width] * (config.layers_per_block - 1)
        if config.cross_attention[level]:
            self.attentions = nn.ModuleList(transformer(config, level) for _ in ins)
        self.resnets = nn.ModuleList(resnet(config, c_in, width) for c_in in ins)
        if not last:
            self.downsamplers = nn.ModuleList([Downsample(width, padding=1)])
        self.resid = Tap()  # (B, C, h, w) after the last block, before halving

    def forward(self, h: Tensor, temb: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen = []
        for i, block in enumerate(self.resnets):
            h = block(h, temb)
            if hasattr(self, "attentions"):
                h = self.attentions[i](h, c)
            seen.append(h)
        seen[-1] = h = self.resid(h)
        if hasattr(self, "downsamplers"):
            h = self.downsamplers[0](h)  # (B, C, h/2, w/2)
            seen.append(h)
        return h, seen


class Middle(nn.Module):
    """The bottom: ResNet block, transformer, ResNet block."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.attentions = nn.ModuleList([transformer(config, len(config.block_out_channels) - 1)])
        self.resnets = nn.ModuleList(resnet(config, width, width) for _ in range(2))
        self.resid = Tap()

    def forward(self, h: Tensor, temb: Tensor, c: Tensor) -> Tensor:
        h = self.resnets[0](h, temb)
        h = self.attentions[0](h, c)
        return self.resid(self.resnets[1](h, temb))


class Up(nn.Module):
    """One resolution on the way up: as `Down`, one block more, each block sees a skip of the way down; then double."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths, n = config.block_out_channels, config.layers_per_block + 1
        width = widths[level]
        below = widths[min(level + 1, len(widths) - 1)]  # what comes from the level below (or the middle)
        skips = [width] * (n - 1) + [widths[max(level - 1, 0)]]  # the last skip is the way down's input to this level
        if config.cross_attention[level]:
            self.attentions = nn.ModuleList(transformer(config, level) for _ in range(n))
        self.resnets = nn.ModuleList(
            resnet(config, (below if i == 0 else width) + skip, width) for i, skip in enumerate(skips))
        if level > 0:
            self.upsamplers = nn.ModuleList([Upsample(width)])
        self.resid = Tap()  # (B, C, h, w) after the last block, before doubling

    def forward(self, h: Tensor, skips: list[Tensor], temb: Tensor, c: Tensor) -> Tensor:
        for i, block in enumerate(self.resnets):
            h = block(torch.cat([h, skips.pop()], dim=1), temb)  # (B, C, h, w)
            if hasattr(self, "attentions"):
                h = self.attentions[i](h, c)
        h = self.resid(h)
        return self.upsamplers[0](h) if hasattr(self, "upsamplers") else h


class Downsample(nn.Module):
    """Halve the picture by a 3x3 convolution with stride 2; padding 0 (the VAE) pads below and to the right only."""

    def __init__(self, width: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))  # (B, C, h/2, w/2)


class Upsample(nn.Module):
    """Double the picture by repeating pixels, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2h, 2w)


def states_of(c: Tensor | Condition) -> Tensor:
    """The text states (B, L, D) of a condition of either kind."""
    return c.states if isinstance(c, Condition) else c


def resnet(config: UNetConfig, c_in: int, c_out: int) -> ResnetBlock:
    return ResnetBlock(c_in, c_out, config.time_embed_dim, config.norm_num_groups, eps=1e-5)


def transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    return SpatialTransformer(config.block_out_channels[level], config.num_attention_heads[level],
                              config.cross_attention_dim, config.norm_num_groups, config.use_linear_projection, config.depth(level))
