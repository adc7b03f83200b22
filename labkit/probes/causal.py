"""Which part does what: every head taken out in turn, and every place of a clean run patched into a corrupt one.

    cost      ||x' - x|| / ||x||                                              x' the latents drawn without the head
    recovery  (m(patched) - m(corrupt)) / (m(clean) - m(corrupt))             0: as the corrupt run, 1: as the clean one
    m(x)      <x - x_corrupt, x_clean - x_corrupt> / ||x_clean - x_corrupt||^2          unless you give a measure of your own

Wang et al. 2022, "Interpretability in the Wild", and Meng et al. 2022 do this to language models, where m is a difference of logits; a
picture has none, so the yardstick is how far its latents have gone from the corrupt run's to the clean one's. Recovery is below 0
where a patch leads away from the clean run, and above 1 where it overshoots.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.generation import Generation
from labkit.probes.intervene import Where, ablate, capture, patch, sites
from labkit.probes.sites import short
from labkit.probes.table import Table

Metric = Callable[[Generation], Sequence[float]]  # one number for each picture


def recovery(value: Tensor, clean: Tensor, corrupt: Tensor) -> Tensor:
    """(value - corrupt) / (clean - corrupt), for each picture; LabkitError if the two runs measure the same, so that there is nothing to recover."""
    gap = clean - corrupt
    if bool((gap.abs() < 1e-12).any()):
        raise LabkitError("The clean and the corrupt run measure the same: choose prompts, seeds or a metric in which they differ.")
    return (value - corrupt) / gap


def ablate_heads(
    lab: LatentDiffusion, prompt: str, seeds: Sequence[int] = (0, 1, 2, 3), by: str = "zero", where: Where = Where(), metric: Metric | None = None, **options
) -> Table:
    """What each head of each layer is worth: the mean over seeds of what changes when it is taken out, rows layers, columns heads.

    `where` may restrict layers, steps, branch, or say kind="self heads". With a `metric` the numbers are what it loses, metric(whole) - metric(ablated);
    without one they are the relative change of the final latents. `options` go to `lab.generate`. Draws once for each head and once more.
    """
    if where.heads is not None or where.kind not in ("heads", "self heads"):
        raise LabkitError("ablate_heads takes every head in turn: leave heads= out of where, with kind 'heads' or 'self heads'.")
    draw = drawing(lab, prompt, seeds, options)
    whole, layers = draw(), [tap.rpartition(".")[0] for tap in sites(lab, where)]
    heads = {layer: lab.unet.get_submodule(layer).num_heads for layer in layers}
    values = torch.full((len(layers), max(heads.values())), float("nan"))
    todo = [(row, head) for row, layer in enumerate(layers) for head in range(heads[layer])]
    for row, head in tqdm(todo, desc="heads", disable=not options.get("progress", True)):
        with ablate(lab, replace(where, layers=layers[row], heads=head), by):
            ablated = draw()
        values[row, head] = lost(whole, ablated, metric).mean()
    unit = "relative change of the latents" if metric is None else "what the metric loses"
    names = tuple(short(layer) for layer in layers)
    return Table(values, names, tuple(map(str, range(values.shape[1]))), ("layer", "head"), unit, f"“{prompt}” without one head")


def patch_grid(
    lab: LatentDiffusion, clean: str, corrupt: str, where: Where = Where("values"), bins: int = 4, seeds: Sequence[int] = (0, 1), metric: Metric | None = None,
    **options,
) -> Table:  # fmt: skip
    """How much of a clean run comes back when a part of it is put into a corrupt one: the mean recovery, rows layers and all of them, columns ranges of steps.

    `where` says what is patched (text keys or values, attention, the residual stream; also which layers, heads, tokens, branch); `bins` is into how many
    ranges the steps are cut, with one column more for all of them. `metric` gives a number for each picture, such as a classifier's
    probability; without one, how far the latents have gone from corrupt to clean. `options` go to `lab.generate`.
    """
    steps = options.get("steps") or lab.defaults["steps"]
    if where.steps is not None or type(bins) is not int or not 1 <= bins <= steps:
        raise LabkitError(f"bins is {bins!r}: give 1 to {steps} ranges of the {steps} steps, and leave steps= out of where.")
    taps = sites(lab, where)
    with capture(lab, where) as source:
        good = drawing(lab, clean, seeds, options)()
    draw = drawing(lab, corrupt, seeds, options)
    bad = draw()
    edges = [round(k * steps / bins) for k in range(bins + 1)]
    spans = [*zip(edges, edges[1:]), *([(0, steps)] if bins > 1 else [])]
    layers = [tap.rpartition(".")[0] for tap in taps]
    rows = [*layers, *([tuple(layers)] if len(layers) > 1 else [])]
    values, score = torch.zeros(len(rows), len(spans)), measure(good, bad, metric)
    todo = [(row, column) for row in range(len(rows)) for column in range(len(spans))]
    for row, column in tqdm(todo, desc="patches", disable=not options.get("progress", True)):
        with patch(lab, replace(where, layers=rows[row], steps=slice(*spans[column])), source):
            values[row, column] = score(draw()).mean()
    columns = tuple(f"{a} to {b - 1}" if b - a > 1 else str(a) for a, b in spans[:bins]) + (("all",) if bins > 1 else ())
    names = (*map(short, layers), *(["all layers"] if len(layers) > 1 else []))
    title = f"{where.kind} of “{clean}” patched into “{corrupt}”"
    return Table(values, names, columns, ("layer", "steps (0 is the noisiest)"), "recovery, 0 corrupt to 1 clean", title)


def measure(clean: Generation, corrupt: Generation, metric: Metric | None) -> Callable[[Generation], Tensor]:
    """The recovery of a generation's pictures between two others, as a function of it, (B,)."""
    if metric is not None:
        read = lambda g: torch.as_tensor([float(v) for v in metric(g)])  # noqa: E731
        good, bad = read(clean), read(corrupt)
        return lambda g: recovery(read(g), good, bad)
    start, way = corrupt.latents.flatten(1).double(), (clean.latents - corrupt.latents).flatten(1).double()
    length = way.square().sum(1)
    return lambda g: recovery(((g.latents.flatten(1).double() - start) * way).sum(1), length, torch.zeros_like(length))


def lost(whole: Generation, ablated: Generation, metric: Metric | None) -> Tensor:
    """What each picture has lost, (B,)."""
    if metric is not None:
        return torch.tensor([float(a) - float(b) for a, b in zip(metric(whole), metric(ablated), strict=True)])
    x, y = whole.latents.flatten(1), ablated.latents.flatten(1)
    return (y - x).norm(dim=1) / x.norm(dim=1)


def drawing(lab: LatentDiffusion, prompt: str, seeds: Sequence[int], options: dict) -> Callable[[], Generation]:
    """A function that draws the same pictures each time it is called."""
    if not (seeds := list(seeds)):
        raise LabkitError("There are no seeds: give one at least.")
    return lambda: lab.generate(prompt, seed=seeds, **{**options, "progress": False})
