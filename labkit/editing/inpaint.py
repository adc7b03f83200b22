"""Inpainting: draw what is inside a mask, keep what is around it.

    nine channels    eps = unet([x_t, m, E(image (1 - m))], t, c)                     a network that was trained to see the hole
    four channels    x_s <- m x_s + (1 - m) (sqrt(a_s) z0 + sqrt(1 - a_s) z),   z0 = E(image)     after every step, a = alpha_bar

Nine: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (sec. 4.5), as Stable Diffusion's inpainting
networks do it. Four: any other network, held to the known part by putting it back, noised to the level of the step: Lugmayr et al.
2022, "RePaint" (eq. 8) without its resampling, and with the noise z that the run began with; in latents it is Avrahami et al. 2023,
"Blended Latent Diffusion". The network does not see the edge of the hole, so what it draws fits less well.

m is 1 where is drawn. In latents it is that of the upper left pixel of each f x f, and grey is what the encoder sees in the hole. All
of this is as in diffusers' inpainting pipelines (strength 1), so that a seed draws the same picture: the noise also says which sample
of the encoder's Gaussian E is. What is kept has been through the autoencoder.
"""

from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from labkit.device import Noise
from labkit.diffusion import Course, LatentDiffusion
from labkit.errors import LabkitError
from labkit.generation import Generation, finished, from_pil
from labkit.recipe import complete
from labkit.samplers import Step
from labkit.schedule import q_sample


def inpaint(
    lab: LatentDiffusion, prompt: str | Sequence[str], image: Image.Image | Sequence[Image.Image] | Tensor, mask: Image.Image | Tensor,
    progress: bool = True, **asked,
) -> Generation:  # fmt: skip
    """Draw `prompt` where the mask is white, and keep the picture elsewhere; `asked` are other arguments of `lab.generate`.

    `image`: a PIL picture, one for each prompt, or (B, 3, H, W) in [0, 1]; `mask`: a PIL picture of that size, or (H, W), from 0.5 on it
    is white. The Generation's recipe has all but these two. Raises LabkitError if they do not fit, and whatever `generate` raises.
    """
    pixels = image.float().cpu() if isinstance(image, Tensor) else from_pil(image)  # (1 or B, 3, H, W)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise LabkitError(f"The image is a tensor {tuple(pixels.shape)} of {image.dtype}: give a PIL picture, or (B, 3, H, W) in [0, 1].")
    height, width = pixels.shape[2:]
    if (asked.setdefault("height", height), asked.setdefault("width", width)) != (height, width):
        raise LabkitError(f"The image has {height} rows and {width} columns, {asked['height']} and {asked['width']} are asked for: resize it first.")
    recipe = complete(lab, prompt, **asked)
    if len(pixels) not in (1, len(recipe.prompt)):
        raise LabkitError(f"{len(pixels)} images for {len(recipe.prompt)} pictures: give one, or one for each.")
    m = hole(mask, height, width)  # (1, 1, H, W)
    if not bool(at_latents(lab, m).any()):
        raise LabkitError("Nothing is to be drawn: the mask is black, or its white too small for the latents; white is where the prompt goes.")
    course = partial(keep if lab.unet.config.in_channels == lab.vae.config.latent_channels else show, lab, pixels, m)
    return finished(lab, lab.steps(**recipe.plain(), course=course), recipe, progress)


def show(lab: LatentDiffusion, pixels: Tensor, m: Tensor, noise: Noise) -> Course:
    """The course of a network with nine channels: it is told the mask and the latents of the picture without the hole."""
    z = noise.draw()  # (B, 4, h, w)
    known = lab.encode_image(pixels * (1 - m) + 0.5 * m, noise.draw())  # (B, 4, h, w); 0.5 is the 0 of the encoder's [-1, 1]
    beside = torch.cat([at_latents(lab, m).to(known).expand(len(z), -1, -1, -1), known], dim=1)  # (B, 5, h, w)

    def told(x_t: Tensor) -> Tensor:
        return torch.cat([x_t, beside.repeat(len(x_t) // len(beside), 1, 1, 1)], dim=1)  # (branches * B, 9, h, w)

    return Course(z, told=told)


def keep(lab: LatentDiffusion, pixels: Tensor, m: Tensor, noise: Noise) -> Course:
    """The course of any other network: after every step the known part is put back, with the noise of the level arrived at."""
    z0 = lab.encode_image(pixels, noise.draw())  # (B, 4, h, w)
    z = noise.draw()
    noise.draw()  # diffusers encodes the picture with the hole here too, which nobody reads: noisy samplers go on behind it
    m, start = at_latents(lab, m).to(z0), z.to(z0)

    def after(step: Step) -> Tensor:
        known = z0 if step.next_t is None else q_sample(z0, step.next_t, start, lab.schedule)
        return m * step.x + (1 - m) * known

    return Course(z, after=after)


def hole(mask: Image.Image | Tensor, height: int, width: int) -> Tensor:
    """A mask as (1, 1, H, W) of 0 and 1, float32: 1 from half white on; LabkitError unless it is one, of this size."""
    if isinstance(mask, Image.Image):
        mask = from_pil(mask.convert("L"))[0, 0]  # (H, W)
    if not isinstance(mask, Tensor) or tuple(mask.squeeze().shape) != (height, width):
        found = f"{tuple(mask.shape)} (rows, columns)" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise LabkitError(f"The mask is {found}: give one PIL picture, or a tensor, of the image's size ({height}, {width}), white where is drawn.")
    return (mask.squeeze() >= 0.5 if mask.dtype is not torch.bool else mask.squeeze()).float().cpu()[None, None]


def at_latents(lab: LatentDiffusion, m: Tensor) -> Tensor:
    """The mask of the latents, (1, 1, h, w)."""
    f = lab.vae.config.factor
    return m[..., ::f, ::f]
