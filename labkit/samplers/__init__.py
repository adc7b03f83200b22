"""Samplers: from noise to a latent, as generators of `Step`. One paper a file."""

from labkit.samplers.ddim import ddim, ddim_inverse
from labkit.samplers.ddpm import ddpm
from labkit.samplers.step import Denoiser, Step

SAMPLERS = {"ddim": ddim, "ddpm": ddpm}  # called as sampler(denoise, x, schedule, steps, noise=noise.draw)

__all__ = ["SAMPLERS", "Denoiser", "Step", "ddim", "ddim_inverse", "ddpm"]
