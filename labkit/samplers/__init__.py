"""Samplers: from noise to a latent, as generators of `Step`. One paper a file; sigmas.py has what some of them share.

Each takes and yields the variance-preserving latent x_t, and each is told eps = denoise(x_t, t). One network call a step,
but for `heun`, which makes 2 N - 1 in N steps.
"""

from functools import partial

from torch import Tensor

from labkit.samplers.ddim import ddim, ddim_inverse
from labkit.samplers.ddpm import ddpm
from labkit.samplers.dpm_solver import dpm_solver
from labkit.samplers.euler import euler, euler_ancestral
from labkit.samplers.heun import heun
from labkit.samplers.sigmas import sigma_levels, signal
from labkit.samplers.step import Denoiser, Step
from labkit.samplers.unipc import unipc
from labkit.schedule import Schedule

SAMPLERS = {  # called as sampler(denoise, x, schedule, steps, noise=noise.draw)
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm_solver": dpm_solver,  # DPM-Solver++ 2M
    "dpm_solver_karras": partial(dpm_solver, karras=True),
    "unipc": unipc,
}


def first_latent(name: str, z: Tensor, schedule: Schedule, steps: int) -> Tensor:
    """The x_T that sampler `name` starts from, of noise z ~ N(0, I), (B, C, h, w): z itself, but for one convention.

    With trailing and linspace spacing, diffusers' Euler, Euler ancestral and Heun start from x_bar = sigma z, and not from
    sqrt(sigma^2 + 1) z, which is x = z. For Stable Diffusion that is x = 0.998 z; here so that a seed draws the same picture.
    """
    if name not in ("euler", "euler_ancestral", "heun") or schedule.config.timestep_spacing == "leading":
        return z
    sigma = sigma_levels(schedule, steps)[1][0]
    return z * (sigma * signal(sigma))


__all__ = [
    *("SAMPLERS", "Denoiser", "Step", "ddim", "ddim_inverse", "ddpm", "dpm_solver", "euler", "euler_ancestral"),
    *("first_latent", "heun", "unipc"),
]
