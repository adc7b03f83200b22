"""What the explorer shows of a run: each word's share of attention by step, layer and head, small enough to send.

    share[word, y, x] = sum over the word's tokens of A[head, y, x, token],      A averaged over what the slider calls "all"

Every place's shares add up to 1: beside the words there are the start token and, as one more word, the end, the padding and the
punctuation. `shares` is the only function here that asks the trace for anything.
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
    """The maps of one picture of a run: of every step of `steps`, layer and head, and of all combinations for which there is room."""
    named, spans = spoken(run, image, branch)
    layers = run.layers(pattern)
    whole = [shares(run, layer, spans, image, branch) for layer in layers]  # (head, word, y, x) each
    steps = steps if run.plan.keep.steps else ()
    side, families, left_out = room(whole, len(steps))
    maps: dict[tuple[int, int, int], Tensor] = {}
    for s in range(len(steps) + 1):
        if s and not any("step" in family for family in families):
            break
        of_layer = whole if s == 0 else [shares(run, layer, spans, image, branch, steps[s - 1]) for layer in layers]
        add(maps, s, [pooled(m, side) for m in of_layer], families)
    return Grid(named, maps, steps, layers, max(len(m) for m in whole), left_out)


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


def shares(run: Run, layer: str, spans: list[list[int]], image: int, branch: str, step: int | None = None) -> Tensor:
    """One layer's attention by word, (head, word, y, x): the mean over all steps, or that of one step; one head where they were averaged."""
    maps = [run.attention(tokens, layer=layer, step=step, image=image, branch=branch) for tokens in spans]  # (head, y, x) or (y, x)
    return torch.stack([m.values if "head" in m.axes else m.values[None] for m in maps], dim=1)  # (head, word, y, x)


def pooled(m: Tensor, side: int) -> Tensor:
    """Maps (head, word, y, x) with no side longer than `side`: means over equal areas."""
    by = -(-max(m.shape[-2:]) // side)
    return m if by == 1 else F.adaptive_avg_pool2d(m, [max(1, n // by) for n in m.shape[-2:]])


def room(whole: list[Tensor], steps: int) -> tuple[int, list[set[str]], tuple[str, ...]]:
    """The side of the maps, the families of combinations that fit at it, and those that do not."""
    wanted = [set(), {"layer"}, {"step"}, {"head"}, {"layer", "head"}, {"step", "layer"}, {"step", "head"}, {"step", "layer", "head"}]
    wanted = [family for family in wanted if steps or "step" not in family]
    for side in SIDES:
        left, families = MAP_BYTES, []
        sizes = [pooled(m[:1], side).shape[1:] for m in whole]
        for family in wanted:
            if (bytes_ := cost(family, sizes, [len(m) for m in whole], steps)) <= left:
                left -= bytes_
                families.append(family)
        if all(family in families for family in wanted[:3]):  # all maps, of layers, of steps
            break
    if set() not in families:
        raise LabkitError("The prompt has too many words for one view: choose some layers, such as layers='mid_block*'.")
    return side, families, tuple(" by ".join(sorted(family)) for family in wanted if family not in families)


def cost(family: set[str], sizes: list[torch.Size], heads: list[int], steps: int) -> int:
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
