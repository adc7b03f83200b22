"""Recording what a network does while it draws: attention, residual stream, text states, and the latents of each step.

    A = softmax(Q K^T / sqrt(d_head)),   A[head, y, x, token] >= 0,   sum over tokens = 1       at every layer and step
    recorded:  sum over steps of A,  one array for each layer and branch                        and how many were summed

Every place of the picture divides its attention among the tokens of the text; the shares, collected over the steps, say
which words a place has listened to (Tang et al. 2023, "What the DAAM: Interpreting Stable Diffusion Using Cross
Attention"). Unless steps are asked for (`keep`), sums are kept for each head of each layer, so 50 steps take the memory of one.

    with record(lab, latents=True) as trace:
        lab.generate("a red sphere left of a blue cube")
    trace.heatmap("sphere").map                                 (h, w), the share of attention that "sphere" has there
    trace.attention(layer="mid")                                axes head, y, x, token

Which rows of a network call belong to which branch and picture is read from `lab.layout`; nothing is guessed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import prod

from einops import rearrange
from torch import Tensor, no_grad

from labkit.diffusion import Layout, LatentDiffusion
from labkit.errors import LabkitError
from labkit.generation import to_pil
from labkit.probes.keep import WAYS, Keep, plan, size
from labkit.probes.sites import Site, sites
from labkit.probes.trace import Run, Trace
from labkit.recipe import Recipe, complete
from labkit.samplers import Step
from labkit.tap import listen

ATTENTION = ("cross", "self")
STATES = ("resid", "mid", "text", "queries")


@contextmanager
def record(
    lab: LatentDiffusion, attention: str | tuple[str, ...] | None = "cross", latents: bool = False, states: str | tuple[str, ...] = (),
    keep: str | Keep = "sums",
) -> Iterator[Trace]:  # fmt: skip
    """Record every generation of the block, drawn by `lab.generate` or `lab.steps`; pictures stay what they would be.

    `attention`: "cross", "self", both as a tuple, or None. `latents=True` keeps each Step. `states`: "resid" (the residual stream after
    each block), "mid" (after the middle block), "text" (token states of each layer of the text encoder), "queries" (of cross-attention,
    each step: what `open_vocabulary` needs), or several. `keep`: "sums" (over the steps: memory does not grow with them), "steps" (each
    step, heads averaged), "raw" (everything), or a `Keep`; where memory grows with the steps the bytes are printed first; over the budget
    nothing is drawn. Afterwards, also after an exception, the model is as before. Raises LabkitError if there is nothing to record, and where
    the U-Net is called directly, so that nobody knows whose rows it works on.
    """
    kinds = asked(attention, ATTENTION, "attention") + asked(states, STATES, "states")
    if not kinds and not latents:
        raise LabkitError("There is nothing to record: ask for attention='cross', latents=True, states='resid', or several of them.")
    keep = way(keep)
    heard = keep.chosen(recorded(lab, kinds, (64, 64)))  # which taps there are does not depend on the size
    trace = Trace(lab)
    current: list[Run] = []  # the run whose step is being computed; generators may be interleaved

    def listener(x: Tensor, name: str) -> None:
        if not current or lab.layout is None:
            raise LabkitError("The U-Net was called outside of a generation that began in this block, so its rows cannot be told apart.")
        add(current[-1], lab.layout, name, x)

    def watched(*args, **kwargs) -> Iterator[Step]:
        iterator = steps(*args, **kwargs)  # bad input is told at once, and starts no run
        recipe = complete(lab, *args, **{name: value for name, value in kwargs.items() if name != "course"})
        run = begun(lab, recipe, kinds, keep)
        trace.runs.append(run)
        return watch(iterator, run, current, latents)

    steps, before = lab.steps, vars(lab).get("steps")
    with ExitStack() as stack:
        if heard:
            stack.enter_context(listen(lab.unet, {site.tap: listener for site in heard}))
        lab.steps = watched
        try:
            yield trace
        finally:
            if before is None:
                del lab.steps
            else:  # a recording inside a recording
                lab.steps = before
            for store in (store for run in trace.runs for store in run.stores.values()):
                store.values = store.values.cpu()


def begun(lab: LatentDiffusion, recipe: Recipe, kinds: tuple[str, ...], keep: Keep) -> Run:
    """A Run for a recipe, in which nothing is yet; says how much memory it takes if that grows with the steps, LabkitError if too much."""
    f, images = lab.vae.config.factor, len(recipe.seed)
    run = Run(lab.tokenizer, recipe.plain(), size=(recipe.height // f, recipe.width // f), images=images, model={"name": lab.name})
    run.prompts = {"uncond": tuple(recipe.negative_prompt), "cond": tuple(recipe.prompt)}
    run.decode = lambda x: to_pil(lab.decode(x))[0]
    if there := recorded(lab, kinds, run.size):
        columns = max(len(lab.tokenizer.encode(text)) for text in (*recipe.prompt, *recipe.negative_prompt))
        run.plan = plan(there, keep, (recipe.steps, images), computed(recipe), columns)
        if run.plan.grows:
            print(f"Recording takes {size(run.plan.bytes)}: {len(run.plan.sites)} sites, {recipe.steps} steps, {images} x {len(run.plan.branches)} branches.")
    if "text" in kinds:
        for name, (encoder, tokenizer) in zip(("text_encoder", "text_encoder_2"), lab.texts):
            for branch, prompts in run.prompts.items():
                with no_grad():
                    hidden = encoder.hidden(tokenizer(list(prompts)).to(lab.device))  # (image, token, channel) each
                run.texts |= {(f"{name}.{i}", branch): kept(h) for i, h in enumerate(hidden)}
    return run


def recorded(lab: LatentDiffusion, kinds: tuple[str, ...], latents: tuple[int, int]) -> list[Site]:
    """The sites of some kinds, in a model that draws latents of this size; LabkitError if there are none of a kind."""
    found = [site for kind in kinds if kind != "text" for site in sites(lab.unet, kind, latents, lab.tokenizer.max_length)]
    return list({site.tap: site for site in found}.values())


def computed(recipe: Recipe) -> tuple[str, ...]:
    """The branches that guidance computes in some step of a run."""
    w = recipe.guidance if isinstance(recipe.guidance, list) else [recipe.guidance]
    if all(one == 1 for one in w):
        return ("cond",)
    return ("uncond",) if all(one == 0 for one in w) and recipe.interval is None else ("uncond", "cond")


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
        run.final = step.x
        if latents:
            run.steps.append(replace(step, x=kept(step.x), eps=kept(step.eps), x0=kept(step.x0)))
        yield step


def kept(x: Tensor) -> Tensor:
    return x.detach().float().cpu()


def add(run: Run, layout: Layout, tap: str, x: Tensor) -> None:
    """Add what flowed through a tap in one network call, (rows, ...), to the stores of the branches."""
    site = run.plan.sites[tap]
    rows, places = len(layout.branches) * layout.images, site.shape
    if len(x) != rows or x[0].numel() != prod(places):
        raise LabkitError(f"What flows through {tap} has shape {tuple(x.shape)}, which does not fit {rows} rows of {places}.")
    for branch, part in zip(layout.branches, rearrange(x, "(b i) ... -> b i ...", b=len(layout.branches))):  # part: (image, ...)
        if branch not in run.plan.branches:
            continue
        key = site.kind, site.layer, branch
        if key not in run.stores:
            run.stores[key] = run.plan.store(tap, x.device)
        run.stores[key].add(run.plan.reduced(site, part), layout.i)


def asked(what: str | tuple[str, ...] | None, there: tuple[str, ...], argument: str) -> tuple[str, ...]:
    """One name, several or none, as a tuple; LabkitError if one is unknown."""
    names = (what,) if isinstance(what, str) else tuple(what or ())
    if unknown := [name for name in names if name not in there]:
        raise LabkitError(f"{argument} is {unknown[0]!r}: use {', '.join(map(repr, there))}, several as a tuple, or none of them.")
    return tuple(dict.fromkeys(names))


def way(keep: str | Keep) -> Keep:
    if isinstance(keep, Keep):
        return keep
    if keep not in WAYS:
        raise LabkitError(f"keep is {keep!r}: use {', '.join(map(repr, WAYS))}, or a labkit.Keep.")
    return WAYS[keep]
