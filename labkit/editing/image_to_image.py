"""Image to image: noise a picture part of the way, and draw it again from there with a prompt.

    x_t = sqrt(a_t) z0 + sqrt(1 - a_t) eps,   z0 = E(image)       t the first of the last  int(strength T)  steps of DDIM, a = alpha_bar

Meng et al. 2021, "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations" (arXiv:2108.01073). The more
noise, the more of the picture is forgotten: little strength keeps layout and colours, 1 keeps nearly nothing. As in diffusers' image-to-image
pipelines, so that a seed draws the same picture: the noise also says which sample of the encoder's Gaussian E is.
"""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from labkit.device import Noise
from labkit.diffusion import Course, LatentDiffusion
from labkit.errors import LabkitError
from labkit.generation import Generation, finished, from_pil
from labkit.recipe import check_words_alone, complete
from labkit.schedule import q_sample


def image_to_image(
    lab: LatentDiffusion, prompt: str | Sequence[str], image: Image.Image | Sequence[Image.Image] | Tensor, strength: float = 0.6,
    progress: bool = True, **asked,
) -> Generation:  # fmt: skip
    """Draw `prompt` over a picture, PIL or (B, 3, H, W) in [0, 1], one or one for each; `asked` are other arguments of `lab.generate`.

    `strength`, above 0 to 1, is the share of the steps that are taken. The Generation's recipe has all but image and strength. Raises
    LabkitError if they do not fit, and whatever `generate` raises.
    """
    check_words_alone(lab)
    pixels = image.float().cpu() if isinstance(image, Tensor) else from_pil(image)  # (1 or B, 3, H, W)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise LabkitError(f"The image is a tensor {tuple(pixels.shape)}: give a PIL picture, or (B, 3, H, W) in [0, 1].")
    height, width = pixels.shape[2:]
    asked = {"sampler": "ddim", "height": height, "width": width, **asked}
    if (asked["height"], asked["width"]) != (height, width) or asked["sampler"] != "ddim":
        raise LabkitError(f"A picture of {height} x {width} pixels is drawn over by DDIM at its own size: leave sampler, height and width out.")
    recipe = complete(lab, prompt, **asked)
    if len(pixels) not in (1, len(recipe.prompt)):
        raise LabkitError(f"{len(pixels)} images for {len(recipe.prompt)} pictures: give one, or one for each.")
    first = recipe.steps - taken(strength, recipe.steps)

    def course(noise: Noise) -> Course:
        z0 = lab.encode_image(pixels, noise.draw())  # (B, 4, h, w)
        t = int(lab.schedule.timesteps(recipe.steps)[first])
        return Course(q_sample(z0, t, noise.draw().to(z0), lab.schedule), first=first)

    return finished(lab, lab.steps(**recipe.plain(), course=course), recipe, progress)


def taken(strength: float, steps: int) -> int:
    """How many of the steps are taken, at least 1; LabkitError where there are none, or more than all."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1 or int(strength * steps) < 1:
        raise LabkitError(f"The strength is {strength!r} of {steps} steps: give a number above 0 to 1, such that a step at least is taken.")
    return int(strength * steps)
