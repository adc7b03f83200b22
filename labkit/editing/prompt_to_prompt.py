"""Prompt-to-Prompt: change a word, keep the picture, by carrying attention over from one run into another.

    A*_t = w . edit(A_source,t, A_target,t)     cross-attention of the target, in the steps of its window; edit and w by token
    S*_t = S_source,t                           self-attention of the target in coarse layers, in the steps of its window
    x    = x_source + m (x_target - x_source)   local blend, where asked for

Hertz et al. 2022, "Prompt-to-Prompt Image Editing with Cross Attention Control". Source and targets are drawn in one batch from the
same noise, so that at each step the target can read what the source attends to. `alignment.py` says which token's map goes
where (edit), `control.py` when and in which layers, `blend.py` what m is. Only the conditional branch is edited.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from labkit.device import Noise
from labkit.diffusion import Course, LatentDiffusion
from labkit.editing.alignment import Alignment, align
from labkit.editing.blend import Blend, blend_tokens, mask
from labkit.editing.control import Control, Window, check_prompts, coarse, cross_table, for_each, self_table, weights, worded
from labkit.errors import LabkitError
from labkit.generation import to_pil
from labkit.models.tokenizer import Tokenizer
from labkit.probes.heatmap import HeatMap
from labkit.probes.words import find
from labkit.recipe import Recipe, check_text, check_words_alone, complete
from labkit.samplers import Step
from labkit.tap import listen


@dataclass(frozen=True, eq=False)
class Edit:
    """S pictures of a source prompt, and of each of K target prompts; what they were made with, and the maps and masks."""

    sources: list[Image.Image]             # one a seed
    edited: list[list[Image.Image]]        # [target][seed]
    latents: Tensor                        # (1 + K, S, 4, h, w), the source first
    maps: Tensor                           # (1 + K, S, y, x, L) float32: cross-attention used, mean over steps, heads, and layers of y x x places
    masks: Tensor | None                   # (K, S, h, w) of 0 and 1, where the local blend let the edit in after the last step
    alignments: list[Alignment]
    prompts: tuple[str, ...]               # the source's, then the targets'
    recipe: dict                           # what both sides were drawn with, as of `generate`
    model: str
    tokenizer: Tokenizer = field(repr=False)

    @property
    def source(self) -> Image.Image:
        """The source's first picture."""
        return self.sources[0]

    @property
    def image(self) -> Image.Image:
        """The first target's first picture."""
        return self.edited[0][0]

    def heatmap(self, word: str, target: int | None = 0, seed: int = 0) -> HeatMap:
        """Where a word of a target's prompt (of the source's with target=None) had the attention in this edit, (y, x)."""
        side = 0 if target is None else 1 + target
        if not 0 <= side < len(self.prompts) or not 0 <= seed < len(self.sources):
            raise LabkitError(f"There is no picture of target {target}, seed number {seed}: this edit has {len(self.edited)} targets and {len(self.sources)} seeds.")
        tokens = find(self.tokenizer, self.prompts[side], word)
        about = f"mean over steps, heads, and the layers of {self.maps.shape[2]}x{self.maps.shape[3]} places; the shares of all tokens sum to 1"
        return HeatMap(word, self.maps[side, seed][..., list(tokens)].sum(-1), about, tokens, "cond", seed)

    def _repr_png_(self) -> bytes:
        """What a notebook shows: a row a seed, the source and the edits side by side."""
        width, height = self.source.size
        sheet = Image.new("RGB", (width * len(self.prompts), height * len(self.sources)))
        for k, column in enumerate([self.sources, *self.edited]):
            for s, image in enumerate(column):
                sheet.paste(image, (k * width, s * height))
        sheet.save(png := BytesIO(), "PNG")
        return png.getvalue()


def edit(
    lab: LatentDiffusion,
    source: str,
    target: str | Sequence[str] | None = None,
    cross: Window | Mapping[str, Window] | list = 0.8,
    self_attention: Window | list = 0.4,
    reweight: Mapping[str, float] | list | None = None,
    blend: str | Sequence[str] | Blend | None = None,
    method: str = "replace",
    reference: bool = False,
    progress: bool = True,
    **asked,
) -> Edit:
    """Draw `source`, and `target` (one or several; None: the source again, for `reweight`) as the same picture with that change.

    `cross`: the share of the steps in which cross-attention is edited, or (begin, end), or one by word: {"default_": 0.8, "cube": 0.4}.
    `self_attention`: the share in which self-attention is copied; more keeps more of the source's shape. `reweight`: {"red": 3} makes
    a word of the target count for more (all steps). `blend`: words outside of whose maps the source's picture stays; "changed" for
    those that differ; a `Blend` for its threshold. `method`: whether words that replace others take over their maps ("replace") or keep
    their own ("refine"). cross, self_attention and reweight are one for all targets, or a list with one for each. `reference`: as the
    published code has it, quirks included (labkit.editing.published). `asked`: other arguments of `lab.generate`; several seeds draw
    several pictures, each from its own noise. Raises LabkitError if any of it cannot be. A recording around it hears attention as the
    network computes it; `Edit.maps` are what was used.
    """
    run = Run(lab, source, target, asked, reference)
    run.control(cross, self_attention, reweight, method)
    run.blend(blend)
    return run.draw(progress)


class Run:
    """One edit in progress: S seeds x (1 source + K targets) pictures, rows in this order."""

    def __init__(self, lab: LatentDiffusion, source: str, target: str | Sequence[str] | None, asked: dict, reference: bool = False) -> None:
        check_words_alone(lab)
        targets = [source] if target is None else [target] if isinstance(target, str) else list(target)
        check_prompts([source, *targets])
        if not targets:
            raise LabkitError("There is no target prompt: give one, or a list of them.")
        for text in (source, *targets):
            check_text(lab, text)
        self.lab, self.source, self.targets, self.reference = lab, source, targets, reference
        self.tokenizer = lab.texts[0][1]
        self.recipe = complete(lab, source, **asked)  # of S pictures
        if _all_zero(self.recipe.guidance):
            raise LabkitError("Guidance is 0: the prompts are not looked at, so there is nothing to edit; give 1 or more.")
        self.size = (self.recipe.height // lab.vae.config.factor, self.recipe.width // lab.vae.config.factor)
        self.words = worded(lab.unet, self.size)
        self.maps: Tensor | None = None  # (S, 1 + K, N, L), sum over calls and layers
        self.calls, self.masks, self.blended = 0, None, None

    @property
    def S(self) -> int:
        return len(self.recipe.seed)

    @property
    def K(self) -> int:
        return len(self.targets)

    def control(self, cross, self_attention, reweight, method: str = "replace") -> None:
        """Work out what is edited when, for each target."""
        T, said = self.recipe.steps, {"cross": cross, "self_attention": self_attention, "reweight": reweight}
        each = zip(self.targets, *(for_each(value, self.K, name) for name, value in said.items()))
        self.controls = [
            Control(
                align(self.tokenizer, self.source, text, method, self.reference),
                cross_table(c, self.tokenizer, text, T, self.reference),
                self_table(s, T, self.reference),
                weights(w, self.tokenizer, text),
            )
            for text, c, s, w in each
        ]

    def blend(self, said: str | Sequence[str] | Blend | None) -> None:
        """Work out the tokens of the masks, for each target."""
        if said is None:
            return
        blend = said if isinstance(said, Blend) else Blend(() if said == "changed" else said)
        self.blended = blend
        self.tokens = [blend_tokens(blend, self.tokenizer, self.source, text, c.alignment) for text, c in zip(self.targets, self.controls)]

    def draw(self, progress: bool) -> Edit:
        from tqdm.auto import tqdm

        recipe = expanded(self.recipe, [self.source, *self.targets])
        steps = self.lab.steps(**recipe.plain(), course=self.course)
        with self.listening():
            for step in tqdm(steps, total=recipe.steps, desc=self.lab.name, disable=not progress):
                pass
        latents = rearrange(step.x, "(s k) c h w -> k s c h w", s=self.S)
        images = to_pil(self.lab.decode(rearrange(latents, "k s c h w -> (k s) c h w")))
        images = [images[k * self.S : (k + 1) * self.S] for k in range(1 + self.K)]
        y, x = next(iter(self.words.values()))
        maps = rearrange(self.maps / self.calls, "s k (y x) l -> k s y x l", y=y, x=x).cpu()
        masks = None if self.masks is None else self.masks.cpu()
        alignments = [c.alignment for c in self.controls]
        prompts = (self.source, *self.targets)
        return Edit(images[0], images[1:], latents, maps, masks, alignments, prompts, self.recipe.plain(), self.lab.name, self.tokenizer)

    def course(self, noise: Noise) -> Course:
        return Course(noise.draw(), after=self.after)

    def listening(self) -> AbstractContextManager:
        """Listeners at all cross-attention, and at self-attention of coarse layers if any target copies it."""
        listeners = {"*.attn2.probs": self.cross_attention}
        if any(bool(c.self.any()) for c in self.controls):
            listeners |= {name: self.self_attention for name in coarse(self.lab.unet, "attn1", self.size)}
        return listen(self.lab.unet, listeners)

    def rows(self, probs: Tensor) -> tuple[Tensor, int] | None:
        """The rows apart, (branch, S, 1 + K, heads, N, keys), with the number of the conditional branch; None if there is none."""
        layout = self.lab.layout
        if layout is None or layout.images != self.S * (1 + self.K):
            raise LabkitError("The U-Net was called outside of the edit that listens to it: let the edit end first.")
        if "cond" not in layout.branches:
            return None
        return rearrange(probs, "(b s k) head n l -> b s k head n l", b=len(layout.branches), s=self.S), layout.branches.index("cond")

    def cross_attention(self, probs: Tensor, name: str) -> Tensor | None:
        if (found := self.rows(probs)) is None:
            return None
        rows, cond = found
        i, here = self.lab.layout.i, rows[cond].clone()  # (S, 1 + K, heads, N, L)
        for k, c in enumerate(self.controls, start=1):
            here[:, k] = self.edited(rows[cond, :, 0], rows[cond, :, k], c, i)
        if name in self.words:
            used = here.float().mean(2)  # (S, 1 + K, N, L)
            self.maps = used if self.maps is None else self.maps + used
            self.calls += 1
        out = rows.clone()
        out[cond] = here
        return rearrange(out, "b s k head n l -> (b s k) head n l")

    def edited(self, source: Tensor, target: Tensor, c: Control, i: int) -> Tensor:
        """A* of one target in step i, (S, heads, N, L)."""
        strength = c.cross[i].to(source)  # (L,)
        if self.reference:  # there the weight is part of the edit, and ends with its window
            return torch.lerp(target, c.alignment.mixed(source, target) * c.weights.to(source), strength.expand_as(target))
        used = c.alignment.mixed(source, target, strength) if bool(c.cross[i].any()) else target
        return used if bool((c.weights == 1).all()) else used * c.weights.to(source)

    def self_attention(self, probs: Tensor, name: str) -> Tensor | None:
        if (found := self.rows(probs)) is None or not any(bool(c.self[self.lab.layout.i]) for c in self.controls):
            return None
        rows, cond = found
        out = rows.clone()
        for k, c in enumerate(self.controls, start=1):
            if c.self[self.lab.layout.i]:
                out[cond, :, k] = rows[cond, :, 0]
        return rearrange(out, "b s k head n l -> (b s k) head n l")

    def after(self, step: Step) -> Tensor | None:
        """The latents with the source's put back outside of the masks."""
        blend = self.blended
        if blend is None or self.maps is None or step.i < int(blend.start * self.recipe.steps):
            return None
        y, x = next(iter(self.words.values()))
        maps = rearrange(self.maps, "s k (y x) l -> k s y x l", y=y, x=x)
        latents = rearrange(step.x, "(s k) c h w -> k s c h w", s=self.S).clone()
        seen = partial(mask, size=self.size, threshold=blend.threshold, reference=self.reference)
        self.masks = torch.stack([torch.maximum(seen(maps[0], a), seen(maps[k], b)) for k, (a, b) in enumerate(self.tokens, start=1)])  # (K, S, h, w)
        m = self.masks[:, :, None].to(latents)
        latents[1:] = torch.lerp(latents[:1], latents[1:], m)
        return rearrange(latents, "k s c h w -> (s k) c h w")


def expanded(recipe: Recipe, prompts: Sequence[str]) -> Recipe:
    """A recipe of S pictures as one of S x len(prompts), each seed with every prompt."""
    n, many = len(prompts), {"prompt": [text for _ in recipe.seed for text in prompts]}
    for name in ("seed", "negative_prompt", "guidance"):
        value = getattr(recipe, name)
        many[name] = [one for one in value for _ in range(n)] if isinstance(value, list) else value
    return replace(recipe, **many)


def _all_zero(guidance: float | list[float]) -> bool:
    return all(w == 0 for w in (guidance if isinstance(guidance, list) else [guidance]))
