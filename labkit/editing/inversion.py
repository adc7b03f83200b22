"""Inversion: the noise from which a given picture is drawn again, so that it can be edited like one that was drawn.

    z*_0 = E(image),   z*_t from z*_s by ddim_inverse with eps(z*_s, t, c)                 the path, w = 1: upwards it is nearly exact
    downwards with guidance w > 1 the run leaves the path; what brings it back:

    ddim               nothing                                                             Song et al. 2020
    negative_prompt    the unconditional text is the source's prompt: eps_u = eps_c        Miyake et al. 2023, Han et al. 2023
    null_text          unconditional states u_i for each step:                             Mokady et al. 2022, arXiv:2211.09794
                       u_i = argmin || prev(eps_u + w (eps_c - eps_u), z_t) - z*_s ||^2
    direct             the source's run alone is put back on the path after each step      Ju et al. 2023, arXiv:2310.01506
    noise              the same on another path, z*_t = sqrt(a_t) z*_0 + sqrt(1 - a_t) z    the forward process, one z ~ N(0, I) for all t

What DDIM finds is no white noise: the picture shines through it, so edits from there stay near the picture, also where they should not.
`noise` knows nothing of the picture (and costs no network call); there attention alone carries the picture over.

`labkit.edit(lab, inversion, target)` then edits the picture. Null text is as published: z_t is where the run with the optimised u has come
to, u_i starts from u_{i-1} (u_0: the empty text), a new Adam a step with lr 0.01 (1 - i / 100), at most ten updates, until the loss is
below 1e-5 + 2e-5 i; eps_c is computed once. Pictures are optimised one by one: in a batch they would not come out alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from labkit.device import Noise
from labkit.diffusion import LatentDiffusion, guided
from labkit.errors import LabkitError
from labkit.generation import from_pil
from labkit.guidance import Model, conditioned, in_eps
from labkit.models.condition import Condition
from labkit.models.unet import states_of
from labkit.recipe import Recipe, complete
from labkit.samplers import Denoiser
from labkit.samplers.ddim import ddim_inverse, visits
from labkit.schedule import q_sample

KINDS = ("direct", "ddim", "negative_prompt", "null_text", "noise")
UPDATES, RATE, CLOSE, LOOSER = 10, 1e-2, 1e-5, 2e-5  # of null text, as published


@dataclass(frozen=True, eq=False)
class Inversion:
    """The way of B pictures of one prompt up to their noise, and what keeps guided runs near it."""

    path: Tensor             # (T + 1, B, 4, h, w): z*_0, ..., z*_T
    prompt: str
    kind: str                # one of KINDS
    recipe: Recipe           # of B pictures: the prompt, steps, guidance, sizes
    uncond: Tensor | None = None  # (T, B, L, D) unconditional states by step, of null text

    @property
    def pinned(self) -> bool:
        """Whether the source is put back on the path after each step."""
        return self.kind in ("direct", "noise")

    @property
    def z(self) -> Tensor:
        """The noise found, (B, 4, h, w)."""
        return self.path[-1]


def invert(
    lab: LatentDiffusion, image: Image.Image | Sequence[Image.Image] | Tensor, prompt: str, kind: str = "direct",
    told: str = "later", refine: int = 0, progress: bool = False, **asked,
) -> Inversion:  # fmt: skip
    """The Inversion of pictures, (B, 3, H, W) in [0, 1] or PIL, that `prompt` describes; `asked` are arguments of `lab.generate`.

    `guidance` is that of the edit to come (null text is optimised for it), `steps` its steps; the sampler is DDIM. `seed` is where the noise
    of "noise" comes from. `told` and `refine` are
    those of `ddim_inverse`. Raises LabkitError if any of it cannot be.
    """
    if kind not in KINDS:
        raise LabkitError(f"The inversion is {kind!r}: use one of {', '.join(KINDS)}.")
    pixels = image.float() if isinstance(image, Tensor) else from_pil(image)  # (B, 3, H, W)
    z0 = lab.encode_image(pixels)  # (B, 4, h, w)
    recipe = path_recipe(lab, prompt, len(z0), pixels.shape[2:], asked)
    if kind == "negative_prompt":
        recipe = replace(recipe, negative_prompt=[prompt] * len(z0))
    if kind == "noise":
        return Inversion(forward_path(lab, z0, recipe), prompt, kind, recipe)
    plain = replace(recipe, guidance=1.0, rescale=0.0, interval=None)
    with torch.no_grad():
        steps = ddim_inverse(denoiser(lab, plain), z0, lab.schedule, recipe.steps, told, refine)
        path = torch.stack([z0, *(step.x for step in steps)])
    found = Inversion(path, prompt, kind, recipe)
    return replace(found, uncond=null_text(lab, found, progress)) if kind == "null_text" else found


def path_recipe(lab: LatentDiffusion, prompt: str, B: int, size: Sequence[int], asked: dict) -> Recipe:
    """The recipe of B pictures of this size (H, W); LabkitError unless its sampler can be inverted."""
    height, width = size
    asked = {"sampler": "ddim", "seed": [0] * B, **asked}
    if asked["sampler"] != "ddim" or (asked.setdefault("height", height), asked.setdefault("width", width)) != (height, width):
        raise LabkitError(f"A picture of {height} x {width} pixels is inverted by DDIM at its own size: leave sampler, height and width out.")
    recipe = complete(lab, prompt, **asked)
    if len(recipe.prompt) != B:
        raise LabkitError(f"{len(recipe.prompt)} pictures are asked for and {B} given: give one value, or one for each picture.")
    return recipe


def forward_path(lab: LatentDiffusion, z0: Tensor, recipe: Recipe) -> Tensor:
    """z0 (B, 4, h, w) at the level of each timestep of the recipe, with the noise of its seeds: (T + 1, B, 4, h, w), z0 first."""
    z = Noise(recipe.seed, tuple(z0.shape[1:])).draw().to(z0)
    ts = lab.schedule.timesteps(recipe.steps).tolist()
    return torch.stack([z0, *(q_sample(z0, t, z, lab.schedule) for t in reversed(ts[1:])), z])


def denoiser(lab: LatentDiffusion, recipe: Recipe) -> Denoiser:
    """eps = denoise(x_t, t) of the model as the recipe guides it, outside of a run."""
    return guided(network(lab), *lab.conditions(recipe), recipe, lab.schedule)


def network(lab: LatentDiffusion) -> Model:
    return lambda x_t, t, c: lab.unet(x_t.to(lab.dtype), t, c).to(x_t.dtype)


def null_text(lab: LatentDiffusion, inversion: Inversion, progress: bool = False) -> Tensor:
    """Unconditional states for each step with which the guided run stays on the path: (T, B, L, D), float32.

    Raises LabkitError where the model computes in half precision, in which this diverges, or cannot be differentiated.
    """
    from tqdm.auto import tqdm

    recipe, T, B = inversion.recipe, inversion.recipe.steps, inversion.path.shape[1]
    if lab.dtype not in (torch.float32, torch.float64):
        raise LabkitError(f"Null text is optimised in float32, the model is in {lab.dtype}: load it with dtype='float32'.")
    if recipe.rescale or recipe.interval:
        raise LabkitError("Null text is optimised for guidance alone: leave rescale and interval out.")
    c, uncond = lab.conditions(recipe)
    found = torch.empty(T, *states_of(uncond).shape, device=lab.device)
    bar = tqdm(total=T * B, desc="null text", disable=not progress)
    for b in range(B):
        w = recipe.guidance[b] if isinstance(recipe.guidance, list) else recipe.guidance
        u, z = states_of(uncond)[b : b + 1].float(), inversion.path[-1, b : b + 1]
        for i, (t, s) in enumerate(visits(lab.schedule, T)):
            goal = inversion.path[T - 1 - i, b : b + 1]
            with torch.no_grad():
                eps_c = eps(lab, z, t, row(c, b))
            u = u.detach().clone().requires_grad_(True)
            adam = torch.optim.Adam([u], lr=RATE * (1 - i / 100))
            for _ in range(UPDATES):
                with torch.enable_grad():
                    eps_u = eps(lab, z, t, row(uncond, b, u))
                    loss = F.mse_loss(down(lab, z, eps_u + w * (eps_c - eps_u), t, s), goal)
                (u.grad,) = torch.autograd.grad(loss, [u])
                adam.step()
                if loss.item() < CLOSE + i * LOOSER:
                    break
            found[i, b] = u.detach()[0]
            with torch.no_grad():
                eps_u = eps(lab, z, t, row(uncond, b, u.detach()))
                z = down(lab, z, eps_u + w * (eps_c - eps_u), t, s)
            bar.update()
    bar.close()
    return found


def down(lab: LatentDiffusion, z: Tensor, eps: Tensor, t: int, s: int) -> Tensor:
    """One step of DDIM, t -> s."""
    a_t, a_s = lab.schedule.alpha_bar_at(t), lab.schedule.alpha_bar_at(s)
    x0 = (z - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    return a_s**0.5 * x0 + (1 - a_s) ** 0.5 * eps


def eps(lab: LatentDiffusion, z: Tensor, t: int, c: Tensor | Condition) -> Tensor:
    """What the model says of one latent under a condition."""
    return in_eps(conditioned(network(lab), c), lab.schedule)(z, t)


def row(c: Tensor | Condition, b: int, states: Tensor | None = None) -> Tensor | Condition:
    """The condition of picture b alone, with other states if given."""
    if isinstance(c, Condition):
        return Condition(c.states[b : b + 1] if states is None else states.to(c.states), c.pooled[b : b + 1], c.sizes[b : b + 1])
    return c[b : b + 1] if states is None else states.to(c)

