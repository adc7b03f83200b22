"""The same networks, faster on a CPU: weights laid out once for the kernels that read them.

    y = W x + b,   W reordered beforehand into the blocks in which oneDNN multiplies          convolutions and linear layers
    k, v = W_k c, W_v c,   once a prompt, not once a step                                      cross-attention
    softmax(q_i K^T / sqrt(d)) V,   one tile of queries i after the other, as products         self-attention
    conv3(double(x)) = four conv2(x),   one for each place in a doubled pixel                   upsampling
    conv3(SiLU(norm(x))) + skip,   strip by strip of rows, by winograd.py                       ResNet blocks of the VAE's decoder

The model files say what is computed and know nothing of this. `optimize` makes a second LatentDiffusion whose U-Net and VAE
are the same modules around other leaves; the first stays as it is. Outputs agree to rounding, some 1e-6 in float32. It
is for drawing: there are no gradients. Taps, recording and saving work as before.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.device import keep_freed_memory
from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.models.layers import Attention, ResnetBlock
from labkit.models.unet import Upsample
from labkit.strips import whole_norm
from labkit.tap import taps
from labkit.winograd import WinogradConv, copied, windows

KERNELS = ("_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise", "_reorder_convolution_weight")
ROWS = 512  # that linear layers' blocks are chosen for (they serve any number), and queries in a tile of self-attention
WIDE = 128  # channels from which on strips and Winograd's transforms cost less than they save
LONG = 1024  # keys from which on tiles beat the fused kernel


def optimize(lab: LatentDiffusion) -> LatentDiffusion:
    """A LatentDiffusion that draws what `lab` draws, faster on a CPU; `lab` itself is not changed.

    It holds its own copy of the large weights, so `lab = labkit.optimize(lab)` keeps one of them. Raises LabkitError if the
    model is not on a CPU, or if this build of torch lacks the kernels, or this processor the model's type.
    """
    if lab.device.type != "cpu":
        raise LabkitError(f"optimize is for models on a CPU, this one is on {lab.device}: use it as it is.")
    if not available():
        raise LabkitError("This build of torch lacks the oneDNN kernels that optimize needs: use the model as it is.")
    if not available(lab.dtype):
        raise LabkitError(f"This processor has no products of {str(lab.dtype).removeprefix('torch.')}: load the model with dtype='float32', or use it as it is.")
    if any(isinstance(module, PackedLinear) for module in lab.unet.modules()):
        return lab
    fast = copy.copy(lab)
    fast.unet, fast.vae = pack(lab.unet), pack(lab.vae, but="encoder")
    keep_freed_memory()  # only now: what packing needed on the way goes back
    return fast


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of torch has the kernels, and this processor the type; torch's own compiler uses the same ones."""
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in KERNELS):
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), ROWS)
    except RuntimeError:  # it knows best, and says so of half types where the processor lacks them
        return False
    return True


@torch.no_grad()
def pack(network: nn.Module, but: str | None = None) -> nn.Module:
    """A copy of a network with its convolutions and linear layers packed; what is small is shared with the original, and the part called `but`.

    A VAE's encoder is such a part: drawing needs it not at all, or once, and its weights would be there twice.
    """
    fast = copy.deepcopy(network, {id(p): p for p in network.parameters()})  # deepcopy takes these for copied already
    for tap in taps(fast).values():
        tap.listeners = []  # who listens to the original does not listen to the copy
    for path, module in list(fast.named_modules()):  # outer modules come first, so what is replaced whole is not looked into
        if type(module) is Upsample or but is not None and (path == but or path.startswith(f"{but}.")):
            continue
        halved = in_strips(path, module)
        for name, child in list(module.named_children()):
            if type(child) is Upsample:
                setattr(module, name, PackedUpsample(child))
            elif type(child) is nn.Conv2d and halved and child.kernel_size == (3, 3):
                setattr(module, name, WinogradConv(child))
            elif type(child) is nn.Conv2d:
                pointwise = child.kernel_size == (1, 1) and child.stride == (1, 1) and child.padding == (0, 0) and child.groups == 1
                setattr(module, name, (PackedPointwise if pointwise else PackedConv)(child))
            elif type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child, remember=path.endswith("attn2") and name in ("to_k", "to_v")))
        if isinstance(module, Attention):
            module.attend = tiled_attention
        if halved:
            parent, _, name = path.rpartition(".")
            setattr(fast.get_submodule(parent), name, StripResnet(module))
    return fast.eval()


def in_strips(path: str, module: nn.Module) -> bool:
    """Whether a module is a wide ResNet block of a decoder in float32. Winograd's weights are twice as many: few beside the maps here, not in a U-Net."""
    if type(module) is not ResnetBlock or not path.startswith("decoder."):
        return False
    return module.conv1.weight.dtype is torch.float32 and min(module.conv1.weight.shape[:2]) >= WIDE


class PackedLinear(nn.Module):
    """y = W x + b, (..., in) -> (..., out); with `remember`, the last answer again if asked the same.

    Keys and values of a text stay the same for all steps; comparing texts costs nothing beside a product with W.
    """

    def __init__(self, layer: nn.Linear, remember: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS), detached(layer.bias)
        self.remember, self.last = remember, None  # last: (x, y)
        self.register_state_dict_post_hook(unpacked)

    def forward(self, x: Tensor) -> Tensor:
        if self.last is not None and torch.equal(self.last[0], x):
            return self.last[1]
        y = torch.ops.mkldnn._linear_pointwise(without_gradient(x), self.weight, self.bias, "none", [], "")
        self.last = (x.clone(), y) if self.remember else None
        return y


class PackedConv(nn.Module):
    """A 2-d convolution, (B, C, h, w) -> (B, C', h', w'), channels last in memory."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.padding = layer.padding  # the U-Net's Downsample asks for it
        self.geometry = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(layer.weight.detach(), *self.geometry, None)
        self.bias = detached(layer.bias)
        self.register_state_dict_post_hook(unpacked)

    def forward(self, x: Tensor) -> Tensor:
        x = without_gradient(x).contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, "none", [], "")


class PackedPointwise(nn.Module):
    """A 1x1 convolution, (B, C, h, w) -> (B, C', h, w): with channels last it is a linear layer of every place, and faster as one."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()[:, :, 0, 0].contiguous(), ROWS), detached(layer.bias)
        self.register_state_dict_post_hook(unpacked)

    def forward(self, x: Tensor) -> Tensor:
        x = without_gradient(x).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # (B, h, w, C), no copy
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "").permute(0, 3, 1, 2)  # (B, C', h, w)


class PackedUpsample(nn.Module):
    """Doubling by repetition and then a 3x3 convolution, (B, C, h, w) -> (B, C', 2h, 2w), as four 2x2 convolutions of the small map.

    A pixel of the doubled map has one of four places in its cell. At each, the nine pixels that the kernel covers are copies of
    four, so the weights of equal ones are added up beforehand: the same sums in 4/9 of the multiplications.
    """

    def __init__(self, layer: Upsample) -> None:
        super().__init__()
        self.dense, self.bias = layer.conv.weight.detach(), detached(layer.conv.bias)  # sums cannot be taken apart again
        self.geometry = ([0, 1], [1, 1], [1, 1], 1)
        fold = self.dense.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # (place in the cell, small row, row of the kernel)
        weights = torch.einsum("ayr,bxs,oirs->aboiyx", fold, fold, self.dense)  # (2, 2, C', C, 2, 2)
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self.weights = [[reorder(weights[a, b].contiguous(), *self.geometry, None) for b in (0, 1)] for a in (0, 1)]
        self.register_state_dict_post_hook(undoubled)

    def forward(self, x: Tensor) -> Tensor:
        (B, _, h, w), C = without_gradient(x).shape, self.dense.shape[0]
        out = torch.empty((B, C, 2 * h, 2 * w), dtype=x.dtype, memory_format=torch.channels_last)
        for top, window in windows(x, copied):  # (B, C, rows + 2, w)
            rows = min(window.shape[2] - 2, h - top)
            for a in (0, 1):
                part = window[:, :, a : a + rows + 1].contiguous(memory_format=torch.channels_last)
                for b in (0, 1):  # padded left and right the convolution has w + 1 columns; the place takes the first or the last w
                    y = torch.ops.mkldnn._convolution_pointwise(part, self.weights[a][b], self.bias, *self.geometry, "none", [], "")
                    out[:, :, 2 * top + a : 2 * (top + rows) : 2, b::2] = y[..., b : b + w]
        return out


class StripResnet(nn.Module):
    """A ResNet block without timestep, (B, C, h, w) -> (B, C', h, w), whose norms and SiLUs are taken strip by strip as its convolutions come to them.

    So what is normalised never leaves the cache, and of the three maps that each half would make only its result is there whole.
    """

    def __init__(self, block: ResnetBlock) -> None:
        super().__init__()
        for name, child in block.named_children():  # convolutions by Winograd; in the order in which they are saved
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        without_gradient(self.norm1.weight)
        x = without_gradient(x).contiguous(memory_format=torch.channels_last)  # (B, C, h, w)
        h = self.conv1(x, normed_silu(self.norm1, x))  # (B, C', h, w)
        shortcut = getattr(self, "conv_shortcut", lambda part: part)
        return self.conv2(h, normed_silu(self.norm2, h), lambda rows: shortcut(x[:, :, rows]))


def normed_silu(norm: nn.GroupNorm, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """SiLU(norm(x)) as a function that writes it for some rows of x."""
    normed = whole_norm(norm, [x])
    return lambda rows, into: F.silu(normed(rows, out=into), inplace=True)


def undoubled(layer: PackedUpsample, state: dict, prefix: str, metadata: dict) -> None:
    """Put an upsampling's parameters into a state dict, under their names."""
    state[f"{prefix}conv.weight"] = layer.dense
    state[f"{prefix}conv.bias"] = layer.bias


def without_gradient(x: Tensor) -> Tensor:
    """x itself; LabkitError where somebody wants gradients, which would be silently missing."""
    if x.requires_grad and torch.is_grad_enabled():
        raise LabkitError("An optimised model has no gradients: use the model that it was made of.")
    return x


def detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def unpacked(layer: PackedLinear | PackedConv | PackedPointwise, state: dict, prefix: str, metadata: dict) -> None:
    """Put a packed layer's parameters into a state dict, dense, under their names, as the original has them."""
    weight = layer.weight.to_dense()
    state[f"{prefix}weight"] = weight[:, :, None, None] if isinstance(layer, PackedPointwise) else weight
    if layer.bias is not None:
        state[f"{prefix}bias"] = layer.bias


def tiled_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; q (B, heads, N, d), k and v (B, heads, L, d) -> (B, heads, N, d)."""
    N, L, d = q.shape[2], k.shape[2], q.shape[3]
    if L < LONG:
        return F.scaled_dot_product_attention(q, k, v)
    product = torch.ops.mkldnn._linear_pointwise  # x, W -> x W^T, by oneDNN, where `@` would go to a slower library
    out = torch.empty_like(q)
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        keys, values = k[b, h] * d**-0.5, v[b, h].T.contiguous()  # (L, d), (d, L)
        for i in range(0, N, ROWS):
            probs = product(q[b, h, i : i + ROWS].contiguous(), keys, None, "none", [], "").softmax(-1)  # (ROWS, L)
            out[b, h, i : i + ROWS] = product(probs, values, None, "none", [], "")  # (ROWS, d)
    return out
