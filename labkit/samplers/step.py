"""What every sampler yields, what can be sent back to it, and the two things every sampler checks.

A sampler is a generator: stopping early, drawing progress, stepping live in a notebook and recording a trajectory are
all a `for` loop over its `Step`s. It knows nothing of text, guidance or images; it calls `eps = denoise(x_t, t)`. Who wants to
change the course of a run answers a step with the latent to go on from: `step = sampler.send(x)` in place of `next(sampler)`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from labkit.errors import LabkitError
from labkit.schedule import Timestep

Denoiser = Callable[[Tensor, int | Timestep], Tensor]  # eps = denoise(x_t, t), eps of x_t's shape


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a sampler: the latent it arrived at, and the predictions it made on the way."""

    i: int       # 0, 1, ..., steps - 1
    t: int       # the timestep that the network was told; a `Timestep`, a float, where it is none of the table's
    x: Tensor    # (B, C, h, w) the latent after the step: at the level where the next step starts
    eps: Tensor  # (B, C, h, w) the predicted noise
    x0: Tensor   # (B, C, h, w) the clean latent that this eps implies
    next_t: int | None = None  # what the network will be told in the next step; None after the last one


def predict(denoise: Denoiser, x: Tensor, t: int | Timestep) -> Tensor:
    """eps = denoise(x, t), checked to have x's shape: a wrong shape would broadcast and still draw something."""
    eps = denoise(x, t)
    if eps.shape != x.shape:
        raise LabkitError(f"The denoiser returned {tuple(eps.shape)} for x of {tuple(x.shape)}: they must be equal.")
    return eps


def going_on(x: Tensor, sent: Tensor | None) -> Tensor:
    """The latent that the next step starts from: the one sent back, if any, or x; LabkitError unless it has x's shape."""
    if sent is not None and sent.shape != x.shape:
        raise LabkitError(f"A latent of {tuple(sent.shape)} was sent back for x of {tuple(x.shape)}: they must be equal.")
    return x if sent is None else sent


def and_next(timesteps: list) -> list[tuple]:
    """Each timestep with the one after it, the last with None."""
    return list(zip(timesteps, [*timesteps[1:], None]))


def fresh(noise: Callable[[], Tensor], x: Tensor) -> Tensor:
    """The next noise, moved to x's dtype and device; LabkitError unless it has x's shape."""
    z = noise()
    if z.shape != x.shape:
        raise LabkitError(f"The noise has shape {tuple(z.shape)} and x {tuple(x.shape)}: draw it with x's shape.")
    return z.to(dtype=x.dtype, device=x.device)


def check_noise(noise) -> None:
    """LabkitError unless `noise` is something to call for fresh noise."""
    if not callable(noise):
        raise LabkitError(f"This sampler adds noise, but noise is {type(noise).__name__}: pass noise=Noise(...).draw.")
