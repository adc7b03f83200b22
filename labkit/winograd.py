"""A 3x3 convolution with half the multiplications: Winograd's minimal filtering down the columns, in strips that stay in the cache.

    F(4, 3):   y = A^T [(G g) . (B^T d)]      d: 6 rows of the map, g: 3 rows of the kernel, y: 4 rows of the result
               A^T, G, B^T interpolate at 0, 1, -1, 2, -2 and infinity                           Winograd 1980; Lavin & Gray 2016, section 4.1

Four rows of a column take 6 products instead of 4 * 3. "Product" is a convolution along the row here, with a kernel of 1x3 and all
channels, so nearly all of the work stays with oneDNN, which computes at the processor's ceiling: fewer multiplications
are all that is left to gain. Transforming columns as well would halve the products once more, but needs four times the
weights' memory instead of twice, and strides instead of whole rows in the transforms, which eat most of the gain.
The result is that of the plain convolution to some 2e-6 in float32. bfloat16 has too few digits for it.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Write = Callable[[Tensor, Tensor], object]  # f(rows, into) writes what it makes of some rows of a map

STRIP = 2**12  # pixels: with 128 channels 2 MB, and as much again for each transform

G = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))


class WinogradConv(nn.Module):
    """A 3x3 convolution, padded by one, in float32: (B, C, h, w) -> (B, C', h, w), channels last in memory."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.dense, self.bias = layer.weight.detach(), layer.bias.detach()  # what is saved; the products do not give it back exactly
        self.geometry = ([0, 1], [1, 1], [1, 1], 1)
        self.kernels = [torch.ops.mkldnn._reorder_convolution_weight(kernel, *self.geometry, None) for kernel in transformed(self.dense)]
        self.register_state_dict_post_hook(untransformed)

    def forward(self, x: Tensor, before: Write | None = None, skip: Callable[[slice], Tensor] | None = None) -> Tensor:
        """conv(before(x)) + skip, `before` and `skip` taken of the rows of a strip when it is that strip's turn."""
        h = x.shape[2]
        whole = empty(x, self.dense.shape[0], h + -h % 4)  # (B, C', h and up to 3 rows more, w)
        out = whole[:, :, :h]
        for top, window in windows(x, before or copied):  # (B, C, rows + 2, w)
            rows = slice(top, top + window.shape[2] - 2)
            self.rows(window, whole[:, :, rows])
            if skip:
                out[:, :, rows] += skip(rows)
        return out

    def rows(self, window: Tensor, out: Tensor) -> None:
        """Fill `out` (B, C', 4n, w) with the convolution of a window of as many rows and one more up and down (B, C, 4n + 2, w)."""
        (B, C, _, w), n = window.shape, out.shape[2] // 4
        d = window.new_empty((6, B, n, w, C)).permute(0, 1, 4, 2, 3)  # (6, B, C, n, w)
        transform_in([window[:, :, i : i + 4 * n - 3 : 4] for i in range(6)], d)
        bias = [None, self.bias, None, None, None, None]  # A^T's column of ones: product 1 is in each row once
        products = [
            torch.ops.mkldnn._convolution_pointwise(x, kernel, b, *self.geometry, "none", [], "") for x, kernel, b in zip(d, self.kernels, bias)
        ]  # 6 of (B, C', n, w)
        transform_out(products, out.unflatten(2, (n, 4)).unbind(3))


def transformed(weight: Tensor) -> Tensor:
    """G g: six kernels (6, C', C, 1, 3) of one (C', C, 3, 3); in float64 on the way, a few channels at a time.

    Large temporaries would leave holes among the packed weights that are allocated between them: five times their memory.
    """
    kernels, rows = weight.new_empty((6, *weight.shape[:2], 1, 3)), weight.new_tensor(G, dtype=torch.float64)
    for part, into in zip(weight.split(32), kernels.split(32, dim=1)):
        into[:, :, :, 0] = torch.einsum("ky,oiyx->koix", rows, part.double())
    return kernels


def transform_in(d: list[Tensor], out: Tensor) -> None:
    """B^T d: `out` has six tensors of the shape of each of d's six. Sums that two rows of B^T share are taken once."""
    a, b = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    torch.add(a, b, out=out[1])  # -4 d1 - 4 d2 + d3 + d4
    torch.sub(a, b, out=out[2])  #  4 d1 - 4 d2 - d3 + d4
    torch.sub(d[4], d[2], out=a), torch.sub(d[3], d[1], out=b)
    torch.add(a, b, alpha=2, out=out[3])  # -2 d1 - d2 + 2 d3 + d4
    torch.sub(a, b, alpha=2, out=out[4])  #  2 d1 - d2 - 2 d3 + d4
    torch.sub(d[5], d[3], out=out[5]).sub_(b, alpha=4)  # 4 d1 - 5 d3 + d5
    torch.sub(d[0], d[2], out=b), torch.add(a, b, alpha=4, out=out[0])  # 4 d0 - 5 d2 + d4


def transform_out(m: list[Tensor], out: list[Tensor]) -> None:
    """A^T m: `out` has four tensors of the shape of each of m's six."""
    plus, minus = m[1] + m[2], m[1] - m[2]
    plus2, minus2 = m[3] + m[4], m[3] - m[4]
    torch.add(minus, minus2, alpha=2, out=out[1])
    torch.add(plus, plus2, alpha=4, out=out[2])
    torch.add(plus.add_(plus2), m[0], out=out[0])
    torch.add(minus.add_(m[5]), minus2, alpha=8, out=out[3])


def copied(rows: Tensor, into: Tensor) -> None:
    into.copy_(rows)


def windows(x: Tensor, f: Write) -> Iterator[tuple[int, Tensor]]:
    """Cut f(x) for a convolution: (first row, window) from the top down.

    A window is (B, C, 4n + 2, w), channels last: the rows of a strip with one more up and one more down, zero where that is outside of the
    map.
    """
    h, count = x.shape[2], rows_at_once(x)
    for top in range(0, h, count):
        height = min(count, h - top + -(h - top) % 4) + 2
        first, last = max(top - 1, 0), min(top - 1 + height, h)  # what of the window is in the map
        window = empty(x, x.shape[1], height)
        window[:, :, : first - top + 1] = 0
        f(x[:, :, first:last], window[:, :, first - top + 1 : last - top + 1])
        window[:, :, last - top + 1 :] = 0
        yield top, window


def rows_at_once(x: Tensor) -> int:
    """How many rows of a map (B, C, h, w) are a strip: a multiple of four."""
    return max(4, STRIP // (x.shape[0] * x.shape[3]) // 4 * 4)


def empty(x: Tensor, channels: int, height: int) -> Tensor:
    """A map beside x, (B, channels, height, w), with channels last in memory and nothing in it yet."""
    return torch.empty((x.shape[0], channels, height, x.shape[3]), dtype=x.dtype, memory_format=torch.channels_last)


def untransformed(layer: WinogradConv, state: dict, prefix: str, metadata: dict) -> None:
    """Put a convolution's parameters into a state dict, under their names."""
    state[f"{prefix}weight"] = layer.dense
    state[f"{prefix}bias"] = layer.bias
