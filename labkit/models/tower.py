"""The image tower: a small convolutional network that turns a picture into one vector, and gives features on the way.

Trained against the text encoder (CLIP, Radford et al. 2021), it stands where LPIPS' VGG stands in Stable Diffusion: two
pictures are alike if its features are. Its last layer reads all 4x4 places apart, since captions speak of left and right.
"""
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from labkit.models.layers import GroupNorm


class ImageTower(nn.Module):
    """tower(image (B, 3, 128, 128) in [-1, 1]) -> (B, dim); tower.features(image) -> four maps from 32x32 down to 4x4."""

    def __init__(self, dim: int = 128, widths: tuple[int, ...] = (48, 96, 160, 192)) -> None:
        super().__init__()
        self.dim, self.widths = dim, widths
        self.patch = nn.Conv2d(3, widths[0], 4, stride=4)
        self.halve = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in zip(widths, widths[1:]))
        self.norm = nn.ModuleList(GroupNorm(8, o) for o in widths)
        self.mix = nn.ModuleList(nn.Conv2d(o, o, 3, padding=1) for o in widths)
        self.out = nn.Linear(widths[-1] * 16, dim)

    def features(self, image: Tensor) -> list[Tensor]:
        h, maps = self.patch(image), []  # (B, 48, 32, 32): a 4x4 patch is 48 numbers, none is lost
        for i, (norm, mix) in enumerate(zip(self.norm, self.mix)):
            h = self.halve[i - 1](h) if i > 0 else h
            h = norm(h)
            h = h + mix(F.silu(h))  # (B, widths[i], 32 / 2^i, 32 / 2^i)
            maps.append(h)
        return maps

    def forward(self, image: Tensor) -> Tensor:
        return self.out(rearrange(F.silu(self.features(image)[-1]), "b c h w -> b (c h w)"))  # (B, dim)
