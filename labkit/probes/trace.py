"""What was recorded, asked for by name: words, layers, heads, steps, branches; never by a place in a batch.

    trace.attention("cube", layer="up.1", step=slice(0, 10), head=3)     Named, axes (step, layer, y, x)
    trace.heatmap("sphere")                                              HeatMap: one map, (h, w)

A word is a text ("cube", "red cube"), one of "BOS", "EOS", "padding", a token's position, or several positions. An axis of which
one thing is chosen is gone; steps that are not chosen are averaged, whether they were added up while drawing or kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from labkit.errors import LabkitError
from labkit.models.tokenizer import Tokenizer, normalise
from labkit.probes.heatmap import HeatMap, average, described
from labkit.probes.keep import Plan, Store
from labkit.probes.named import Named
from labkit.probes.sites import AXES, named
from labkit.probes.words import find, words
from labkit.samplers import Step

Word = str | int | Sequence[int]


@dataclass(eq=False)
class Run:
    """What was recorded of one generation; `prompts` by branch, one for each picture; `recipe` draws it again."""

    tokenizer: Tokenizer
    recipe: dict = field(default_factory=dict)
    plan: Plan | None = None
    stores: dict[tuple[str, str, str], Store] = field(default_factory=dict)  # (kind, layer, branch) -> Store
    prompts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)  # (h, w) of the latents
    images: int = 0
    steps: list[Step] = field(default_factory=list)  # with latents=True: x, eps and x0 of each step, on the CPU
    texts: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # (layer, branch) -> (image, token, channel)
    final: Tensor | None = None  # the latents that the latest step arrived at
    decode: Callable[[Tensor], object] | None = None  # latents (1, 4, h, w) -> PIL picture
    model: dict = field(default_factory=dict)  # name, and once saved the weights' hash and versions

    # --- what there is ---------------------------------------------------------------------------------------------

    def layers(self, pattern: str | tuple[str, ...] = "*", resolution: int | tuple[int, int] | None = None, kind: str = "cross") -> tuple[str, ...]:
        """Names of the recorded layers that a name, a short name ("up.1") or a shell pattern fits, in the order in which they run.

        `resolution`: only those whose maps have so many places, height or (height, width). Raises LabkitError, listing what there is.
        """
        there = named(tuple(dict.fromkeys(layer for k, layer, _ in self.stores if k == kind)), pattern)
        if resolution is None:
            return there
        at = {layer: self.resolution(layer, kind) for layer in there}
        found = tuple(layer for layer, (y, x) in at.items() if resolution in (y, (y, x)))
        if not found:
            sizes = ", ".join(f"{y}x{x}" for y, x in dict.fromkeys(at.values()))
            raise LabkitError(f"No layer has the resolution {resolution!r}; there are {sizes} (height x width).")
        return found

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that were recorded: "cond" and "uncond", or one of them where guidance was off or only one was asked for."""
        return tuple(dict.fromkeys(branch for *_, branch in self.stores))

    def tokens(self, word: Word, image: int = 0, branch: str = "cond", occurrence: int | None = None) -> tuple[int, ...]:
        """The token positions of a word, a phrase, "BOS", "EOS", "padding", a position or several; LabkitError if it is not there."""
        prompt, length = self.prompts[branch][image], self.tokenizer.max_length
        if isinstance(word, str):
            if word.strip().lower() in ("padding", "pad") and not any(normalise(w.text)[0] == normalise(word.strip())[0] for w in words(self.tokenizer, prompt)):
                return tuple(range(len(self.tokenizer.encode(prompt)), length))
            return find(self.tokenizer, prompt, word, occurrence)
        chosen = (word,) if isinstance(word, int) else tuple(word)
        if not chosen or any(type(token) is not int or not 0 <= token < length for token in chosen):
            raise LabkitError(f"A word is a text, or token positions from 0 (BOS) to {length - 1}; this is {word!r}.")
        return tuple(sorted(set(chosen)))

    def picture(self, image: int = 0):
        """The picture as it was after the latest step, PIL; LabkitError if there is none."""
        self._check_image(image)
        if self.shown() is None:
            raise LabkitError("There is no picture: none was drawn, or the trace was loaded without its model; load_trace(path, lab) has one.")
        return self.decode(self.final[image : image + 1])

    def shown(self) -> Callable[[int], object] | None:
        """`picture`, if there are pictures."""
        return None if self.final is None or self.decode is None else self.picture

    # --- attention -------------------------------------------------------------------------------------------------

    def attention(
        self, word: Word | None = None, layer: str | tuple[str, ...] = "*", step: int | slice | None = None, head: int | None = None,
        image: int = 0, branch: str = "cond", resolution: int | tuple[int, int] | None = None, occurrence: int | None = None,
    ) -> Named:  # fmt: skip
        """Cross-attention, float32 on the CPU, axes (step, layer, head, y, x, token), those of which one thing is chosen left out.

        `word`: the shares of its tokens are added; None keeps all tokens, whose shares add up to 1. `step`: a number, a slice (axis "step"),
        or None for the mean over all. `layer`: as in `layers`; axis "layer" where several fit. Raises LabkitError, listing what there is.
        """
        self.check(image, branch, "cross", word if layer == "*" else None)
        chosen = self.layers(layer, resolution)
        if len({self.resolution(one) for one in chosen}) > 1:
            sizes = {f"{y}x{x}" for y, x in (self.resolution(one) for one in chosen)}
            raise LabkitError(f"{layer!r} fits {len(chosen)} layers of sizes {', '.join(sorted(sizes))}: choose a resolution=, or one of: {', '.join(chosen)}.")
        tokens = None if word is None else self.tokens(word, image, branch, occurrence)
        return self._stacked("cross", chosen, (image, branch), step, head, tokens)

    def self_attention(self, layer: str = "*", step: int | slice | None = None, head: int | None = None, image: int = 0, branch: str = "cond") -> Named:
        """Self-attention, axes (step, layer, head, y, x, key_y, key_x): at place (y, x), the share that each other place has. Arguments as in `attention`."""
        self.check(image, branch, "self")
        return self._stacked("self", self.layers(layer, kind="self"), (image, branch), step, head)

    def residual(self, layer: str = "*", step: int | slice | None = None, image: int = 0, branch: str = "cond") -> Named:
        """The residual stream after a block, axes (step, layer, channel, y, x); "mid" is the middle block's. Arguments as in `attention`."""
        self.check(image, branch, "resid")
        return self._stacked("resid", self.layers(layer, kind="resid"), (image, branch), step)

    def text(self, layer: str = "*", image: int = 0, branch: str = "cond") -> Named:
        """Token states of the text encoder, axes (layer, token, channel): layer 0 is what its first layer reads, n what its n-th has left."""
        there = tuple(dict.fromkeys(one for one, _ in self.texts))
        if not there:
            raise LabkitError("No text states were recorded in this run: record(lab, states='text') and draw inside the block.")
        self._check_image(image)
        chosen = named(there, layer)
        if len({self.texts[one, branch].shape for one in chosen}) > 1:
            raise LabkitError(f"{layer!r} fits layers of two text encoders: choose 'text_encoder.*' or 'text_encoder_2.*'.")
        values = torch.stack([self.texts[one, branch][image] for one in chosen])  # (layer, token, channel)
        found = Named(values, ("layer", "token", "channel"), {"layer": chosen})
        return found.at(layer=chosen[0]) if len(chosen) == 1 else found

    # --- heat maps -------------------------------------------------------------------------------------------------

    def heatmap(
        self, word: Word, image: int = 0, branch: str = "cond", layers: str | tuple[str, ...] = "*", step: int | slice | None = None,
        head: int | None = None, resolution: int | tuple[int, int] | None = None, occurrence: int | None = None,
    ) -> HeatMap:  # fmt: skip
        """Where a word of the prompt had the attention: the mean over steps, heads and layers, (h, w) at the latents' size.

        The shares of all tokens of the word, and of all places where it stands in the prompt (or of one `occurrence`,
        0 is the first), are added. Each layer's map is upsampled bilinearly after the averaging over steps and heads.
        `branch` "uncond" speaks of the negative prompt's words. Raises LabkitError that lists the words, layers or branches there are.
        """
        self.check(image, branch, "cross")
        tokens = self.tokens(word, image, branch, occurrence)
        chosen = self.layers(layers, resolution)
        maps = []
        for layer in chosen:
            m = self._stacked("cross", (layer,), (image, branch), step, head, tokens)
            maps.append(m.mean(*(axis for axis in ("step", "head") if axis in m.axes)).values)  # (y, x)
        seen = self.stores["cross", chosen[0], branch].steps
        count = len(seen) if step is None else 1 if isinstance(step, int) else len([i for i in range(max(seen) + 1)[step] if i in seen])
        about = described(count, len(chosen), f"head {head}" if head is not None else "all heads", self.tokenizer.max_length)
        name = word if isinstance(word, str) else f"token {', '.join(map(str, tokens))}"
        return HeatMap(name, average(maps, self.size), about, tokens, branch, image, self.shown())

    def heatmaps(self, image: int = 0, branch: str = "cond", layers: str | tuple[str, ...] = "*", **which) -> list[HeatMap]:
        """One heat map for each word of the prompt, in reading order; a word that stands there twice has one map. `which` as in `heatmap`."""
        self.check(image, branch, "cross")
        there: dict[str, str] = {}
        for span in words(self.tokenizer, self.prompts[branch][image]):
            there.setdefault(normalise(span.text)[0], span.text)
        return [self.heatmap(word, image, branch, layers, **which) for word in there.values()]

    # --- one layer's numbers ---------------------------------------------------------------------------------------

    def _stacked(self, kind: str, chosen: tuple[str, ...], which: tuple[int, str], step=None, head: int | None = None, tokens=None) -> Named:
        """One picture's numbers of some layers of one size: (step, layer, ...), those axes left out of which there is one only."""
        image, branch = which
        stores = [self.stores[kind, layer, branch] for layer in chosen]
        if len({store.values.shape[2:] for store in stores}) > 1:
            raise LabkitError(f"{len(chosen)} layers of different shapes cannot be put together; choose one of: {', '.join(chosen)}.")
        axes, labels, columns = list(AXES[kind]), {}, None if tokens is None else self._columns(tokens)
        found = [store.mean(image, step, columns) for store in stores]
        values = torch.stack([values for values, _ in found], dim=int(isinstance(step, slice)))  # (step?, layer, head, y, x, token)
        axes, labels = ["layer", *axes], {"layer": chosen}
        if isinstance(step, slice):
            axes, labels = ["step", *axes], {"step": found[0][1], **labels}
        whole = Named(values, tuple(axes), labels)
        if tokens is not None:
            whole = whole.sum("token")
        if AXES[kind][0] == "head" and (head is not None or self._averaged(kind)):
            whole = whole.at(head=self._head(head, whole.shape["head"], chosen[0], kind))
        return whole.at(layer=chosen[0]) if len(chosen) == 1 else whole

    def _head(self, head: int | None, heads: int, layer: str, kind: str) -> int:
        if self._averaged(kind):
            if head is not None:
                raise LabkitError("The heads were averaged while they were recorded: record(lab, keep='raw'), or 'sums', keeps them apart.")
            return 0
        if type(head) is not int or not 0 <= head < heads:
            raise LabkitError(f"{layer} has heads 0 to {heads - 1}, there is no head {head!r}.")
        return head

    def _columns(self, tokens: tuple[int, ...]) -> list[int]:
        """Where some tokens stand in a store."""
        single = self.plan.columns  # tokens from here on were added up
        together = [token for token in tokens if token >= single]
        if together and len(together) != self.tokenizer.max_length - single:
            raise LabkitError(f"Padding tokens, from {single} on, were added up while they were recorded: ask for 'padding', or record(lab, keep='raw').")
        return [token for token in tokens if token < single] + ([single] if together else [])

    def _averaged(self, kind: str) -> bool:
        return kind in ("cross", "self") and not self.plan.keep.heads

    def resolution(self, layer: str, kind: str = "cross") -> tuple[int, int]:
        """(y, x) of a layer's maps."""
        values = next(store.values for (k, one, _), store in self.stores.items() if (k, one) == (kind, layer))
        at = 2 + AXES[kind].index("y")
        return tuple(values.shape[at : at + 2])

    def check(self, image: int, branch: str, kind: str, layer_in_its_place: Word | None = None) -> None:
        kinds = dict.fromkeys(k for k, *_ in self.stores)
        if kind not in kinds:
            asked = {"cross": "attention='cross'", "self": "attention='self'", "resid": "states='resid'", "queries": "states='queries'"}[kind]
            what = {"cross": "attention", "self": "self-attention", "resid": "residual stream", "queries": "queries"}[kind]
            raise LabkitError(f"No {what} was recorded in this run: record(lab, {asked}) and draw inside the block.")
        if branch not in self.branches:
            raise LabkitError(f"The branch {branch!r} was not computed; there is: {', '.join(self.branches)}.")
        self._check_image(image)
        if isinstance(layer_in_its_place, str) and "_block" in layer_in_its_place:
            raise LabkitError(f"{layer_in_its_place!r} is a layer: say attention(layer={layer_in_its_place!r}); first comes a word.")

    def _check_image(self, image: int) -> None:
        if type(image) is not int or not 0 <= image < self.images:
            raise LabkitError(f"There are images 0 to {self.images - 1}, there is no image {image!r}.")


class Trace:
    """What was recorded in a `with record(...)` block: `runs`, one for each generation, in the order they were started.

    What is asked of the trace itself is asked of the latest run: `trace.heatmap(...)` is `trace.runs[-1].heatmap(...)`, and so for
    everything else that a `Run` has.
    """

    def __init__(self, lab=None, runs: list[Run] | None = None) -> None:
        self.lab = lab
        self.runs: list[Run] = runs or []

    @property
    def run(self) -> Run:
        """The latest run; LabkitError if nothing was drawn."""
        if not self.runs:
            raise LabkitError("Nothing was recorded: call lab.generate(...) or lab.steps(...) inside the with block.")
        return self.runs[-1]

    def __getattr__(self, name: str):
        if name.startswith("_") or name not in asked_of_runs():
            raise AttributeError(f"A Trace has no {name!r}; it has runs, and what a Run has.")
        return getattr(self.run, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *asked_of_runs()})


def asked_of_runs() -> set[str]:
    """The public names of a Run."""
    return {name for name in (*vars(Run), *(field.name for field in fields(Run))) if not name.startswith("_")}
