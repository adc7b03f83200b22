"""The heat maps of two papers, number by number, made of the same recording as ours.

    Prompt-to-Prompt    m = mean over heads and the 16x16 layers (up, down) of  mean over steps of  A[head, y, x, token];   m / max(m)
    DAAM                m = mean over heads and all layers (up, down) of  max(0, bicubic( sum over steps of  A[head, y, x, token] ))

Hertz et al. 2022, "Prompt-to-Prompt Image Editing with Cross Attention Control" (`aggregate_attention`, `show_cross_attention`); Tang et
al. 2023, "What the DAAM" (`compute_global_heat_map`, `expand_as`). They differ from `trace.heatmap` and from each other in four choices:

                        layers              upsampling                pieces of a word    scale
    trace.heatmap       all                 bilinear, of head means   added               a share: all tokens sum to 1 at each place
    prompt_to_prompt    16x16, no middle    none                      added               divided by its own maximum
    daam                all but the middle  bicubic, each head        averaged            a sum over steps, or with `normalise` a share of the words

Prompt-to-Prompt shows one map for each piece of a word; added pieces are ours, and equal to it where the word is one token.
"""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabkitError
from labkit.probes.heatmap import HeatMap
from labkit.probes.sites import short
from labkit.probes.trace import Run, Trace, Word

WITHOUT_MIDDLE = ("up", "down")
SKIPPED = 8  # DAAM leaves out layers this many times smaller than the latents


def prompt_to_prompt(trace: Trace | Run, word: Word, resolution: int | tuple[int, int] = 16, image: int = 0, branch: str = "cond") -> HeatMap:
    """Prompt-to-Prompt's map of a word, (y, x) at one resolution, divided by its maximum; LabkitError if no layer has that resolution."""
    run = latest(trace)
    chosen = run.layers(run.layers(WITHOUT_MIDDLE), resolution)
    maps = [run.attention(word, layer=layer, image=image, branch=branch) for layer in chosen]
    maps = [m.values if "head" in m.axes else m.values[None] for m in maps]  # (head, y, x)
    m = torch.cat(maps).mean(0)  # (y, x): over layers x heads, so a layer with more heads counts more
    y, x = m.shape
    about = f"mean over all steps, {len(chosen)} layers of {y}x{x} and all heads, divided by its maximum"
    return HeatMap(str(word), m / m.max(), about, run.tokens(word, image, branch), branch, image, run.shown(), "attention, divided by its maximum")


def daam(trace: Trace | Run, word: Word, normalise: bool = False, image: int = 0, branch: str = "cond") -> HeatMap:
    """DAAM's map of a word, (h, w) at the latents' size: a sum over steps; with `normalise` a share of what all words of the prompt have.

    Latents of any size and shape serve as the published code's 64x64 or 96x96. Raises LabkitError where heads were not kept apart:
    it cuts off below zero head by head.
    """
    run = latest(trace)
    chosen = [layer for layer in run.layers(WITHOUT_MIDDLE) if factor(run, layer) != SKIPPED]
    tokens = run.tokens(word, image, branch)
    read = len(run.tokenizer.encode(run.prompts[branch][image]))  # with BOS and EOS
    wanted = list(range(read)) if normalise else list(tokens)
    total, keys = torch.zeros(len(wanted), *run.size), 0
    for layer in chosen:
        calls = sum(run.stores["cross", layer, branch].calls)
        for one in heads(run, layer, image, branch):  # (y, x, token) each
            m = one[..., wanted].movedim(-1, 0)[:, None] * calls  # (token, 1, y, x)
            total += F.interpolate(m, size=run.size, mode="bicubic").clamp(min=0)[:, 0]
            keys += 1
    maps = total / keys  # (token, h, w)
    if normalise:
        maps = maps / (maps[1:-1].sum(0, keepdim=True) + 1e-6)
        maps = maps[list(tokens)]
    about = f"sum over all steps, mean over {len(chosen)} layers, all heads and the word's tokens" + (", as a share of all words" if normalise else "")
    unit = "share of the words' attention" if normalise else "attention, summed over steps"
    return HeatMap(str(word), maps.mean(0), about, tokens, branch, image, run.shown(), unit)


def expanded(heatmap: HeatMap, height: int, width: int, absolute: bool = False) -> Tensor:
    """DAAM's map at a picture's size, (height, width): bicubic, then from 0 to 1 (unless `absolute`); a mask is where it exceeds 0.4."""
    m = F.interpolate(heatmap.map[None, None], size=(height, width), mode="bicubic")[0, 0]
    return m if absolute else (m - m.min()) / (m.max() - m.min() + 1e-8)


def heads(run: Run, layer: str, image: int, branch: str) -> Tensor:
    """A layer's attention head by head, (head, y, x, token); LabkitError if heads were averaged."""
    m = run.attention(layer=layer, image=image, branch=branch)
    if "head" not in m.axes:
        raise LabkitError("DAAM takes each head by itself, and they were averaged while they were recorded: record(lab, keep='sums').")
    return m.values


def factor(run: Run, layer: str) -> int:
    """How many times smaller than the latents a layer's maps are, by area's root."""
    y, x = run.resolution(layer)
    return isqrt(run.size[0] * run.size[1] // (y * x))


def latest(trace: Trace | Run) -> Run:
    return trace.run if isinstance(trace, Trace) else trace
