"""What a picture is made by: the arguments of `generate`, completed and checked, as plain values.

    prompt, seed, negative_prompt, guidance    one for all pictures, or one for each     ->  one for each of B pictures
    steps, guidance, sampler, height, width    None                                      ->  the model's own

`lab.generate(**recipe.plain())` draws the same pictures again, so whatever changes a picture stands here. All that can be said of
it without computing anything is said at once: a run of minutes must not end in an error that its first second could have told.
"""

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches

from labkit.errors import LabkitError
from labkit.models.condition import check_sizes, sizes_told, usual_sizes
from labkit.models.tokenizer import WORDS, normalise
from labkit.samplers import SAMPLERS


@dataclass(frozen=True)
class Recipe:
    """The arguments of `generate`; once `complete`d no field but the last two is None, and lists have B entries."""

    prompt: str | list[str]                       # what to draw
    steps: int | None = None
    guidance: float | list[float] | None = None   # w: 1 is none, more pulls towards the prompt; a number serves all pictures
    seed: int | list[int] = 0                     # where the noise comes from
    negative_prompt: str | list[str] = ""         # what to keep away from
    height: int | None = None                     # pixels
    width: int | None = None
    sampler: str | None = None
    rescale: float = 0.0                          # phi, 0 to 1: how much of its spread guidance gives back (Lin et al. 2023)
    interval: tuple[float, float] | None = None   # guide where low <= t <= high only (Kynkaanniemi et al. 2024); None: everywhere
    sizes: tuple[float, ...] | None = None        # what SDXL is told in place of its usual sizes

    def plain(self) -> dict:
        """The arguments as values that JSON knows, without those that are off."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in said.items() if name not in RARE or value not in (0.0, None)}


RARE = ("rescale", "interval", "sizes")


def complete(lab, prompt: str | list[str], **asked) -> Recipe:
    """The Recipe of a prompt, or of several, for a LatentDiffusion; `asked` are fields of it. Raises LabkitError if any of it cannot be."""
    if unknown := [name for name in asked if name not in Recipe.__dataclass_fields__]:
        raise LabkitError(f"There is no argument {unknown[0]!r}; there are {', '.join(Recipe.__dataclass_fields__)}.")
    asked = {name: _plain(value) for name, value in asked.items()}
    recipe, side = Recipe(_plain(prompt), **asked), lab.unet.config.sample_size * lab.vae.config.factor
    usual = {**{name: lab.defaults[name] for name in ("steps", "guidance", "sampler")}, "height": side, "width": side, "rescale": 0.0}
    recipe = replace(recipe, **{name: value for name, value in usual.items() if getattr(recipe, name) is None})
    recipe = replace(recipe, **_one_for_each(recipe), interval=_interval(recipe.interval))
    for text in recipe.prompt + recipe.negative_prompt:
        if not isinstance(text, str):
            raise LabkitError(f"A prompt is a text, this is {type(text).__name__} {text!r}.")
    if not all(text.strip() for text in recipe.prompt):
        raise LabkitError("The prompt is empty: say what to draw, such as 'a red sphere'.")
    if recipe.sampler not in SAMPLERS:
        raise LabkitError(f"Unknown sampler {recipe.sampler!r}: use one of {', '.join(SAMPLERS)}.")
    lab.schedule.timesteps(recipe.steps)  # raises where the number cannot be
    for field in ("height", "width"):
        _check_side(lab, field, getattr(recipe, field))
    if recipe.sizes is None:
        return recipe
    told = sizes_told(lab.unet.config, lab.texts[-1][0].config)
    return replace(recipe, sizes=check_sizes(recipe.sizes, usual_sizes(told, side, side)[0]))


def check_text(lab, text: str) -> None:
    """Raise LabkitError if a text is longer than a model reads, or has words that are not in its closed vocabulary."""
    for _, tokenizer in lab.texts:
        if rest := tokenizer.cut(text):
            n = tokenizer.max_length - 2
            raise LabkitError(f"The prompt is too long: the model reads {n} tokens, {rest!r} is cut off. Shorten it.")
    if unknown := unknown_words(lab, text):
        known = sorted(lab.vocabulary)
        near = get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        names = ", ".join(map(repr, unknown))
        raise LabkitError(f"{lab.name} does not know {names}.{hint} It knows these words: {' '.join(known)}")


def unknown_words(lab, text: str) -> list[str]:
    """The words of a text that are not in a model's closed vocabulary, each once; none for a model without one."""
    said = WORDS.findall(normalise(text)[0]) if lab.vocabulary else ()
    return [word for word in dict.fromkeys(said) if word not in lab.vocabulary]


def check_words_alone(lab) -> None:
    """Raise LabkitError if the U-Net wants to be shown a picture beside the words, as those for inpainting do."""
    if (n := lab.unet.config.in_channels) != lab.vae.config.latent_channels:
        raise LabkitError(
            f"{lab.name} is made for inpainting: its U-Net reads {n} channels (latents, mask, latents of the masked picture), so it cannot draw from "
            "words alone; use labkit.inpaint(lab, prompt, image, mask), or lab.unet(x, t, c) with all of them."
        )


def _one_for_each(recipe: Recipe) -> dict:
    """The fields that are one value or one for each picture, as lists of B; one guidance scale for all stays a number."""
    lists = {name: _listed(getattr(recipe, name)) for name in ("prompt", "seed", "negative_prompt")}
    if isinstance(recipe.guidance, (list, tuple)):
        lists["guidance"] = _listed(recipe.guidance)
    B = max(1, *(len(values) for values in lists.values()))
    for field, values in lists.items():
        if len(values) not in (1, B):
            raise LabkitError(f"{field} has {len(values)} entries for {B} pictures: give one, or one for each.")
        lists[field] = values * (B // len(values))
    return lists


def _interval(interval) -> tuple[float, float] | None:
    """Two timesteps as plain numbers; which is the lower one is for `guidance.in_interval` to check."""
    if interval is None:
        return None
    if not isinstance(interval, (list, tuple)) or len(interval) != 2 or not all(type(t) in (int, float) for t in interval):
        raise LabkitError(f"The guidance interval is {interval!r}: give two timesteps, the lower first, such as (200, 800).")
    return tuple(interval)


def _check_side(lab, field: str, pixels: int) -> None:
    # f pixels make one latent, and the U-Net halves the latents at every level but the last
    multiple = lab.vae.config.factor * 2 ** (len(lab.unet.config.block_out_channels) - 1)
    if not isinstance(pixels, int) or pixels < multiple or pixels % multiple:
        near = max(round(pixels / multiple), 1) * multiple if isinstance(pixels, int) else multiple
        raise LabkitError(f"{field} is {pixels!r}: give a multiple of {multiple} pixels, such as {near}.")


def _plain(value):
    """Tensors and arrays as numbers and lists of them."""
    return value.tolist() if hasattr(value, "tolist") else value


def _listed(value) -> list:
    return [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)
