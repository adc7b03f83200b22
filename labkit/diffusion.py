"""Latent diffusion, all parts together: a sentence in, a picture out.

    c = text_encoder(tokens(prompt))                                                     what is wanted
    x_T ~ N(0, I), one seed an image                                                     where it starts
    x_t -> x_s  by  eps = eps_u + w (eps_c - eps_u),  eps_. = unet(x_t, t, c or uncond)  some 20 steps
    image = vae.decode(x / scaling_factor)                                               what one sees

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models". This is the one file that knows all
the parts; each of them is in a room of its own and knows none of the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from labkit.device import Noise
from labkit.errors import LabkitError
from labkit.generation import Generation, finished, from_pil
from labkit.guidance import Model, classifier_free, conditioned, in_eps, in_interval
from labkit.models.clip import CLIPText
from labkit.models.condition import Condition, check_sizes, encode, silenced, sizes_told, usual_sizes
from labkit.models.tokenizer import Tokenizer
from labkit.models.unet import UNet
from labkit.models.vae import VAE
from labkit.recipe import Recipe, check_text, check_words_alone, complete
from labkit.samplers import SAMPLERS, Denoiser, Step, first_latent
from labkit.schedule import Schedule, ScheduleConfig, Timestep
from labkit.strips import decode_in_strips

DEFAULTS = {"steps": 20, "guidance": 7.5, "sampler": "ddim"}
DECODED_AT_ONCE = 2**20  # pixels: the decoder's memory is what breaks first when many or large images are drawn
LARGE = 2**19  # pixels: pictures above this are decoded in strips, one at a time


@dataclass(frozen=True)
class Layout:
    """What the rows of the network call in progress are; branch-major, so row = branch * images + image."""

    branches: tuple[str, ...]          # ("uncond", "cond"), ("cond",) or ("uncond",)
    images: int                        # B; the call has len(branches) * B rows
    i: int                             # the step, 0 is the noisiest; Heun calls the network twice in one
    t: int                             # the timestep told; a Timestep (float) where it is none of the table's
    steps: int
    size: tuple[int, int]              # (h, w) of the latents
    prompts: tuple[str, ...]           # what branch "cond" is told, one an image
    negative_prompts: tuple[str, ...]  # what branch "uncond" is told, one an image


@dataclass(frozen=True, eq=False)
class Course:
    """What an edit changes in a run: the noise it starts from, what the U-Net reads, and where each step goes on from."""

    z: Tensor                                                     # (B, 4, h, w), standard normal; x_T is made of it
    told: Callable[[Tensor], Tensor] = lambda x_t: x_t            # x_t of all rows -> the U-Net's input
    said: Callable[[Tensor | Condition], Tensor | Condition] = lambda c: c  # the condition of all rows -> what the U-Net reads
    after: Callable[[Step], Tensor | None] = lambda step: None    # the latent to go on from, (B, 4, h, w); None: step.x
    first: int = 0                                                # DDIM alone: the step that begins at z, those before are left out


class LatentDiffusion:
    """The parts of a model and what they do together: `generate`, `steps`, `decode`, `encode_image`, `encode_text`.

    `metadata` is labkit.json: "defaults" (steps, guidance, sampler) and "vocabulary", the only words that a model of a
    closed world knows. SDXL has two text encoders; `force_zeros` says that its empty negative prompt is zeros. `layout`
    says what the rows of the U-Net call in progress are; outside of one it is None.
    """

    def __init__(
        self, unet: UNet, vae: VAE, text_encoder: CLIPText, tokenizer: Tokenizer, schedule_config: ScheduleConfig,
        name: str = "model", metadata: dict | None = None, text_encoder_2: CLIPText | None = None, tokenizer_2: Tokenizer | None = None,
        force_zeros: bool = False,
    ):  # fmt: skip
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2, self.force_zeros = text_encoder_2, tokenizer_2, force_zeros
        self.schedule_config, self.schedule = schedule_config, Schedule(schedule_config)
        self.name, self.metadata = name, metadata or {}
        self.defaults = {**DEFAULTS, **self.metadata.get("defaults", {})}
        self.vocabulary = frozenset(self.metadata.get("vocabulary") or ())
        self.layout: Layout | None = None

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def texts(self) -> list[tuple[CLIPText, Tokenizer]]:
        """The text encoders, each with its tokenizer: one, or SDXL's two."""
        both = [(self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2)]
        return [pair for pair in both if pair[0] is not None]

    def generate(
        self,
        prompt: str | Sequence[str],
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        progress: bool = True,
        **rarer,
    ) -> Generation:
        """Draw pictures of a prompt, or of several; None means the model's own default.

        `prompt`, `guidance`, `seed` and `negative_prompt` are one value for all pictures or a list with one for each;
        `height` and `width` are pixels. The same seed gives the same picture in any batch, and in diffusers. Rarer:
        `rescale`, 0 to 1, takes back that much of the contrast that strong guidance adds; `interval=(low, high)` guides at
        timesteps low <= t <= high only (labkit.guidance); `sizes` is what SDXL is told, in pixels: original height, width,
        crop top, left, target height, width (its refiner: an aesthetic score in place of the last two); None is height,
        width, 0, 0, height, width. Raises LabkitError if any of it cannot be.
        """
        said = {"steps": steps, "guidance": guidance, "seed": seed, "negative_prompt": negative_prompt}
        recipe = complete(self, prompt, **said, height=height, width=width, sampler=sampler, **rarer)
        return finished(self, self.steps(**recipe.plain()), recipe, progress)

    def edit(self, source: str, target: str | Sequence[str] | None = None, **how) -> "Edit":  # noqa: F821
        """Prompt-to-Prompt: draw `source`, and `target` as the same picture with that change; as `labkit.edit(lab, ...)`."""
        from labkit.editing.prompt_to_prompt import edit

        return edit(self, source, target, **how)

    def steps(self, prompt: str | Sequence[str], *, course: Callable[[Noise], Course] | None = None, **asked) -> Iterator[Step]:
        """The same as a loop: yields each Step (i, t, x, eps, x0); arguments and errors are those of `generate`.

        `course`, given the pictures' noise, says how an edit changes the run (labkit.editing).
        """
        if course is None:
            check_words_alone(self)
        recipe = complete(self, prompt, **asked)
        f, c_z = self.vae.config.factor, self.vae.config.latent_channels
        size = (recipe.height // f, recipe.width // f)
        c, uncond = self.conditions(recipe)  # (B, L, D)
        noise = Noise(recipe.seed, (c_z, *size))
        run = Course(noise.draw()) if course is None else course(noise)
        B, done = len(noise.seeds), run.first

        def network(x_t: Tensor, t: int | Timestep, c: Tensor | Condition) -> Tensor:
            texts = tuple(recipe.prompt), tuple(recipe.negative_prompt)
            self.layout = Layout(denoise.branches, B, done, t, recipe.steps, size, *texts)
            try:
                with torch.no_grad():
                    return self.unet(run.told(x_t).to(self.dtype), t, run.said(c)).to(x_t.dtype)
            finally:
                self.layout = None

        denoise = guided(network, c, uncond, recipe, self.schedule)
        # latents stay in float32 also where the network computes in half: their small last steps would be rounded away
        x_T = run.z.to(self.device, torch.promote_types(self.dtype, torch.float32))  # (B, 4, h, w)
        x_T = first_latent(recipe.sampler, x_T, self.schedule, recipe.steps)
        begin = {"first": run.first} if run.first else {}
        sampler = SAMPLERS[recipe.sampler](denoise, x_T, self.schedule, recipe.steps, noise=noise.draw, **begin)

        def counted() -> Iterator[Step]:
            nonlocal done
            sent = None
            for _ in range(recipe.steps - run.first):
                step = sampler.send(sent)
                done, sent = step.i + 1, run.after(step)
                yield step if sent is None else replace(step, x=sent)

        return counted()

    @torch.no_grad()
    def decode(self, z: Tensor, strips: bool | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], float32, of latents (B, 4, h, w); LabkitError if they are not finite.

        With `strips` they are decoded one at a time in strips of rows: the same pictures to rounding, in less memory; None does so
        where they are large.
        """
        if z.ndim != 4:
            raise LabkitError(f"The latents are {tuple(z.shape)}: give (B, {self.vae.config.latent_channels}, h, w).")
        dtype, pixels = self.vae.post_quant_conv.weight.dtype, z[0, 0].numel() * self.vae.config.factor**2
        z = z.to(self.device, dtype) / self.vae.config.scaling_factor
        strips = pixels > LARGE if strips is None else strips
        parts = z.split(1 if strips else max(1, DECODED_AT_ONCE // pixels))
        images = torch.cat([(decode_in_strips(self.vae, part) if strips else self.vae.decode(part)).float() for part in parts])  # (B, 3, H, W)
        if not bool(images.isfinite().all()):
            raise LabkitError(f"The picture has values that are not finite ({dtype}): load the model in float32, or with check=True to check its weights.")
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_image(self, image: Image.Image | Sequence[Image.Image] | Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, 4, h, w) of a PIL picture, several of one size, or (B, 3, H, W) in [0, 1]: the encoder's mean.

        With standard normal `noise` (B, 4, h, w) they are a sample of what the encoder says.
        """
        pixels = image if isinstance(image, Tensor) else from_pil(image)
        f = self.vae.config.factor
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % f or pixels.shape[3] % f:
            shape = tuple(pixels.shape)
            raise LabkitError(f"The image is {shape}: give (B, 3, H, W) with height and width multiples of {f}.")
        pixels = pixels.to(self.device, self.vae.post_quant_conv.weight.dtype) * 2 - 1
        said = self.vae.encode(pixels)
        z = (said.mode if noise is None else said.sample(noise.to(said.mean))) * self.vae.config.scaling_factor
        return z.to(torch.promote_types(z.dtype, torch.float32))  # (B, 4, h, w)

    @torch.no_grad()
    def encode_text(self, prompts: str | Sequence[str], sizes: Sequence[float] | None = None) -> Tensor | Condition:
        """Text states (B, L, D) of prompts, for SDXL a Condition; LabkitError names what is too long or not in a closed vocabulary.

        `sizes` as in `generate`; None is those of a picture of the model's own size.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for prompt in prompts:
            check_text(self, prompt)
        if not self._sizes_told and sizes is None:
            return encode(self.texts, prompts).to(self.dtype)  # (B, L, D)
        side = self.unet.config.sample_size * self.vae.config.factor
        usual = usual_sizes(self._sizes_told, side, side)[0]
        sizes = usual if sizes is None else check_sizes(sizes, usual)
        return encode(self.texts, prompts, torch.tensor([sizes] * len(prompts), dtype=torch.float32)).to(self.dtype)

    def conditions(self, recipe: Recipe) -> tuple[Tensor | Condition, Tensor | Condition]:
        """What the pictures of a recipe are told in the branches "cond" and "uncond"."""
        usual = usual_sizes(self._sizes_told, recipe.height, recipe.width)
        asked = recipe.sizes
        # of what the user says, the branches share all but the refiner's aesthetic score
        told = usual if asked is None else (asked, (*asked[:4], *usual[1][4:]) if self._sizes_told == 5 else asked)
        c, uncond = self.encode_text(recipe.prompt, told[0] or None), self.encode_text(recipe.negative_prompt, told[1] or None)
        if self.force_zeros:
            uncond = silenced(uncond, torch.tensor([text == "" for text in recipe.negative_prompt], device=self.device))
        return c, uncond

    @property
    def _sizes_told(self) -> int:
        return sizes_told(self.unet.config, self.texts[-1][0].config)


def guided(network: Model, c: Tensor | Condition, uncond: Tensor | Condition, recipe: Recipe, schedule: Schedule) -> Denoiser:
    """The denoiser of a recipe: guidance, rescaled where the network speaks (v, if it says v), as eps, in its interval only."""
    inside = in_eps(classifier_free(network, c, uncond, recipe.guidance, recipe.rescale), schedule)
    return inside if recipe.interval is None else in_interval(inside, in_eps(conditioned(network, c), schedule), *recipe.interval)
