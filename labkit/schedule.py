"""The forward process: how much noise there is at which timestep, and the algebra of x0, eps and v.

    q(x_t | x0) = N( sqrt(alpha_bar_t) x0, (1 - alpha_bar_t) I ),    alpha_bar_t = prod_{s <= t} (1 - beta_s)
    x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps
    v   = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (eq. 4); v: Salimans & Ho 2022, "Progressive Distillation"
(app. D); cosine betas: Nichol & Dhariwal 2021; spacings and zero terminal SNR: Lin et al. 2023, "Common Diffusion Noise
Schedules and Sample Steps are Flawed" (tab. 2, alg. 1).

Papers count t = 1..T; here as in the code of all of them t = 0..T-1, and t = 0 already carries a little noise. Tables
are float64 on the CPU; coefficients are cast to the dtype and device of the tensor they are applied to.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.errors import LabkitError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
NEARLY_ZERO = 2.0**-24  # alpha_bar at the end of a schedule with zero terminal SNR: sigma is 4096 there, not infinite


@dataclass(frozen=True)
class ScheduleConfig:
    """A noise schedule; names and meanings are those of diffusers' `scheduler_config.json`, defaults those of SD 1.x."""

    num_train_timesteps: int = 1000       # T: the network was trained on t = 0..T-1
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # linear in sqrt(beta): latents need more noise early than pixels do
    prediction_type: str = "epsilon"      # what the network's output is: eps, v, or x0 ("sample")
    timestep_spacing: str = "leading"     # which of the T timesteps a sampler with fewer steps visits
    steps_offset: int = 1                 # added to "leading" timesteps: SD's last step is at t = 1, not 0
    set_alpha_to_one: bool = False        # alpha_bar after the last step: 1, or (SD) that of t = 0
    rescale_betas_zero_snr: bool = False  # at t = T - 1 nothing is left of the picture; needs a network that predicts v


class Timestep(float):
    """A timestep whose noise is not that of the table: t as the network is told it, and `alpha_bar` of the latent it sees.

    Samplers that choose sigmas freely (Karras et al. 2022) or step evenly through real numbers meet such ones. Everything
    here that takes a t takes a Timestep too, and goes by its `alpha_bar`.
    """

    alpha_bar: float

    def __new__(cls, t: float, alpha_bar: float):
        self = super().__new__(cls, t)
        self.alpha_bar = float(alpha_bar)
        return self

    def __getnewargs__(self) -> tuple[float, float]:  # so that copies and pickles keep the level
        return float(self), self.alpha_bar

    def __str__(self) -> str:
        return f"{float(self):.6g}"


class Schedule:
    """The tables of a schedule: `.beta`, `.alpha_bar`, `.sigma`, `.snr`, each (T,) float64 on the CPU.

    sigma = sqrt((1 - alpha_bar) / alpha_bar) is the noise of x_t / sqrt(alpha_bar), snr = alpha_bar / (1 - alpha_bar);
    `.final_alpha_bar` (0-dim) is the level that DDIM's last step arrives at. Raises LabkitError on an unknown name.
    """

    def __init__(self, config: ScheduleConfig = ScheduleConfig()):
        _known("beta_schedule", config.beta_schedule, BETA_SCHEDULES)
        _known("prediction_type", config.prediction_type, PREDICTION_TYPES)
        _known("timestep_spacing", config.timestep_spacing, SPACINGS)
        if not _is_int(config.num_train_timesteps) or config.num_train_timesteps < 1:
            raise LabkitError(f"num_train_timesteps is {config.num_train_timesteps!r}: give a positive integer.")
        if not _is_int(config.steps_offset) or config.steps_offset < 0:
            raise LabkitError(f"steps_offset is {config.steps_offset!r}: give 0 or a positive integer.")
        if not (0 < config.beta_start < 1 and 0 < config.beta_end < 1):
            raise LabkitError(f"Betas from {config.beta_start} to {config.beta_end}: they must lie between 0 and 1.")
        self.config = config
        self.beta = _betas(config)                                        # (T,)
        self.alpha_bar = torch.cumprod(1 - self.beta, dim=0)              # (T,)
        if config.rescale_betas_zero_snr:
            self.beta = rescale_zero_snr(self.beta)                       # (T,)
            self.alpha_bar = torch.cumprod(1 - self.beta, dim=0)          # (T,)
            self.alpha_bar[-1] = NEARLY_ZERO
        self.snr = self.alpha_bar / (1 - self.alpha_bar)                  # (T,)
        self.sigma = ((1 - self.alpha_bar) / self.alpha_bar).sqrt()       # (T,)
        self.final_alpha_bar = torch.ones((), dtype=torch.float64) if config.set_alpha_to_one else self.alpha_bar[0]

    def timesteps(self, steps: int) -> Tensor:
        """The timesteps that `steps` sampling steps visit, (steps,) int64, descending; equal to diffusers'.

        leading: 0, k, 2k, ... + steps_offset with k = T // steps; trailing: T - 1 downwards in strides of T / steps;
        linspace: from T - 1 to 0, both included. Raises LabkitError unless 1 <= steps <= T.
        """
        T, offset = self.config.num_train_timesteps, self.config.steps_offset
        if not _is_int(steps) or steps < 1:
            raise LabkitError(f"steps is {steps!r}: give a positive integer, such as 20.")
        if steps > T:
            raise LabkitError(f"steps is {steps}, but the model knows only {T} timesteps: use at most {T} steps.")
        if self.config.timestep_spacing == "leading":
            t = [i * (T // steps) + offset for i in reversed(range(steps))]
        elif self.config.timestep_spacing == "trailing":
            stride = T - (T - T / steps)  # T / steps, rounded as numpy.arange does: decides ties the way diffusers does
            t = [round(T - i * stride) - 1 for i in range(steps)]
        else:
            t = [round(i * ((T - 1) / max(steps - 1, 1))) for i in reversed(range(steps))]
        if t[0] >= T:
            raise LabkitError(
                f"{steps} steps with leading spacing and steps_offset={offset} would start at t={t[0]}, but t ends at "
                f"{T - 1}: use fewer steps or timestep_spacing='trailing'."
            )
        return torch.tensor(t, dtype=torch.int64)

    def alpha_bar_at(self, t: int | Timestep) -> float:
        """alpha_bar of timestep t as a float; before the first one (t < 0) it is `final_alpha_bar`."""
        if isinstance(t, Timestep):
            return t.alpha_bar
        return float(self.final_alpha_bar if t < 0 else self.alpha_bar[_in_range(t, self)])


def q_sample(x0: Tensor, t: int | Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, with the noise eps of x0's shape (DDPM, eq. 4).

    Here and below: t is an int, a Timestep or a LongTensor (B,), one an image; LabkitError if it lies outside 0..T-1.
    """
    a, s = _signal_and_noise(t, x0, schedule)
    return a * x0 + s * eps


def x0_from_eps(x_t: Tensor, t: int | Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """x0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)."""
    a, s = _signal_and_noise(t, x_t, schedule)
    return (x_t - s * eps) / a


def eps_from_x0(x_t: Tensor, t: int | Tensor, x0: Tensor, schedule: Schedule) -> Tensor:
    """eps = (x_t - sqrt(alpha_bar_t) x0) / sqrt(1 - alpha_bar_t)."""
    a, s = _signal_and_noise(t, x_t, schedule)
    return (x_t - a * x0) / s


def v_from(x0: Tensor, t: int | Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0: what a v-prediction network is trained to say."""
    a, s = _signal_and_noise(t, x0, schedule)
    return a * eps - s * x0


def eps_from_v(x_t: Tensor, t: int | Tensor, v: Tensor, schedule: Schedule) -> Tensor:
    """eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t."""
    a, s = _signal_and_noise(t, x_t, schedule)
    return a * v + s * x_t


def x0_from_v(x_t: Tensor, t: int | Tensor, v: Tensor, schedule: Schedule) -> Tensor:
    """x0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v."""
    a, s = _signal_and_noise(t, x_t, schedule)
    return a * x_t - s * v


def eps_prediction(model: Callable, schedule: Schedule) -> Callable[[Tensor, int | Tensor, Tensor], Tensor]:
    """An eps model (x_t, t, c) -> eps made of a network whose output is what `prediction_type` says.

    A network that predicts eps comes back as it is. Everything above (guidance, samplers, editing) speaks eps only.
    """
    if schedule.config.prediction_type == "epsilon":
        return model
    to_eps = {"v_prediction": eps_from_v, "sample": eps_from_x0}[schedule.config.prediction_type]
    return lambda x_t, t, c: to_eps(x_t, t, model(x_t, t, c), schedule)


def rescale_zero_snr(beta: Tensor) -> Tensor:
    """Betas (T,) shifted and scaled so that sqrt(alpha_bar) ends at 0 and starts where it did (Lin et al. 2023, alg. 1).

    The last one is 1, so alpha_bar ends at 0 and eps says nothing about x0 there; `Schedule` puts 2^-24 in its place, as
    diffusers' Euler, DPM-Solver and UniPC do (its DDIM keeps the 0, and so differs by some 2^-12 in the first step).
    """
    root = torch.cumprod(1 - beta, dim=0).sqrt()  # (T,)
    alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def _betas(config: ScheduleConfig) -> Tensor:
    T, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, T, dtype=torch.float64)
    if config.beta_schedule == "scaled_linear":  # linear in sqrt(beta), hence the square: without it, no picture
        return torch.linspace(math.sqrt(start), math.sqrt(end), T, dtype=torch.float64) ** 2
    s = 0.008  # keeps the first betas from vanishing
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def _signal_and_noise(t: int | Tensor, x: Tensor, schedule: Schedule) -> tuple:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t): floats for one t, tensors (B, 1, ...) like x for one t an image."""
    if isinstance(t, Timestep):
        return math.sqrt(t.alpha_bar), math.sqrt(1 - t.alpha_bar)
    t = _in_range(t, schedule)
    alpha_bar = schedule.alpha_bar[t]
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if alpha_bar.ndim == 0:
        return signal.item(), noise.item()  # floats keep their precision even next to half-precision tensors
    if len(alpha_bar) != x.shape[0]:
        raise LabkitError(f"{len(alpha_bar)} timesteps for a batch of {x.shape[0]}: give one, or one for each image.")
    shape = (-1,) + (1,) * (x.ndim - 1)
    return signal.to(x.dtype).to(x.device).view(shape), noise.to(x.dtype).to(x.device).view(shape)


def _in_range(t: int | Tensor, schedule: Schedule) -> Tensor:
    """t as an int64 tensor on the CPU, () or (B,), checked."""
    T = schedule.config.num_train_timesteps
    if not isinstance(t, Tensor) and not _is_int(t):
        raise LabkitError(f"t is {t!r}: give an integer from 0 to {T - 1}, or a LongTensor (B,).")
    t = torch.as_tensor(t).cpu()
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool or t.ndim > 1:
        raise LabkitError(f"t has dtype {t.dtype} and shape {tuple(t.shape)}: give an integer, or integers (B,).")
    if t.numel() and not (0 <= int(t.min()) and int(t.max()) < T):
        raise LabkitError(f"t = {int(t.min())}..{int(t.max())} is out of range: timesteps run from 0 to {T - 1}.")
    return t.long()


def _known(field: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise LabkitError(f"Unknown {field} {value!r}: use one of {', '.join(names)}.")


def _is_int(n) -> bool:
    return hasattr(n, "__index__") and not isinstance(n, (bool, Tensor))
