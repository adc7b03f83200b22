"""Numbers about pictures, and how sure one can be of them.

    bootstrap: the 2.5 % and 97.5 % points of the mean over prompts drawn with replacement (Efron 1979); a prompt's seeds stay together
    PSNR = 10 log10(1 / mean (x - y)^2)
    SSIM = mean of (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 + s_y^2 + c2))          Wang et al. 2004, eq. 13
    d(x, y) = mean over maps l and places of |f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)||^2                  what LPIPS (Zhang et al. 2018) does with VGG's maps
    Frechet = |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))                                         Dowson & Landau 1982

Features are those of the shipped image tower, not of an Inception network: the last one is no FID and compares with none.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabkitError
from labkit.models.sources import DATA
from labkit.models.tower import ImageTower

TOWER = DATA / "tabletop" / "image_tower" / "model.safetensors"
DRAWS = 2000  # bootstrap samples


def bootstrap(groups: Sequence[Sequence[Sequence[float]]], draws: int = DRAWS, seed: int = 0) -> dict[str, float]:
    """The mean over groups of each one's mean over prompts, with a 95 % interval: {share, low, high}.

    groups: for each group its prompts, for each prompt the values of its pictures. What is drawn anew is prompts, in each group apart: pictures of one
    prompt are right or wrong together, so that drawing pictures would promise too much.
    """
    if not groups or not all(len(group) and all(len(prompt) for prompt in group) for group in groups):
        raise LabkitError("there is nothing to take a mean of; give every group a prompt and every prompt a picture")
    rng, means = np.random.default_rng(seed), []
    for group in groups:
        values = np.array([np.mean(prompt) for prompt in group])
        means.append((values.mean(), values[rng.integers(len(values), size=(draws, len(values)))].mean(1)))
    low, high = np.percentile(np.mean([drawn for _, drawn in means], axis=0), (2.5, 97.5))
    return {"share": round(float(np.mean([mean for mean, _ in means])), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal to noise of each picture in dB, (B,); x and y (B, 3, H, W) in [0, 1]. Equal pictures give infinity."""
    return -10 * torch.log10((x - y).pow(2).flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor, side: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity of each picture, (B,); x and y (B, 3, H, W) in [0, 1]. Gaussian window, colours apart, borders left out."""
    line = torch.exp(-((torch.arange(side) - side // 2) ** 2) / (2 * sigma**2)).to(x)
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, side, side)

    def local(z: Tensor) -> Tensor:
        return F.conv2d(z, window, groups=3)  # (B, 3, H - 10, W - 10)

    c1, c2 = 0.01**2, 0.03**2
    mx, my = local(x), local(y)
    vx, vy, cov = local(x * x) - mx * mx, local(y * y) - my * my, local(x * y) - mx * my
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).flatten(1).mean(1)


def saturation(x: Tensor) -> Tensor:
    """How coloured each picture is, (B,): the mean over pixels of the largest minus the smallest of R, G, B; x (B, 3, H, W) in [0, 1]."""
    return (x.amax(1) - x.amin(1)).flatten(1).mean(1)


def burnt(x: Tensor) -> Tensor:
    """The share of pixels, (B,), of which a colour is at the end of its scale (0 or 255 of 8 bits); x (B, 3, H, W) in [0, 1]."""
    levels = (x * 255).round()
    return ((levels == 0) | (levels == 255)).any(1).flatten(1).float().mean(1)


def load_tower(path: Path = TOWER) -> ImageTower:
    """An image tower in float32, frozen, in evaluation mode; the shipped one unless said: one ruler for all models."""
    from safetensors.torch import load_file

    tower = ImageTower()
    tower.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return tower.eval().requires_grad_(False)


@torch.no_grad()
def features(tower: ImageTower, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The tower's maps (B, C_l, h_l, w_l), each place of length one, and its vector (B, 128), of length one as contrastive training compares it; x (B, 3, 128, 128) in [0, 1]."""
    signed = x * 2 - 1
    return [F.normalize(maps, dim=1) for maps in tower.features(signed)], F.normalize(tower(signed), dim=1)


def apart(maps: list[Tensor]) -> float:
    """The mean distance d of all pairs of the B pictures with these maps."""
    first, second = torch.triu_indices(len(maps[0]), len(maps[0]), 1)
    return float(sum((m[first] - m[second]).pow(2).sum(1).mean() for m in maps) / len(maps))


def frechet(x: Tensor, y: Tensor) -> float:
    """The Frechet distance of Gaussians fitted to two sets of vectors, (N, D) and (M, D); it grows as N and M get small, so compare equal ones."""
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise LabkitError(f"vectors {tuple(x.shape)} and {tuple(y.shape)} cannot be compared; give two or more of one length each")
    x, y = x.double(), y.double()
    cx, cy = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(x.shape[1], -1)
    root = torch.linalg.eigvals(cx @ cy).real.clamp_min(0).sqrt().sum()  # the trace of the root: eigenvalues of the product are those of a symmetric matrix
    return float((x.mean(0) - y.mean(0)).square().sum() + cx.trace() + cy.trace() - 2 * root)
