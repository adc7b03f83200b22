"""What the explorer shows of a run: each word's share of attention by step, layer and head, small enough to send.

    share[word, y, x] = sum over the word's tokens of A[head, y, x, token],      A averaged over what the slider calls "all"

Every place's shares add up to 1: beside the words there are the start token and, as one more word, the end, the padding and the
punctuation. `shares` is the only function here that asks a trace for attention.
"""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabkitError
from labkit.models.tokenizer import normalise
from labkit.probes.heatmap import resize
from labkit.probes.trace import Run
from labkit.probes.words import words
from labkit.widgets.view import Word

MAP_BYTES = 1_000_000
SIDES = (32, 16, 8)  # that large maps are averaged down to, until those of all layers fit


@dataclass(frozen=True, eq=False)
class Grid:
    """`maps[step, layer, head]` (word, y, x); position 0 on an axis is "all", the mean over it; `steps`, `layers` and `heads` are the others."""

    words: tuple[Word, ...]
    maps: dict[tuple[int, int, int], Tensor]
    steps: tuple[int, ...]
    layers: tuple[str, ...]
    heads: int
    left_out: tuple[str, ...]  # combinations for which there was no room


def grid(run: Run, image: int = 0, branch: str = "cond", pattern: str = "*", steps: tuple[int, ...] = ()) -> Grid:
    """The maps of one picture of a run: of `steps` (those that were kept apart), layers and heads, and of all combinations for which there is room."""
    named, spans = spoken(run, image, branch)
    layers = run.layers(pattern)
    sizes = [(*run.attention(0, layer, image=image, branch=branch).shape.values(),) for layer in layers]
    sizes = [(size[0] if len(size) == 3 else 1, len(spans), *size[-2:]) for size in sizes]  # (head, word, y, x) each
    side, families, left_out = room(sizes, len(steps))
    whole = [pooled(shares(run, layer, spans, image, branch), side) for layer in layers]
    maps: dict[tuple[int, int, int], Tensor] = {}
    add(maps, 0, whole, families)
    if steps and {"step"} in families:
        apart = [[pooled(m, side) for m in shares(run, layer, spans, image, branch, steps)] for layer in layers]
        for s, of_layer in enumerate(zip(*apart), 1):
            add(maps, s, list(of_layer), families)
    return Grid(named, maps, steps if any(key[0] for key in maps) else (), layers, max(size[0] for size in sizes), left_out)


def kept_apart(run: Run, layer: str, image: int, branch: str) -> tuple[int, ...]:
    """The steps that this run can tell apart: none where they were added up."""
    if run.plan is None or not run.plan.keep.steps:
        return ()
    return run.attention(0, layer, step=slice(None), image=image, branch=branch).labels["step"]


def spoken(run: Run, image: int, branch: str) -> tuple[tuple[Word, ...], list[list[int]]]:
    """The words of the prompt, each where it stands, then start and the rest; and the token positions of each."""
    prompt, n = run.prompts[branch][image], run.tokenizer.max_length
    said, named, spans = {}, [], []
    for span in words(run.tokenizer, prompt):
        plain = normalise(span.text)[0]
        said[plain] = said.get(plain, 0) + 1
        named.append(Word(plain if said[plain] == 1 else f"{plain} {said[plain]}", span.text))
        spans.append(list(span.tokens))
    taken = {token for tokens in spans for token in tokens}
    named += [Word("<start>", "start", True), Word("<rest>", "end, padding", True)]
    spans += [[0], [token for token in range(1, n) if token not in taken]]
    return tuple(named), spans


def shares(run: Run, layer: str, spans: list[list[int]], image: int, branch: str, steps: tuple[int, ...] | None = None) -> Tensor:
    """One layer's attention by word, (head, word, y, x), the mean over all steps; or (step, head, word, y, x) of some of them."""
    found = [run.attention(tokens, layer, step=None if steps is None else slice(None), image=image, branch=branch) for tokens in spans]
    values = [one.values if "head" in one.axes else one.values.unsqueeze(-3) for one in found]  # ([step], head, y, x)
    if steps is not None:
        values = [one[[found[0].labels["step"].index(step) for step in steps]] for one in values]
    return torch.stack(values, dim=-3)


def fit(y: int, x: int, side: int) -> tuple[int, int]:
    """Places (height, width) of a map when no side is to be longer than `side`."""
    by = -(-max(y, x) // side)
    return max(1, y // by), max(1, x // by)


def pooled(m: Tensor, side: int) -> Tensor:
    """Maps (..., word, y, x) with no side longer than `side`: means over equal areas."""
    size = fit(*m.shape[-2:], side)
    return m if size == m.shape[-2:] else F.adaptive_avg_pool2d(m, size) if m.ndim < 5 else torch.stack([pooled(one, side) for one in m])


def room(whole: list[tuple[int, ...]], steps: int) -> tuple[int, list[set[str]], tuple[str, ...]]:
    """For layers of maps (head, word, y, x): the side of the maps, the families of combinations that fit at it, and those that do not."""
    wanted = [set(), {"layer"}, {"step"}, {"head"}, {"layer", "head"}, {"step", "layer"}, {"step", "head"}, {"step", "layer", "head"}]
    wanted = [family for family in wanted if steps or "step" not in family]
    for side in SIDES:
        left, families = MAP_BYTES, []
        sizes = [(words, *fit(y, x, side)) for _, words, y, x in whole]
        for family in wanted:
            if (bytes_ := cost(family, sizes, [heads for heads, *_ in whole], steps)) <= left:
                left -= bytes_
                families.append(family)
        if all(family in families for family in wanted[:3]):  # all maps, of layers, of steps
            break
    if set() not in families:
        raise LabkitError("The prompt has too many words for one view: choose some layers, such as layers='mid_block*'.")
    return side, families, tuple(" by ".join(sorted(family)) for family in wanted if family not in families)


def cost(family: set[str], sizes: list[tuple[int, ...]], heads: list[int], steps: int) -> int:
    """Bytes of a family's maps."""
    each = [words * (8 + h * w) for words, h, w in sizes]
    by_layer = sum(n * (k if "head" in family else 1) for n, k in zip(each, heads)) if "layer" in family else max(each) * (max(heads) if "head" in family else 1)
    return by_layer * (steps if "step" in family else 1)


def add(maps: dict, s: int, of_layer: list[Tensor], families: list[set[str]]) -> None:
    """Add the maps of one step (0: of all): of single layers, of the mean over layers, of single heads, of the mean over heads."""
    size = max((m.shape[-2:] for m in of_layer), key=lambda hw: hw[0] * hw[1])
    for layer, head in product(range(len(of_layer) + 1), range(max(map(len, of_layer)) + 1)):
        family = {name for name, position in (("step", s), ("layer", layer), ("head", head)) if position}
        if family not in families:
            continue
        chosen = of_layer if layer == 0 else [of_layer[layer - 1]]
        parts = [m.mean(0) if head == 0 else m[head - 1] for m in chosen if head <= len(m)]  # (word, y, x) each
        if parts:
            maps[s, layer, head] = parts[0] if layer else torch.stack([enlarged(part, size) for part in parts]).mean(0)


def enlarged(m: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (word, y, x) at the size of the largest layer's, bilinear, as heat maps are."""
    return torch.stack([resize(one, size) for one in m])
