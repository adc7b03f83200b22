"""Training of the KL autoencoder: reconstruct, look alike, fool a discriminator, stay near a unit Gaussian.

    L = |x - x^| + 4 |x - x^|^2 + a P(x, x^) + b KL(q(z|x) || N(0, I)) + c lambda L_adv            LDM (Rombach et al. 2022), section 3.1 and appendix G
        + d (1 - SSIM(x, x^))                                                                      Zhao et al. 2017, "Loss functions for image restoration"
    lambda = |grad_W (rec)| / |grad_W (adv)|,  W the decoder's last layer            VQGAN (Esser et al. 2021), eq. 7

P compares normalised features of the image tower (what LPIPS does with VGG's). The discriminator judges patches (Isola et al.
2017) by the hinge loss. KL is per latent value and tiny: it keeps the latents from running away, it does not make them Gaussian.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.models.tower import ImageTower
from labkit.models.vae import VAE, DiagonalGaussian
from labkit.training.data import contact_sheet, to_signed
from labkit.training.loop import Player, Recipe, Share
from labkit.training.measures import ssim


@dataclass(frozen=True)
class VAELoss:
    """Weights of the terms, and the steps at which the later ones enter."""

    squared: float = 4.0  # squared beside absolute error: rare strong colours are learnt much sooner
    perceptual: float = 2.0
    kl: float = 1e-6  # LDM's: per summed nat, with the reconstruction summed too
    adversarial: float = 0.1  # 0: there is no discriminator
    structural: float = 0.0  # of what SSIM lacks to 1: fine lines count as much as strong ones
    perceptual_from: int = 1200
    adversarial_from: int = 4800
    full_from: int = 1000  # before, four times as many crops of a quarter of the picture: more to see while all is coarse


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of about 30x30 pixels: (B, 3, H, W) -> (B, 1, H/8, W/8); high for real."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.GroupNorm(8, 4 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


def perceptual(tower: ImageTower, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance of channel-normalised features over the tower's maps: ()."""
    fx, fy = ([maps.float() for maps in tower.features(z)] for z in (x, y))
    return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).pow(2).sum(1).mean() for a, b in zip(fx, fy)) / len(fx)


class Reconstruction(nn.Module):
    """The autoencoder's objective. Leaves its reconstruction in the batch for the discriminator."""

    def __init__(self, vae: VAE, tower: ImageTower, discriminator: PatchDiscriminator | None, loss: VAELoss) -> None:
        super().__init__()
        self.vae, self.weights = vae, loss
        self.helpers = [tower, discriminator]  # in a list, so that they are not this module's parameters

    def forward(self, batch: dict) -> dict[str, Tensor]:
        x, w, step = batch["image"], self.weights, batch["step"]
        tower, discriminator = self.helpers
        q = self.vae.encode(x)
        q = DiagonalGaussian(q.mean.float(), q.logvar.float())  # in mixed precision sums would be too coarse
        y = batch["reconstruction"] = self.vae.decode(q.sample(batch["noise"])).float()  # (B, 3, H, W)
        l1, l2, kl = F.l1_loss(y, x), F.mse_loss(y, x), q.kl().sum() / x.numel()  # all per pixel value
        out = {"l1": l1, "kl": kl, "psnr": -10 * torch.log10(l2.detach() / 4)}
        loss = l1 + w.squared * l2 + w.kl * kl
        if w.structural:
            with torch.autocast(x.device.type, enabled=False):  # differences of squares
                out["ssim"] = ssim((x + 1) / 2, (y + 1) / 2).mean()
            loss = loss + w.structural * (1 - out["ssim"])
        if step >= w.perceptual_from:
            out["perceptual"] = perceptual(tower.to(x.device), x, y)
            loss = loss + w.perceptual * out["perceptual"]
        if discriminator and step >= w.adversarial_from:
            discriminator.requires_grad_(False)  # it learns in its own turn
            adversarial = -discriminator(y).mean()
            last = self.vae.decoder.conv_out.weight
            ratio = grad_norm(loss, last) / (grad_norm(adversarial, last) + 1e-4)
            loss = loss + w.adversarial * ratio.clamp(0, 1e4) * adversarial
            out["adversarial"] = adversarial
        return {"loss": loss, **out}


class Discrimination(nn.Module):
    """The discriminator's objective: hinge loss on real and reconstructed pictures."""

    def __init__(self, discriminator: PatchDiscriminator, start: int) -> None:
        super().__init__()
        self.discriminator, self.start = discriminator, start

    def forward(self, batch: dict) -> dict[str, Tensor]:
        self.discriminator.requires_grad_(True)
        real = self.discriminator(batch["image"])
        fake = self.discriminator(batch["reconstruction"].detach())
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        return {"loss": loss if batch["step"] >= self.start else 0.0 * loss}  # its weights rest until its time


def grad_norm(loss: Tensor, weight: Tensor) -> Tensor:
    return torch.autograd.grad(loss, weight, retain_graph=True)[0].norm().detach()


def recipe(vae: VAE, tower: ImageTower, images: np.ndarray, loss: VAELoss = VAELoss()) -> Recipe:
    """Pictures (N, 128, 128, 3) uint8; the last 8 are kept for the sheet of reconstructions. Without an adversarial weight the autoencoder plays alone."""
    discriminator, on_gpu = PatchDiscriminator() if loss.adversarial else None, torch.cuda.is_available()  # so few channels are faster in planes on a CPU
    tower.eval().requires_grad_(False)

    def batch(step: int, share: Share) -> dict:
        g = share.generator(step)
        full, side = step >= loss.full_from, images.shape[1]
        n, size = (share.batch_size, side) if full else (4 * share.batch_size, side // 2)
        index = torch.randint(len(images) - 8, (n,), generator=g)
        top, left = torch.randint(side - size + 1, (2,), generator=g).tolist()
        noise = torch.randn(n, vae.config.latent_channels, size // vae.config.factor, size // vae.config.factor, generator=g)
        rows = images[share.mine(index).cpu().numpy(), top : top + size, left : left + size]
        return {"image": to_signed(rows).to(share.device), "noise": share.mine(noise), "step": step}

    def sheet(modules: dict[str, nn.Module]) -> object:
        x = to_signed(images[-8:])
        device = next(modules["vae"].parameters()).device
        with torch.no_grad():
            y = modules["vae"].decode(modules["vae"].encode(x.to(device)).mean).cpu()
        return contact_sheet(torch.cat([x, y]), columns=8)

    players = [Player("vae", Reconstruction(vae, tower, discriminator, loss), {"vae": vae}, channels_last=on_gpu)]
    if discriminator:
        players.append(Player("discriminator", Discrimination(discriminator, loss.adversarial_from), {"discriminator": discriminator}, betas=(0.5, 0.9), channels_last=on_gpu))
    return Recipe(players, batch, sheet)


@torch.no_grad()
def scale_factor(vae: VAE, images: np.ndarray, batch_size: int = 16) -> float:
    """1 / standard deviation of the sampled latents over the pictures (LDM, appendix G), so that the diffusion sees unit variance."""
    device, n, total, squares = next(vae.parameters()).device, 0, 0.0, 0.0
    for i in range(0, len(images), batch_size):
        q = vae.encode(to_signed(images[i : i + batch_size]).to(device))
        n, total, squares = n + q.mean.numel(), total + q.mean.double().sum(), squares + (q.mean.double() ** 2 + q.logvar.double().exp()).sum()
    return float(((squares / n) - (total / n) ** 2) ** -0.5)
