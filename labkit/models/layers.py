"""The parts everything is built of: timestep embedding, group norm, ResNet block, attention, transformer block.

    gamma(t) = [cos(t w_0), ..., sin(t w_0), ...],  w_i = 10000^(-i / (d/2))          DDPM (Ho et al. 2020), after Vaswani et al. 2017
    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_head)) V                              Vaswani et al. 2017, eq. 1
    GEGLU(x) = (x W + b) * gelu(x V + c)                                              Shazeer 2020

Attention has five taps: `q`, `k` and `v`, queries, keys and values, `probs`, the attention probabilities, and `heads`, the output of every head.
While nobody listens at `probs` the fused kernel is used, which never forms the probabilities; where somebody does, the softmax is explicit. `attend`
is that kernel: a function of q, k, v, which `labkit.optimize` exchanges for one that is faster on a CPU.
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from labkit.errors import LabkitError
from labkit.tap import Tap


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features of the timestep, cosines first: (B,) -> (B, dim), float32. DDPM, appendix B."""
    half = dim // 2
    w = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)  # (dim/2,)
    angle = t.float()[:, None] * w[None, :]  # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # (B, dim)


class TimestepMLP(nn.Module):
    """Two linear layers that turn the sinusoidal features into the embedding every ResNet block receives."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))  # (B, dim)


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018), in float32 under autocast on a CPU too, as torch has it on a GPU: the sums are exact, and bfloat16's kernel is five times slower."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a skip; the timestep embedding is added in between (none in the VAE)."""

    def __init__(self, c_in: int, c_out: int, temb_dim: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if temb_dim is not None:
            self.time_emb_proj = nn.Linear(temb_dim, c_out)
        self.norm2 = GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, h, w)
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]  # (B, c_out, 1, 1) over all places
        h = self.conv2(F.silu(self.norm2(h)))  # (B, c_out, h, w)
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


class Attention(nn.Module):
    """Multi-head attention from x to a context (cross-attention), or to x itself where the context is None."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, qkv_bias: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise LabkitError(f"{heads} attention heads cannot share {dim} channels evenly")
        self.num_heads = heads
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list of one, because its parameters are called to_out.0
        self.attend = F.scaled_dot_product_attention
        self.q = Tap()  # (B, heads, N, d)
        self.k, self.v = Tap(), Tap()  # (B, heads, L, d)
        self.probs = Tap()  # (B, heads, N, L)
        self.heads = Tap()  # (B, heads, N, d)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.q(rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.num_heads))
        k = self.k(rearrange(self.to_k(context), "b l (h d) -> b h l d", h=self.num_heads))
        v = self.v(rearrange(self.to_v(context), "b l (h d) -> b h l d", h=self.num_heads))
        if self.probs.active:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, heads, N, L); scaled first: SD 2's products leave float16
            out = self.probs(scores.softmax(dim=-1)) @ v  # (B, heads, N, d)
        else:
            out = self.attend(q, k, v)  # (B, heads, N, d)
        out = rearrange(self.heads(out), "b h n d -> b n (h d)")
        return self.to_out[0](out)  # (B, N, dim)


class GEGLU(nn.Module):
    """A linear layer whose one half gates the other."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # each (B, N, inner)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, then back. (net.1 is where others keep their dropout.)"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))  # (B, N, dim)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each on the LayerNorm of the residual stream and added to it."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))  # (B, N, dim): places look at places
        x = x + self.attn2(self.norm2(x), c)  # places look at words
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Unrolls the picture into a sequence of places, runs transformer blocks with the text, and rolls it up again."""

    def __init__(self, dim: int, heads: int, context_dim: int, groups: int, linear: bool, depth: int = 1) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(dim, heads, context_dim) for _ in range(depth))
        self.proj_out = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        height, skip = x.shape[-2], x
        x = self.norm(x)
        x = x if self.linear else self.proj_in(x)
        x = rearrange(x, "b c h w -> b (h w) c")  # (B, N, C)
        x = self.proj_in(x) if self.linear else x
        for block in self.transformer_blocks:
            x = block(x, c)
        x = self.proj_out(x) if self.linear else x
        x = rearrange(x, "b (h w) c -> b c h w", h=height)  # (B, C, h, w)
        x = x if self.linear else self.proj_out(x)
        return x + skip
