"""What the U-Net is told besides x_t and t: the condition c.

    SD 1, SD 2, tabletop     c = states                                  a plain Tensor (B, L, D): one vector per token
    SDXL                     c = Condition(states, pooled, sizes)        the text once more as one vector, and pixel sizes

SDXL was trained on pictures of all sizes, cropped at random, and was told of it: original height and width, crop top and
left, target height and width (the refiner: an aesthetic score in place of the target). Asked for crop (0, 0), it draws
things whole. Podell et al. 2023, "SDXL", section 2.2.

`encode` makes either. Guidance batches conditions and joins them, row by row, with the functions below, whichever kind they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from labkit.errors import LabkitError
from labkit.models.clip import CLIPText
from labkit.models.config import CLIPTextConfig, UNetConfig
from labkit.models.tokenizer import Tokenizer

AESTHETICS = 6.0, 2.5  # of 10: how good a picture SDXL's refiner is told to make, and how good the one to keep away from


@dataclass(frozen=True, eq=False)
class Condition:
    """SDXL's condition of B pictures: `states` (B, L, D), `pooled` (B, P), `sizes` (B, 6) in pixels (the refiner's: (B, 5))."""

    states: Tensor
    pooled: Tensor
    sizes: Tensor

    def __post_init__(self) -> None:
        if self.states.ndim != 3 or self.pooled.ndim != 2 or self.sizes.ndim != 2 or not len(self.states) == len(self.pooled) == len(self.sizes):
            found = ", ".join(str(tuple(x.shape)) for x in (self.states, self.pooled, self.sizes))
            raise LabkitError(f"states, pooled and sizes are {found}: give (B, L, D), (B, P) and (B, 6), B alike in all of them.")

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, which) -> Tensor:
        """Indexes the states, as a plain condition is indexed: c[0, 3] is the state of token 3."""
        return self.states[which]

    @property
    def shape(self) -> torch.Size:
        """The shape of the states, (B, L, D), as a plain condition has it."""
        return self.states.shape

    def to(self, *args, **kwargs) -> "Condition":
        """As Tensor.to; the sizes stay float32, for bfloat16 does not know 1023 from 1024."""
        states, pooled = self.states.to(*args, **kwargs), self.pooled.to(*args, **kwargs)
        return Condition(states, pooled, self.sizes.to(states.device))


def encode(texts: Sequence[tuple[CLIPText, Tokenizer]], prompts: Sequence[str], sizes: Tensor | None = None) -> Tensor | Condition:
    """The condition of B prompts, from the text encoders of a model, each with its tokenizer.

    Without sizes: the last states of the one encoder, after its final norm. With sizes (B, 6): the last but one states of all
    encoders side by side, without a norm, and the last encoder's pooled text.
    """
    ids = [tokenizer(prompts).to(encoder.embeddings.token_embedding.weight.device) for encoder, tokenizer in texts]  # (B, L) each
    if sizes is None:
        return texts[0][0](ids[0])  # (B, L, D)
    h = [encoder.hidden(these) for (encoder, _), these in zip(texts, ids)]
    encoder, tokenizer = texts[-1]
    pooled = encoder.pooled(h[-1][-1], ids[-1], tokenizer.eos_id)  # (B, P)
    return Condition(torch.cat([each[-2] for each in h], dim=-1), pooled, sizes.to(pooled.device))


def sizes_told(unet: UNetConfig, text: CLIPTextConfig) -> int:
    """How many sizes a U-Net is told beside the pooled text of its (last) text encoder: SDXL 6, its refiner 5, all others 0."""
    per_size = unet.addition_time_embed_dim
    return (unet.projection_class_embeddings_input_dim - text.projection_dim) // per_size if per_size else 0


def usual_sizes(told: int, height: int, width: int) -> tuple[tuple, tuple]:
    """The sizes of a picture that is neither scaled nor cropped, in pixels, for the branches "cond" and "uncond"."""
    if told == 5:
        return tuple((height, width, 0, 0, score) for score in AESTHETICS)
    return ((height, width, 0, 0, height, width)[:told],) * 2


def check_sizes(sizes: Sequence[float], usual: tuple) -> tuple:
    """The sizes a user gives, as a tuple; LabkitError unless they are as many as the model's usual ones, each 0 or more."""
    numbers = isinstance(sizes, (list, tuple)) and all(type(n) in (int, float) and 0 <= n < float("inf") for n in sizes)
    if not (numbers and len(sizes) == len(usual) > 0):
        needs = f"the model is told {len(usual)} numbers, such as {usual}" if usual else "this model is told none, only SDXL is"
        raise LabkitError(f"sizes is {sizes!r}: {needs}.")
    return tuple(sizes)


def for_batch(c: Tensor | Condition, B: int) -> Tensor | Condition:
    """A condition for B pictures: one is repeated for all of them; LabkitError unless there are 1 or B."""
    if len(c) not in (1, B):
        raise LabkitError(f"{len(c)} conditions for a batch of {B} images: give one, or one for each image.")
    if isinstance(c, Condition):
        return Condition(*(x.expand(B, *x.shape[1:]) for x in (c.states, c.pooled, c.sizes)))
    return c.expand(B, *c.shape[1:])


def joined(first: Tensor | Condition, second: Tensor | Condition) -> Tensor | Condition:
    """The rows of both, first ones first; LabkitError unless both are of one kind."""
    if isinstance(first, Condition) != isinstance(second, Condition):
        raise LabkitError("One condition has pooled text and sizes, the other has states only: encode both with the same model.")
    if isinstance(first, Condition):
        pairs = ((first.states, second.states), (first.pooled, second.pooled), (first.sizes, second.sizes))
        return Condition(*(torch.cat(pair) for pair in pairs))
    return torch.cat([first, second])


def silenced(c: Condition, rows: Tensor) -> Condition:
    """The condition with states and pooled text of zero in the rows where `rows`, (B,) bool, is true; sizes stay.

    SDXL was trained with the text zeroed, not empty, as its unconditional case; diffusers calls it force_zeros_for_empty_prompt.
    """
    keep = (~rows).to(c.states)  # (B,)
    return replace(c, states=c.states * keep[:, None, None], pooled=c.pooled * keep[:, None].to(c.pooled))
