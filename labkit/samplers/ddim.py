"""DDIM: the same training, fewer steps, and with eta = 0 no randomness; run backwards it finds an image's noise.

    x0_hat = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t)                                      a = alpha_bar, eps = eps(x_t, t)
    std    = eta sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s)
    x_s    = sqrt(a_s) x0_hat + sqrt(1 - a_s - std^2) eps + std z,     z ~ N(0, I)      s < t the next timestep

Song, Meng & Ermon 2020, "Denoising Diffusion Implicit Models" (eq. 12 and 16).
"""

from collections.abc import Callable, Iterator
from math import sqrt

from torch import Tensor

from labkit.errors import LabkitError
from labkit.samplers.step import Denoiser, Step, and_next, check_noise, fresh, going_on, predict
from labkit.schedule import Schedule


def ddim(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    eta: float = 0.0,
    noise: Callable[[], Tensor] | None = None,
    first: int = 0,
) -> Iterator[Step]:
    """Sample from x = x_T ~ N(0, I), (B, C, h, w), in `steps` steps; equal to diffusers' DDIMScheduler, unclipped.

    With `first`, x is the latent at which step number `first` begins, and the steps before it are left out. eta = 0 is deterministic, eta = 1 adds as much noise as DDPM does; `noise()` gives fresh noise of x's shape
    (`Noise.draw`). Raises LabkitError on bad steps, eta or first, and where eta > 0 has no noise.
    """
    pairs = visits(schedule, steps)
    if not 0 <= eta <= 1:
        raise LabkitError(f"eta is {eta!r}: give a number from 0 (deterministic) to 1 (as noisy as DDPM).")
    if not 0 <= first < steps:
        raise LabkitError(f"first is {first!r}: of {steps} steps begin with number 0 to {steps - 1}.")
    if eta > 0:
        check_noise(noise)

    def run(x: Tensor) -> Iterator[Step]:
        for i, ((t, s), later) in list(enumerate(and_next(pairs)))[first:]:
            a_t, a_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(s)
            eps = predict(denoise, x, t)
            x0 = _x0(x, eps, a_t)
            std = eta * sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
            x = sqrt(a_s) * x0 + sqrt(max(1 - a_s - std**2, 0)) * eps
            if eta > 0:
                x = x + std * fresh(noise, x)
            x = going_on(x, (yield Step(i, t, x, eps, x0, later and later[0])))

    return run(x)


def ddim_inverse(
    denoise: Denoiser, x0: Tensor, schedule: Schedule, steps: int, told: str = "later", refine: int = 0
) -> Iterator[Step]:
    """From a clean latent x0 (B, C, h, w) up to its noise: the steps of `ddim` undone, last one first.

    Undoing the step t -> s exactly takes eps(x_t, t), which needs the x_t that is being looked for. `told="later"`
    starts from eps(x_s, t): the present latent, but the timestep t of the step being undone. So do diffusers'
    DDIMInverseScheduler (0.42; equal step by step for eps networks) and null-text inversion. `told="own"` is
    eps(x_s, s), the latent's own timestep, as in the DDIM paper's ODE: a consistent pair, but of the other end of the
    step, and it comes back less exactly (on a mixture of Gaussians, 20 steps there and back: rms error 0.5, not 0.09).
    `refine=n` repeats the step n times with the x_t just found, a fixed-point iteration towards the exact inverse (Pan
    et al. 2023, AIDI) at n more network calls a step; 1 to 3 are plenty, and with few large steps more can diverge.

    For v networks diffusers turns v into eps with the level of s, though the network was told t; labkit's denoisers
    turn it with the level that the network was told, so there the two differ.

    `Step.t` is the t arrived at and `Step.x` the latent there. Raises LabkitError on bad steps, `told` or `refine`.
    """
    pairs = visits(schedule, steps)[::-1]
    if told not in ("later", "own"):
        raise LabkitError(f"told is {told!r}: use 'later' (as diffusers) or 'own' (as the DDIM paper).")
    if not isinstance(refine, int) or refine < 0:
        raise LabkitError(f"refine is {refine!r}: give 0 or a small positive integer.")

    def run(x: Tensor) -> Iterator[Step]:
        for i, (t, s) in enumerate(pairs):
            a_t, a_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(s)
            x_s = x
            eps = predict(denoise, x_s, t if told == "later" else max(s, 0))  # below t = 0 there is no network
            for again in range(refine + 1):
                if again:
                    eps = predict(denoise, x, t)
                clean = _x0(x_s, eps, a_s)
                x = sqrt(a_t) * clean + sqrt(1 - a_t) * eps
            yield Step(i, t, x, eps, clean)

    return run(x0)


def _x0(x: Tensor, eps: Tensor, a: float) -> Tensor:
    return (x - sqrt(1 - a) * eps) / sqrt(a)  # by level, not by timestep: the final alpha_bar has none


def visits(schedule: Schedule, steps: int) -> list[tuple[int, int]]:
    """The pairs (t, s) of the steps t -> s; s < 0 stands for the final alpha_bar.

    s = t - T // steps, as diffusers has it. For leading spacing that is the next t; for trailing it is within one
    timestep of it. For linspace it would be far off (499 instead of 0 at two steps), so there s is the next t.
    """
    t = schedule.timesteps(steps).tolist()
    if schedule.config.timestep_spacing == "linspace":
        return list(zip(t, t[1:] + [-1]))
    return [(t, t - schedule.config.num_train_timesteps // steps) for t in t]
