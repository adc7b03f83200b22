"""What the text encoder has made of a text, layer by layer, and what the U-Net draws when it is shown an unfinished state.

    h_0 = E[token] + P[position],   h_l the state after layer l                     one row a layer, one column a token
    lens(l):  c = LN(h_l) in place of LN(h_n)                                       Toker et al. 2024, "Diffusion Lens"
    alike(a, b) = cos(m_a, m_b),    m the mean of a text's token states, less the mean of all texts compared

Raw states of different words all have cosines near 1, since they share a large common part; that part is taken off before comparing.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.models.condition import Condition
from labkit.probes.courses import by_row, condition, drawn, telling
from labkit.probes.named import Named
from labkit.recipe import check_text


@torch.no_grad()
def token_states(lab: LatentDiffusion, text: str, encoder: int = 0) -> Named:
    """The states of a text's tokens (BOS to EOS) after each layer, axes (layer, token, channel); layer 0 is what the first layer reads.

    `encoder`: 1 is SDXL's second. Raises LabkitError if the text is too long, has unknown words, or there is no such encoder.
    """
    check_text(lab, text)
    if encoder not in range(len(lab.texts)):
        raise LabkitError(f"There is no text encoder {encoder!r}: this model has {len(lab.texts)}.")
    network, tokenizer = lab.texts[encoder]
    read = tokenizer.encode(text)
    h = torch.stack(network.hidden(tokenizer(text).to(lab.device)))[:, 0, : len(read)]  # (layer, token, channel)
    return Named(h.float().cpu(), ("layer", "token", "channel"), {"layer": tuple(range(len(h))), "token": _pieces(read.pieces)})


@torch.no_grad()
def lens(lab: LatentDiffusion, prompt: str, layers: Sequence[int] | None = None, seed: int = 0, **options) -> tuple[list, tuple[int, ...]]:
    """Draw a prompt from the states after each of some layers (default: all); the PIL pictures, and the layers' numbers.

    The final LayerNorm is applied to all, where the model has one in its place (SD 1, SD 2). SDXL's encoders are of different depth: layer
    l is the same share of both, and the pooled text stays what it is. `options` as in `lab.generate`. Raises LabkitError.
    """
    usual = condition(lab, prompt, **options)
    told = isinstance(usual, Condition)
    depth = len(lab.texts[0][0].encoder.layers) - told  # SDXL reads the last but one
    layers = list(range(depth + 1) if layers is None else layers)
    if not layers or any(type(layer) is not int or not 0 <= layer <= depth for layer in layers):
        raise LabkitError(f"layers is {layers!r}: give some of 0 to {depth}.")
    hidden = [network.hidden(tokenizer(prompt).to(lab.device)) for network, tokenizer in lab.texts]
    if told:
        states = [torch.cat([h[round(layer / depth * (len(h) - 2))] for h in hidden], dim=-1) for layer in layers]
        c = by_row(lambda *rows: torch.cat(rows), *(Condition(s.to(usual.states), usual.pooled, usual.sizes) for s in states))
    else:
        c = torch.cat([lab.text_encoder.final_layer_norm(hidden[0][layer]) for layer in layers]).to(usual)  # (layers, L, D)
    images, _ = drawn(lab, [prompt] * len(layers), telling(lab, lambda i: c), seed=[seed] * len(layers), **options)
    return images, tuple(layers)


@torch.no_grad()
def alike(lab: LatentDiffusion, texts: Sequence[str], layer: int | None = None, encoder: int = 0) -> Named:
    """How alike words or phrases are to the text encoder, axes (text, other): cosines of their mean token states, -1 to 1.

    `layer`: after that layer; None is what the last one has left. Raises LabkitError for fewer than three texts (with two, less their mean,
    the answer is always -1), and as `token_states`.
    """
    if len(texts) < 3 or isinstance(texts, str):
        raise LabkitError("Give three texts or more: what they have in common is taken off before they are compared.")
    states = [token_states(lab, text, encoder) for text in texts]
    last = states[0].shape["layer"] - 1
    m = torch.stack([s.at(layer=last if layer is None else layer).values[1:-1].mean(0) for s in states])  # (text, channel), without BOS and EOS
    m = F.normalize(m - m.mean(0), dim=1)
    return Named(m @ m.T, ("text", "other"), {"text": tuple(texts), "other": tuple(texts)})


def by_layer(states: Named) -> Named:
    """How near each token's state already is to what it will be, axes (layer, token): cosines with the last layer's."""
    h: Tensor = states.values  # (layer, token, channel)
    return Named(F.cosine_similarity(h, h[-1:], dim=-1), ("layer", "token"), states.labels)


def _pieces(pieces: tuple[str, ...]) -> tuple[str, ...]:
    """Tokens as labels, each one different."""
    plain = ["start", *(piece.removesuffix("</w>") for piece in pieces[1:-1]), "end"]
    return tuple(piece if plain.count(piece) == 1 else f"{piece} {plain[: k + 1].count(piece)}" for k, piece in enumerate(plain))
