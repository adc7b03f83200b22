"""Interventions: take a part of a network out, turn it up or down, or put another run's activations in its place, and see what follows.

    x  ->  where(mask, edit(x), x)            mask: chosen branches, pictures, steps, heads and tokens;  edit: 0, mean, factor * x, another run's x

    with ablate(lab, Where("heads", layers="up.1", heads=2)):
        without = lab.generate("a red sphere", seed=0)
    with capture(lab, Where("values")) as clean:
        lab.generate("a red sphere", seed=0)
    with patch(lab, Where("values", layers="mid", steps=slice(0, 10)), clean):
        patched = lab.generate("a blue sphere", seed=0)

An ablation says that a part is needed, a patch that it carries what differs between two runs (Meng et al. 2022, "Locating and Editing
Factual Associations in GPT"). Whatever is done ends with the block, also after an exception; no weight is touched. An intervention that
hits nothing is an error.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from labkit.diffusion import LatentDiffusion, Layout
from labkit.errors import LabkitError
from labkit.probes.sites import fits, short
from labkit.probes.words import find
from labkit.tap import listen, taps

PATTERNS = {  # kind -> taps; what flows there for each row of the batch
    "heads": "*.attn2.heads",        # (head, place, channel): what each head of cross-attention adds, before it is mixed
    "cross": "*.attn2.probs",        # (head, place, token): attention of places to the text
    "queries": "*.attn2.q",          # (head, place, channel)
    "keys": "*.attn2.k",             # (head, token, channel): of the text
    "values": "*.attn2.v",           # (head, token, channel)
    "self heads": "*.attn1.heads",   # (head, place, channel)
    "self": "*.attn1.probs",         # (head, place, place)
    "self keys": "*.attn1.k",        # (head, place, channel)
    "self values": "*.attn1.v",      # (head, place, channel)
    "resid": "*.resid",              # (channel, y, x): the residual stream after each block
}  # fmt: skip
TOKENS = {"cross": 3, "keys": 2, "values": 2}  # the axis of the text's tokens
BUDGET = 4e9  # bytes that `capture` may keep

Which = int | Sequence[int] | slice | None
Edit = Callable[[Tensor, str], Tensor]  # (what flows there, the tap's name) -> the same shape


@dataclass(frozen=True)
class Where:
    """A part of a network in time and space; None means all. `layers`: a name, a short name ("up.1", "mid"), a shell pattern, or several.

    `heads`, `steps` and `images`: a number, several, or a slice; step 0 is the noisiest. `tokens`: a word or phrase of the prompt, "BOS", "EOS",
    a position or several; of keys, values and cross-attention only. `branch`: "cond" or "uncond".
    """

    kind: str = "heads"
    layers: str | tuple[str, ...] = "*"
    heads: Which = None
    steps: Which = None
    tokens: str | Which = None
    branch: str | None = None
    images: Which = None

    def __post_init__(self) -> None:
        if self.kind not in PATTERNS:
            raise LabkitError(f"There is no kind {self.kind!r} of activation; there are: {', '.join(PATTERNS)}.")
        if self.branch not in ("cond", "uncond", None):
            raise LabkitError(f"The branch is {self.branch!r}: use 'cond', 'uncond', or None for both.")
        if self.tokens is not None and self.kind not in TOKENS:
            raise LabkitError(f"{self.kind!r} has no axis of the text's tokens; {', '.join(TOKENS)} have one.")
        if self.heads is not None and self.kind == "resid":
            raise LabkitError("The residual stream has no heads: leave heads= out, or choose another kind.")


@dataclass(eq=False)
class Captured:
    """Activations of a run: `calls[tap, step]`, one tensor (rows, ...) a network call of that step, on the CPU; rows as `layout` says."""

    calls: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    layouts: dict[tuple[str, int], Layout] = field(default_factory=dict)
    bytes: int = 0

    def rows(self, tap: str, layout: Layout, call: int) -> Tensor:
        """What flowed through a tap, row by row for a call with this layout; one picture serves all. LabkitError if it was not captured."""
        key = tap, layout.i
        if key not in self.calls:
            steps = sorted({i for name, i in self.calls if name == tap})
            said = f"of {tap} there are steps {steps[0]} to {steps[-1]}" if steps else f"there is nothing of {tap}, only of {', '.join(dict.fromkeys(n for n, _ in self.calls)) or 'no tap'}"
            raise LabkitError(f"Step {layout.i} of {tap} was not captured: {said}; draw both runs with the same number of steps.")
        theirs = self.layouts[key]
        if missing := [branch for branch in layout.branches if branch not in theirs.branches]:
            raise LabkitError(f"The captured run has no branch {missing[0]!r}: draw both runs with the same guidance, or choose a branch.")
        if theirs.images not in (1, layout.images):
            raise LabkitError(f"{theirs.images} pictures were captured and {layout.images} are drawn: capture one, or as many.")
        image = [0] * layout.images if theirs.images == 1 else list(range(layout.images))
        kept = self.calls[key]
        return kept[call % len(kept)][[theirs.branches.index(branch) * theirs.images + i for branch in layout.branches for i in image]]


# --- what one does ------------------------------------------------------------------------------------------------


@contextmanager
def ablate(lab: LatentDiffusion, where: Where, by: str = "zero") -> Iterator[list[str]]:
    """Take a part out while the block runs: set it to 0, or (by="mean") to its mean over places (of keys and values: over tokens). Yields the taps.

    Probabilities that are set to 0 are not shared out again, so the tokens left have less than all attention. Raises LabkitError if the
    part is not there, or if the block ends without having met it.
    """
    edits = {"zero": lambda x, tap: torch.zeros_like(x), "mean": lambda x, tap: mean(x, where.kind)}
    if by not in edits:
        raise LabkitError(f"by is {by!r}: use 'zero' or 'mean'.")
    with intervene(lab, where, edits[by]) as sites:
        yield sites


@contextmanager
def scale(lab: LatentDiffusion, where: Where, factor: float) -> Iterator[list[str]]:
    """Multiply a part by a factor while the block runs; errors as in `ablate`."""
    with intervene(lab, where, lambda x, tap: x * factor) as sites:
        yield sites


@contextmanager
def replace(lab: LatentDiffusion, where: Where, value: Tensor | Edit) -> Iterator[list[str]]:
    """Put a tensor (of a shape that expands to the tap's), or what a function (x, tap) returns, in a part's place; errors as in `ablate`."""
    edit = value if callable(value) else lambda x, tap: value.to(x).expand_as(x)
    with intervene(lab, where, edit) as sites:
        yield sites


@contextmanager
def patch(lab: LatentDiffusion, where: Where, source: Captured) -> Iterator[list[str]]:
    """Put what flowed in another run in a part's place while the block runs; tokens are put in place by position. Errors as in `ablate`.

    Also if the other run has no such step, branch or tap, or pictures of another size.
    """
    seen: dict[tuple[str, int], int] = {}

    def edit(x: Tensor, tap: str) -> Tensor:
        layout = in_progress(lab)
        call = seen[tap, layout.i] = seen.get((tap, layout.i), -1) + 1  # Heun calls the network twice in one step
        found = source.rows(tap, layout, call)
        if found.shape != x.shape:
            raise LabkitError(f"{tap} carries {tuple(x.shape)} here and {tuple(found.shape)} in the captured run: draw both in one size.")
        return found.to(x)

    with intervene(lab, where, edit) as sites:
        yield sites


@contextmanager
def capture(lab: LatentDiffusion, where: Where) -> Iterator[Captured]:
    """Keep what flows through some taps (kind, layers and steps of `where`) while the block runs, to be put into another run by `patch`.

    Raises LabkitError if there is no such tap, and over 4 GB.
    """
    found = Captured()

    def listener(x: Tensor, tap: str) -> None:
        layout = in_progress(lab)
        if not holds(where.steps, layout.i):
            return
        found.bytes += x.nbytes
        if found.bytes > BUDGET:
            raise LabkitError(f"Capturing would take more than {BUDGET / 1e9:g} GB: choose fewer layers or steps.")
        found.calls.setdefault((tap, layout.i), []).append(x.detach().cpu().clone())
        found.layouts[tap, layout.i] = layout

    with listen(lab.unet, dict.fromkeys(sites(lab, where), listener)):
        yield found
    if not found.calls:
        raise LabkitError(f"Nothing was captured: no step {where.steps!r} was drawn inside the block.")


# --- how it is done -----------------------------------------------------------------------------------------------


@contextmanager
def intervene(lab: LatentDiffusion, where: Where, edit: Edit) -> Iterator[list[str]]:
    """Give what `edit` makes of a part in the part's place while the block runs: what all of the above are made of."""
    there, met = sites(lab, where), 0

    def listener(x: Tensor, tap: str) -> Tensor | None:
        nonlocal met
        mask = chosen(lab, where, x)
        if mask is None:
            return None
        met += 1
        return torch.where(mask, edit(x, tap), x)

    with listen(lab.unet, dict.fromkeys(there, listener)):
        yield there
    if not met:
        raise LabkitError(f"The intervention never took place: nothing was drawn in the block that has {said(where)}.")


def sites(lab: LatentDiffusion, where: Where) -> list[str]:
    """The names of the taps that a place means; LabkitError, listing what there is, if there are none or a head is not there."""
    there = list(taps(lab.unet, PATTERNS[where.kind]))
    patterns = (where.layers,) if isinstance(where.layers, str) else where.layers
    found = [tap for tap in there if any(fits(tap.rpartition(".")[0], pattern) for pattern in patterns)]
    if not found:
        names = ", ".join(short(tap.rpartition(".")[0]) for tap in there)
        raise LabkitError(f"No layer with {where.kind!r} fits {', '.join(map(repr, patterns))}; there are: {names}.")
    for tap in found if where.heads is not None else ():
        n = lab.unet.get_submodule(tap.rpartition(".")[0]).num_heads
        if not within(where.heads, n):
            raise LabkitError(f"{short(tap.rpartition('.')[0])} has heads 0 to {n - 1}, not {where.heads!r}: choose others, or layers that have them.")
    return found


def chosen(lab: LatentDiffusion, where: Where, x: Tensor) -> Tensor | None:
    """What of x (rows, ...) is meant, as a mask that expands to it; None if nothing of this call is."""
    shape, parts = [1] * x.ndim, []
    if any(part is not None for part in (where.steps, where.branch, where.images)) or isinstance(where.tokens, str):
        layout = in_progress(lab)
        if where.images is not None and not within(where.images, layout.images):
            raise LabkitError(f"There are images 0 to {layout.images - 1}, not {where.images!r}.")
        if not holds(where.steps, layout.i):
            return None
        rows = [where.branch in (branch, None) and holds(where.images, i) for branch in layout.branches for i in range(layout.images)]
        parts.append(torch.tensor(rows).view(-1, *shape[1:]))
    if where.heads is not None:
        parts.append(picked(where.heads, x.shape[1]).view(1, -1, *shape[2:]))
    if where.tokens is not None:
        axis = TOKENS[where.kind]
        if isinstance(where.tokens, str):
            tokens = spoken(lab, where, layout, x.shape[axis])  # (rows, L)
        else:
            if not within(where.tokens, x.shape[axis]):
                raise LabkitError(f"There are tokens 0 (BOS) to {x.shape[axis] - 1}, not {where.tokens!r}.")
            tokens = picked(where.tokens, x.shape[axis])[None]  # (1, L)
        parts.append(tokens.view(len(tokens), *(x.shape[axis] if a == axis else 1 for a in range(1, x.ndim))))
    mask = torch.ones(shape, dtype=torch.bool)
    for part in parts:
        mask = mask & part
    return mask.to(x.device) if bool(mask.any()) else None


def spoken(lab: LatentDiffusion, where: Where, layout: Layout, length: int) -> Tensor:
    """Which tokens are the word's in each row, (rows, length) bool. A text without the word has none; LabkitError if no text has it."""
    said_in = {"cond": layout.prompts, "uncond": layout.negative_prompts}
    mask, missing = torch.zeros(len(layout.branches) * layout.images, length, dtype=torch.bool), []
    texts = [text for branch in layout.branches for text in said_in[branch]]
    for row, text in enumerate(texts):
        try:
            mask[row, list(find(lab.texts[0][1], text, where.tokens))] = True
        except LabkitError as error:
            missing.append(error)
    if len(missing) == len(texts):
        raise missing[-1]  # of the branch "cond", which is the last one
    return mask


def in_progress(lab: LatentDiffusion) -> Layout:
    """What the rows of the network call in progress are; LabkitError outside of a generation."""
    if lab.layout is None:
        raise LabkitError("The U-Net was called outside of a generation, so steps, branches and pictures cannot be told: use lab.generate or lab.steps.")
    return lab.layout


def mean(x: Tensor, kind: str) -> Tensor:
    """The mean over places (of keys and values of the text: over tokens), in every place."""
    return x.mean((2, 3) if kind == "resid" else 2, keepdim=True).expand_as(x)


def holds(which: Which, i: int) -> bool:
    """Whether a number is among those meant."""
    if which is None or isinstance(which, int):
        return which in (None, i)
    return i in range(i + 1)[which] if isinstance(which, slice) and (which.stop is None or which.stop >= 0) else i in which


def picked(which: Which, n: int) -> Tensor:
    """Those of 0 ... n - 1 that are meant, (n,) bool."""
    return torch.tensor([holds(which, i) for i in range(n)])


def within(which: Which, n: int) -> bool:
    """Whether all that is meant is there, and something is."""
    numbers = range(n)[which] if isinstance(which, slice) else (which,) if isinstance(which, int) else tuple(which)
    return bool(numbers) and all(type(i) is int and 0 <= i < n for i in numbers)


def said(where: Where) -> str:
    """What a place asks of a run, in words."""
    asked = {name: getattr(where, name) for name in ("steps", "branch", "images", "tokens") if getattr(where, name) is not None}
    return ", ".join(f"{name} {value!r}" for name, value in asked.items()) or "a picture"
