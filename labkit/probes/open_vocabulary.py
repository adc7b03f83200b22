"""Where a word would look that the prompt does not have: stored queries, compared with the keys of any text.

    A = softmax(q_i (W_k c')^T / sqrt(d)),    q_i of the drawing, c' the states of another text        OVAM's idea

While a picture is drawn, cross-attention asks with q at every place; which words may answer is decided by the keys alone. So the drawing
is recorded once, and any text can be asked about it afterwards (Marcos-Manchon et al. 2024, "Open-Vocabulary Attention Maps with Token
Optimization for Semantic Segmentation in Diffusion Models"). With the prompt itself as the text this is exactly `trace.heatmap`. OVAM
adds heads, steps and layers up and optionally leaves out the softmax; here they are averaged as in `trace.heatmap`, with the softmax.

    with record(lab, attention=None, states="queries") as trace:
        lab.generate("a red sphere", seed=0)
    open_vocabulary(trace, lab, "a shadow on a table", "shadow").plot()
"""

import torch
from torch import Tensor

from labkit.diffusion import LatentDiffusion
from labkit.models.unet import states_of
from labkit.probes.heatmap import HeatMap, average, described
from labkit.probes.published import latest
from labkit.probes.trace import Run, Trace
from labkit.probes.words import find


@torch.no_grad()
def open_vocabulary(
    trace: Trace | Run, lab: LatentDiffusion, text: str, word: str, image: int = 0, branch: str = "cond", layers: str | tuple[str, ...] = "*"
) -> HeatMap:
    """The heat map of a word of `text` in a picture drawn of another prompt, (h, w): mean over steps, heads and layers, a share of `text`.

    Needs record(lab, states="queries"), and the model that drew. Raises LabkitError if the word is not in the text, the text is too long or
    has words that the model does not know, and as `trace.heatmap`.
    """
    run = latest(trace)
    run.check(image, branch, "queries")
    tokens = find(lab.tokenizer, text, word)
    c = states_of(lab.encode_text(text))  # (1, L, D)
    chosen = run.layers(layers, kind="queries")
    maps = [listened(run, lab, layer, c, (image, branch))[..., list(tokens)].sum(-1) for layer in chosen]  # (y, x) each
    steps = len(run.stores["queries", chosen[0], branch].steps)
    about = described(steps, len(chosen), "all heads", lab.tokenizer.max_length)
    return HeatMap(word, average(maps, run.size), f"{about}; words of “{text}”", tokens, branch, image, run.shown())


def listened(run: Run, lab: LatentDiffusion, layer: str, c: Tensor, which: tuple[int, str]) -> Tensor:
    """The attention that one layer would pay to the text states c (1, L, D), (y, x, token): mean over steps and heads."""
    image, branch = which
    store, attention = run.stores["queries", layer, branch], lab.unet.get_submodule(layer)
    k = attention.to_k(c).float().cpu()  # (1, L, C)
    k = k.view(k.shape[1], attention.num_heads, -1).transpose(0, 1)  # (head, L, d)
    total = torch.zeros(*store.values.shape[3:5], k.shape[1])  # (y, x, L)
    for step in store.steps:  # one at a time: their attention is larger than their queries
        q, _ = store.mean(image, step)  # (head, y, x, d)
        scores = torch.einsum("hyxd,hld->hyxl", q * q.shape[-1] ** -0.5, k)  # (head, y, x, L)
        total += scores.softmax(-1).mean(0) / len(store.steps)
    return total
