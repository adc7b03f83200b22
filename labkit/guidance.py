"""Guidance: denoiser -> denoiser. How strongly the picture is pulled towards its words.

    eps = eps_u + w (eps_c - eps_u),        eps_c = model(x_t, t, c),   eps_u = model(x_t, t, uncond)

Ho & Salimans 2021, "Classifier-Free Diffusion Guidance", with w as Imagen and Stable Diffusion count it: w = 0 is
unconditional, w = 1 conditional, w > 1 guided (the paper's own w is one less). A negative prompt is an `uncond` that
is not the empty text.

    rescale:   eps <- phi (std(eps_c) / std(eps)) eps + (1 - phi) eps,        each image's own std over C, h and w
    interval:  w inside, 1 outside

Large w makes eps, and so the picture, too contrasty: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps
are Flawed" (eq. 15 and 16), give it back the spread of the conditional prediction. Guidance does harm at the noisiest
steps and nothing at the last: Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and
Distribution Quality in Diffusion Models" (eq. 5), guide only in between.

The rows of the network's batch are branch-major: first every image of the first branch, then every image of the
second. Each denoiser says in `.branches` which branches those are, so that whoever records knows whose rows he reads;
where that changes from call to call (`in_interval`), it is said of the call in progress.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from labkit.errors import LabkitError
from labkit.models.condition import Condition, for_batch, joined
from labkit.samplers.step import Denoiser
from labkit.schedule import Schedule, eps_prediction

Model = Callable[[Tensor, int | Tensor, Tensor | Condition], Tensor]  # eps = model(x_t, t, c)


def conditioned(model: Model, c: Tensor | Condition) -> Denoiser:
    """The denoiser eps = model(x_t, t, c), with c (B, L, D), or (1, L, D) for all images alike; one branch, "cond".

    Raises LabkitError, when called, if c does not fit the batch.
    """
    return _one_branch(model, c, "cond")


def classifier_free(
    model: Model, c: Tensor | Condition, uncond: Tensor | Condition, w: float | Tensor, rescale: float = 0.0
) -> Denoiser:
    """The denoiser eps_u + w (eps_c - eps_u), in one network call on the rows [uncond of B images, cond of B images].

    c and uncond: (B, L, D), or (1, L, D) for all images alike; w: a number, or (B,), one an image. Where every w is 1
    (or 0) only the conditional (unconditional) branch is computed. `.branches` is ("uncond", "cond"), ("cond",) or
    ("uncond",). `rescale` is phi of `rescaled`, 0 to 1; for a network that predicts v it acts on v if `model` says v (then
    make eps of what comes out: `in_eps`), as the paper and diffusers have it. Raises LabkitError if w is not finite,
    rescale is out of range or the shapes do not fit.
    """
    w, rescale = _scales(w), _share(rescale)
    if bool((w == 1).all()):
        return _one_branch(model, c, "cond")
    if bool((w == 0).all()):
        return _one_branch(model, uncond, "uncond")
    if c.shape[1:] != uncond.shape[1:]:
        raise LabkitError(
            f"The condition is {tuple(c.shape)} and the unconditional one {tuple(uncond.shape)}: "
            "encode both with the same text encoder and length."
        )

    def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
        B = len(x_t)
        rows = joined(for_batch(uncond, B), for_batch(c, B))                             # (2B, L, D)
        eps = model(torch.cat([x_t, x_t]), _both(t), rows)                               # (2B, C, h, w)
        eps_u, eps_c = eps.chunk(2)                                                      # (B, C, h, w) each
        return rescaled(eps_u + _like(w, x_t) * (eps_c - eps_u), eps_c, rescale)         # (B, C, h, w)

    denoise.branches = ("uncond", "cond")
    return denoise


def rescaled(eps: Tensor, eps_c: Tensor, rescale: float) -> Tensor:
    """phi (std(eps_c) / std(eps)) eps + (1 - phi) eps for phi = `rescale`: guided eps (B, C, h, w) with the spread of eps_c.

    Equal to diffusers' rescale_noise_cfg. Raises LabkitError unless 0 <= rescale <= 1.
    """
    phi = _share(rescale)
    if phi == 0:
        return eps
    std = lambda e: e.std(dim=tuple(range(1, e.ndim)), keepdim=True)  # noqa: E731  (B, 1, 1, 1)
    return phi * (eps * (std(eps_c) / std(eps))) + (1 - phi) * eps


def in_interval(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """`guided` where low <= t <= high, `plain` elsewhere: plain is `conditioned(model, c)`, at half the cost.

    low and high are timesteps; `labkit.samplers.sigmas.timestep_at` makes them of the paper's sigmas. Raises LabkitError
    unless low <= high, and, when called, where the timesteps of a batch lie on both sides.
    """
    if not low <= high:
        raise LabkitError(f"Guidance from t = {low} to t = {high}: give the lower timestep first.")

    def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
        inside = {low <= one <= high for one in (t.flatten().tolist() if isinstance(t, Tensor) else [t])}
        if len(inside) > 1:
            raise LabkitError(f"Timesteps {t.tolist()} lie in and out of {low} to {high}: guide them in calls of their own.")
        chosen = guided if True in inside else plain
        denoise.branches = chosen.branches
        return chosen(x_t, t)

    denoise.branches = guided.branches
    return denoise


def in_eps(denoiser: Denoiser, schedule: Schedule) -> Denoiser:
    """A denoiser that says eps, made of one whose output is what the schedule's `prediction_type` says (eps, v or x0)."""
    to_eps = eps_prediction(lambda x_t, t, c: denoiser(x_t, t), schedule)

    def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
        return to_eps(x_t, t, None)

    denoise.branches = denoiser.branches
    return denoise


def _one_branch(model: Model, c: Tensor | Condition, name: str) -> Denoiser:
    def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
        return model(x_t, t, for_batch(c, len(x_t)))

    denoise.branches = (name,)
    return denoise


def _both(t: int | Tensor) -> int | Tensor:
    """One timestep serves both branches; one for each image is repeated for the second."""
    return torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t


def _scales(w: float | Tensor) -> Tensor:
    try:
        w = torch.as_tensor(w, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise LabkitError(f"Guidance is {w!r}: give a number such as 7.5, or one for each image.") from None
    if w.ndim > 1 or w.numel() == 0:
        raise LabkitError(f"Guidance has shape {tuple(w.shape)}: give a number, or (B,), one for each image.")
    if not bool(torch.isfinite(w).all()):
        raise LabkitError(f"Guidance is {w.tolist()}: it must be finite; give a number such as 7.5.")
    return w


def _share(rescale: float) -> float:
    if isinstance(rescale, bool) or not isinstance(rescale, (int, float)) or not 0 <= rescale <= 1:
        raise LabkitError(f"The guidance rescale is {rescale!r}: give a number from 0 (off) to 1, such as 0.7.")
    return float(rescale)


def _like(w: Tensor, x_t: Tensor) -> float | Tensor:
    if w.ndim == 0:
        return w.item()
    if len(w) not in (1, len(x_t)):
        raise LabkitError(f"{len(w)} guidance scales for a batch of {len(x_t)} images: give one, or one for each image.")
    return w.to(x_t.dtype).to(x_t.device).view(-1, *[1] * (x_t.ndim - 1))
