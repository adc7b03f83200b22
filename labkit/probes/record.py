"""Recording what a network does while it draws: attention to each token, and the latents of each step.

    A = softmax(Q K^T / sqrt(d_head)),   A[head, y, x, token] >= 0,   sum over tokens = 1       at every layer and step
    recorded:  sum over steps of A,  one array for each layer and branch                        and how many were summed

Every place of the picture divides its attention among the tokens of the text; the shares, collected over the steps, say
which words a place has listened to (Tang et al. 2023, "What the DAAM: Interpreting Stable Diffusion Using Cross
Attention"). Sums are kept for each head of each layer and the steps are not, so 50 steps take the memory of one.

    with record(lab, latents=True) as trace:
        lab.generate("a red sphere left of a blue cube")
    trace.heatmap("sphere").map                                 (h, w), the share of attention that "sphere" has there
    trace.attention("mid_block*")                               (head, y, x, token)

Which rows of a network call belong to which branch and picture is read from `lab.layout`; nothing is guessed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from einops import rearrange
from torch import Tensor

from labkit.diffusion import Layout, LatentDiffusion
from labkit.errors import LabkitError
from labkit.models.tokenizer import Tokenizer, normalise
from labkit.probes.heatmap import HeatMap, average, described
from labkit.probes.words import find, words
from labkit.samplers import Step
from labkit.tap import listen

CROSS = "*.attn2.probs"


@dataclass(eq=False)
class Sum:
    """Attention of one layer in one branch, added up: `total` (image, head, y, x, token) float32, over `calls` network calls in `steps` steps."""

    total: Tensor
    last: int  # the step of the latest call
    steps: int = 1
    calls: int = 1  # more than steps where a sampler (Heun) calls the network twice in one

    def add(self, probs: Tensor, i: int) -> None:
        self.total += probs
        self.calls += 1
        self.steps += i != self.last
        self.last = i


@dataclass(eq=False)
class Run:
    """What was recorded of one generation; `prompts` by branch, one for each picture."""

    tokenizer: Tokenizer
    sums: dict[tuple[str, str], Sum] = field(default_factory=dict)  # (layer, branch) -> Sum
    prompts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)  # (h, w) of the latents
    images: int = 0
    steps: list[Step] = field(default_factory=list)  # with latents=True: x, eps and x0 of each step, on the CPU

    def layers(self, pattern: str = "*") -> tuple[str, ...]:
        """Names of the recorded layers that match a shell pattern ("up_blocks.*"), in the order in which they run."""
        there = tuple(dict.fromkeys(layer for layer, _ in self.sums))
        found = tuple(layer for layer in there if fnmatchcase(layer, pattern))
        if not found:
            raise LabkitError(f"No recorded layer matches {pattern!r}; there are: {', '.join(there) or 'none'}.")
        return found

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that the network computed: "cond" and "uncond", or "cond" alone where guidance was off."""
        return tuple(dict.fromkeys(branch for _, branch in self.sums))

    def attention(self, layer: str, head: int | None = None, image: int = 0, branch: str = "cond") -> Tensor:
        """Mean over the steps of one layer's attention, (head, y, x, token), or (y, x, token) of one head; float32, CPU.

        `layer` is a name or a pattern that fits one layer only. Shares of all tokens, BOS, EOS and padding included, sum
        to 1. Raises LabkitError, listing what there is, if that layer, head, image or branch was not recorded.
        """
        self._check(image, branch)
        found = self.layers(layer)
        if len(found) > 1:
            raise LabkitError(f"{layer!r} fits {len(found)} layers; name one of: {', '.join(found)}.")
        return self._mean(found[0], head, image, branch, slice(None))

    def heatmap(
        self, word: str, image: int = 0, branch: str = "cond", layers: str = "*", head: int | None = None,
        occurrence: int | None = None,
    ) -> HeatMap:  # fmt: skip
        """Where a word of the prompt had the attention: the mean over steps, heads and layers, (h, w) at the latents' size.

        The shares of all tokens of the word, and of all places where it stands in the prompt (or of one `occurrence`,
        0 is the first), are added. Each layer's map is upsampled bilinearly after the averaging over steps and heads.
        `layers` is a shell pattern; `branch` "uncond" speaks of the negative prompt's words. Raises LabkitError that
        lists the words, layers or branches there are.
        """
        self._check(image, branch)
        tokens = find(self.tokenizer, self.prompts[branch][image], word, occurrence)
        chosen = self.layers(layers)
        maps = [self._mean(layer, head, image, branch, list(tokens)).sum(-1) for layer in chosen]  # (head, y, x) or (y, x)
        heads = f"head {head}" if head is not None else "all heads"
        about = described(self.sums[chosen[0], branch].steps, len(chosen), heads, self.tokenizer.max_length)
        return HeatMap(word, average(maps, self.size), about, tokens, branch, image)

    def heatmaps(self, image: int = 0, branch: str = "cond", layers: str = "*") -> list[HeatMap]:
        """One heat map for each word of the prompt, in reading order; a word that stands there twice has one map."""
        self._check(image, branch)
        there: dict[str, str] = {}
        for span in words(self.tokenizer, self.prompts[branch][image]):
            there.setdefault(normalise(span.text)[0], span.text)
        return [self.heatmap(word, image, branch, layers) for word in there.values()]

    def _mean(self, layer: str, head: int | None, image: int, branch: str, tokens: list[int] | slice) -> Tensor:
        recorded = self.sums[layer, branch]
        heads = recorded.total.shape[1]
        if head is not None and (type(head) is not int or not 0 <= head < heads):
            raise LabkitError(f"{layer} has heads 0 to {heads - 1}, there is no head {head!r}.")
        total = recorded.total[image] if head is None else recorded.total[image, head]
        return total[..., tokens].cpu() / recorded.calls

    def _check(self, image: int, branch: str) -> None:
        if not self.sums:
            raise LabkitError("No attention was recorded in this run: record(lab, attention='cross') and draw inside the block.")
        if branch not in self.branches:
            raise LabkitError(f"The branch {branch!r} was not computed; there is: {', '.join(self.branches)}.")
        if type(image) is not int or not 0 <= image < self.images:
            raise LabkitError(f"There are images 0 to {self.images - 1}, there is no image {image!r}.")


class Trace:
    """What was recorded in a `with record(...)` block: `runs`, one for each generation, in the order they were started.

    What is asked of the trace itself is asked of the latest run: `trace.heatmap(...)` is `trace.runs[-1].heatmap(...)`.
    """

    def __init__(self, lab: LatentDiffusion | None = None) -> None:
        self.runs: list[Run] = []
        self.lab = lab  # what decodes recorded latents

    @property
    def run(self) -> Run:
        """The latest run; LabkitError if nothing was drawn."""
        if not self.runs:
            raise LabkitError("Nothing was recorded: call lab.generate(...) or lab.steps(...) inside the with block.")
        return self.runs[-1]

    @property
    def steps(self) -> list[Step]:
        """The steps of the latest run, where latents were recorded."""
        return self.run.steps

    @property
    def branches(self) -> tuple[str, ...]:
        """As `Run.branches`."""
        return self.run.branches

    def layers(self, pattern: str = "*") -> tuple[str, ...]:
        """As `Run.layers`."""
        return self.run.layers(pattern)

    def attention(self, layer: str, head: int | None = None, image: int = 0, branch: str = "cond") -> Tensor:
        """As `Run.attention`: (head, y, x, token), or (y, x, token) of one head."""
        return self.run.attention(layer, head, image, branch)

    def heatmap(self, word: str, image: int = 0, branch: str = "cond", layers: str = "*", **which) -> HeatMap:
        """As `Run.heatmap`; `which` may be head=, occurrence=."""
        return self.run.heatmap(word, image, branch, layers, **which)

    def heatmaps(self, image: int = 0, branch: str = "cond", layers: str = "*") -> list[HeatMap]:
        """As `Run.heatmaps`: one for each word of the prompt."""
        return self.run.heatmaps(image, branch, layers)


@contextmanager
def record(lab: LatentDiffusion, attention: str | None = "cross", latents: bool = False) -> Iterator[Trace]:
    """Record every generation of the block, drawn by `lab.generate` or `lab.steps`; pictures stay what they would be.

    `attention="cross"` sums cross-attention over the steps, for each layer and head; None records none.
    `latents=True` also keeps each Step. Afterwards, also after an exception, the model is as before. Raises LabkitError
    if there is nothing to record, and where the U-Net is called directly, so that nobody knows whose rows it works on.
    """
    if attention not in ("cross", None):
        raise LabkitError(f"attention is {attention!r}: use 'cross' or None.")
    if attention is None and not latents:
        raise LabkitError("There is nothing to record: ask for attention='cross', latents=True, or both.")
    trace = Trace(lab)
    current: list[Run] = []  # the run whose step is being computed; generators may be interleaved

    def listener(probs: Tensor, name: str) -> None:
        if not current or lab.layout is None:
            raise LabkitError("The U-Net was called outside of a generation that began in this block, so its rows cannot be told apart.")
        add_attention(current[-1], lab.layout, name.removesuffix(".probs"), probs)

    def watched(*args, **kwargs) -> Iterator[Step]:
        iterator = steps(*args, **kwargs)  # bad input is told at once, and starts no run
        trace.runs.append(run := Run(lab.tokenizer))
        return watch(iterator, run, current, latents)

    steps, before = lab.steps, vars(lab).get("steps")
    with ExitStack() as stack:
        if attention:
            stack.enter_context(listen(lab.unet, {CROSS: listener}))
        lab.steps = watched
        try:
            yield trace
        finally:
            if before is None:
                del lab.steps
            else:  # a recording inside a recording
                lab.steps = before
            for recorded in (recorded for run in trace.runs for recorded in run.sums.values()):
                recorded.total = recorded.total.cpu()


def watch(iterator: Iterator[Step], run: Run, current: list[Run], latents: bool) -> Iterator[Step]:
    """The same steps, with `run` as the current one while each of them is computed."""
    while True:
        current.append(run)
        try:
            step = next(iterator, None)
        finally:
            current.pop()
        if step is None:
            return
        if latents:
            run.steps.append(replace(step, x=kept(step.x), eps=kept(step.eps), x0=kept(step.x0)))
        yield step


def kept(x: Tensor) -> Tensor:
    return x.detach().float().cpu()


def add_attention(run: Run, layout: Layout, layer: str, probs: Tensor) -> None:
    """Add one network call's probabilities, (rows, heads, N, tokens), to the sums of their branches."""
    h, w = layout.size
    y = next((h // f for f in range(1, h + 1) if h % f == w % f == 0 and (h // f) * (w // f) == probs.shape[2]), None)
    if y is None or len(probs) != len(layout.branches) * layout.images:
        raise LabkitError(f"Attention of shape {tuple(probs.shape)} at {layer} does not fit {layout}.")
    run.size, run.images = layout.size, layout.images
    rows = rearrange(probs.detach().float(), "(b i) head (y x) token -> b i head y x token", b=len(layout.branches), y=y)
    for branch, part in zip(layout.branches, rows):  # part: (image, head, y, x, token)
        run.prompts[branch] = layout.prompts if branch == "cond" else layout.negative_prompts
        if (layer, branch) in run.sums:
            run.sums[layer, branch].add(part, layout.i)
        else:
            run.sums[layer, branch] = Sum(part.clone(), layout.i)
