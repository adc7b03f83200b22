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
from dataclasses import replace
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from labkit.device import Noise
from labkit.diffusion import Course, LatentDiffusion
from labkit.editing.alignment import align
from labkit.editing.blend import Blend, blend_tokens, mask
from labkit.editing.control import Control, Window, check_prompts, coarse, cross_table, for_each, self_table, weights, worded
from labkit.editing.inversion import Inversion
from labkit.editing.result import Edit
from labkit.errors import LabkitError
from labkit.generation import to_pil
from labkit.models.condition import Condition
from labkit.models.unet import states_of
from labkit.recipe import Recipe, check_text, check_words_alone, complete
from labkit.samplers import Step
from labkit.tap import listen


CROSS, SELF = 0.2, 0.5  # on the frontier of twelve settings on the shipped model: as many edits verified as without editing, within the noise, and more is kept (README)


def edit(
    lab: LatentDiffusion,
    source: str | Inversion,
    target: str | Sequence[str] | None = None,
    cross: Window | Mapping[str, Window] | list = CROSS,
    self_attention: Window | list = SELF,
    reweight: Mapping[str, float] | list | None = None,
    blend: str | tuple[str, ...] | Blend | list | None = None,
    method: str = "replace",
    reference: bool = False,
    progress: bool = True,
    **asked,
) -> Edit:
    """Draw `source`, and `target` (one or several; None: the source again, for `reweight`) as the same picture with that change.

    `source` is a prompt, or the Inversion of pictures that are to be edited.
    `cross`: the share of the steps in which cross-attention is edited, or (begin, end), or one by word: {"default_": 0.8, "cube": 0.4}.
    `self_attention`: the share in which self-attention is copied; more keeps more of the source's shape. `reweight`: {"red": 3} makes
    a word of the target count for more (all steps). `blend`: a word, or a tuple of words, outside of whose maps the source's picture
    stays; "changed" for those that differ; a `Blend` for its threshold. `method`: whether words that replace others take over their maps
    ("replace") or keep their own ("refine"). These are one for all targets, or, but for the method, a list with one for each.
    `reference`: as the published code has it, quirks included (labkit.editing.published). `asked`: other arguments of `lab.generate`; several seeds draw
    several pictures, each from its own noise. Raises LabkitError if any of it cannot be. A recording around it hears attention as the
    network computes it; `Edit.maps` are what was used.
    """
    run = Run(lab, source, target, asked, reference)
    run.control(cross, self_attention, reweight, method)
    run.blend(blend)
    return run.draw(progress)


class Run:
    """One edit in progress: S seeds x (1 source + K targets) pictures, rows in this order."""

    def __init__(self, lab: LatentDiffusion, source: str | Inversion, target: str | Sequence[str] | None, asked: dict, reference: bool = False) -> None:
        check_words_alone(lab)
        self.inversion = source if isinstance(source, Inversion) else None
        if self.inversion:
            asked, source = edit_recipe(self.inversion, asked), self.inversion.prompt
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
        self.calls, self.masks, self.blends = 0, None, [None] * len(targets)

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
        # targets that ask for no change are the source, bit by bit, unless an inversion pins that to its path
        same = [k for k, (text, c) in enumerate(zip(self.targets, self.controls)) if text == self.source and bool((c.weights == 1).all())]
        self.unchanged = [] if self.inversion is not None and self.inversion.pinned else same

    def blend(self, said) -> None:
        """Work out the tokens of the masks, for each target; None where it is not blended."""
        each = [one if isinstance(one, (Blend, type(None))) else Blend(() if one == "changed" else one) for one in for_each(said, self.K, "blend")]
        tokens = partial(blend_tokens, tokenizer=self.tokenizer, source=self.source)
        self.blends = [one and (one, *tokens(one, target=text, alignment=c.alignment)) for one, text, c in zip(each, self.targets, self.controls)]

    def draw(self, progress: bool) -> Edit:
        from tqdm.auto import tqdm

        recipe = expanded(self.recipe, [self.source, *self.targets])
        steps = self.lab.steps(**recipe.plain(), course=self.course)
        with self.listening():
            for step in tqdm(steps, total=recipe.steps, desc=self.lab.name, disable=not progress):
                pass
        latents = rearrange(step.x, "(s k) c h w -> k s c h w", s=self.S)
        images = to_pil(self.lab.decode(rearrange(latents, "k s c h w -> (k s) c h w")))
        images = [images[(0 if k - 1 in self.unchanged else k) * self.S :][: self.S] for k in range(1 + self.K)]
        y, x = next(iter(self.words.values()))
        maps = rearrange(self.maps / self.calls, "s k (y x) l -> k s y x l", y=y, x=x).cpu()
        masks = None if self.masks is None else self.masks.cpu()
        alignments = [c.alignment for c in self.controls]
        prompts = (self.source, *self.targets)
        return Edit(images[0], images[1:], latents, maps, masks, alignments, prompts, self.recipe.plain(), self.lab.name, self.tokenizer)

    def course(self, noise: Noise) -> Course:
        if self.inversion is None:
            return Course(noise.draw(), after=self.after)
        z = self.inversion.z.repeat_interleave(1 + self.K, dim=0)  # (S * (1 + K), 4, h, w)
        return Course(z, said=self.said, after=self.after)

    def said(self, c: Tensor | Condition) -> Tensor | Condition:
        """The condition of all rows, with the unconditional states that null text found for this step."""
        layout = self.lab.layout
        if self.inversion.uncond is None or "uncond" not in layout.branches:
            return c
        begin, states = layout.branches.index("uncond") * layout.images, states_of(c).clone()
        states[begin : begin + layout.images] = self.inversion.uncond[layout.i].repeat_interleave(1 + self.K, dim=0).to(states)
        return replace(c, states=states) if isinstance(c, Condition) else states

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
        out, i = rows.clone(), self.lab.layout.i
        for k, c in enumerate(self.controls, start=1):
            out[cond, :, k] = self.edited(rows[cond, :, 0], rows[cond, :, k], c, i)
        if name in self.words:
            used = out[cond].float().mean(2)  # (S, 1 + K, N, L)
            self.maps = used if self.maps is None else self.maps + used
            self.calls += 1
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
        """Where the step goes on from: the source on its path, where it is pinned to one; its latents outside of the masks."""
        pinned = self.inversion is not None and self.inversion.pinned
        blends = {k: one for k, one in enumerate(self.blends) if one and self.maps is not None and step.i >= int(one[0].start * self.recipe.steps)}
        if not (blends or pinned or self.unchanged):
            return None
        latents = rearrange(step.x, "(s k) c h w -> k s c h w", s=self.S).clone()
        for k in self.unchanged:  # kernels may round the rows of a batch differently, by how threads share them
            latents[1 + k] = latents[0]
        if pinned:
            latents[0] = self.inversion.path[self.recipe.steps - 1 - step.i].to(latents)
        if blends and self.masks is None:
            self.masks = torch.ones(self.K, self.S, *self.size, device=latents.device)
        for k, (blend, before, after) in blends.items():
            y, x = next(iter(self.words.values()))
            maps = rearrange(self.maps, "s k (y x) l -> k s y x l", y=y, x=x)
            seen = partial(mask, size=self.size, threshold=blend.threshold, reference=self.reference)
            self.masks[k] = torch.maximum(seen(maps[0], before), seen(maps[1 + k], after))  # (S, h, w)
            latents[1 + k] = torch.lerp(latents[0], latents[1 + k], self.masks[k][:, None].to(latents))
        return rearrange(latents, "k s c h w -> (s k) c h w")


def edit_recipe(inversion: Inversion, asked: dict) -> dict:
    """The arguments with which inverted pictures are edited: those of the inversion, but for what may be changed."""
    fixed = {"steps", "sampler", "height", "width", "seed", "sizes"} | ({"guidance", "negative_prompt", "rescale", "interval"} if inversion.uncond is not None else set())
    if changed := fixed & set(asked):
        raise LabkitError(f"{', '.join(sorted(changed))}: an inversion was made for its own, so leave it out here and give it to invert.")
    return {**{name: value for name, value in inversion.recipe.plain().items() if name != "prompt"}, **asked}


def expanded(recipe: Recipe, prompts: Sequence[str]) -> Recipe:
    """A recipe of S pictures as one of S x len(prompts), each seed with every prompt."""
    n, many = len(prompts), {"prompt": [text for _ in recipe.seed for text in prompts]}
    for name in ("seed", "negative_prompt", "guidance"):
        value = getattr(recipe, name)
        many[name] = [one for one in value for _ in range(n)] if isinstance(value, list) else value
    return replace(recipe, **many)


def _all_zero(guidance: float | list[float]) -> bool:
    return all(w == 0 for w in (guidance if isinstance(guidance, list) else [guidance]))
