"""Contrastive training of the text encoder and the image tower: the tower is done then, the text encoder learns on with the U-Net.

    s_ij = exp(tau) <image_i, text_j>  (unit vectors);   L = 1/2 [ CE(rows of s) + CE(columns of s) ]     CLIP (Radford et al. 2021), fig. 3

Captions of a small world repeat. Where two of a batch are the same text, either picture is a right answer; sharing the
target between them would give the same loss, since equal texts have equal states, so it is not done. `right` counts both.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.models.clip import CLIPText
from labkit.models.tower import ImageTower
from labkit.training.data import Scene, captions, to_signed
from labkit.training.loop import Player, Recipe, Share


class Contrast(nn.Module):
    """The objective: image tower and text encoder with a linear projection of the end token's state."""

    def __init__(self, text: CLIPText, tower: ImageTower) -> None:
        super().__init__()
        self.text, self.tower = text, tower
        self.head = TextHead(text.config.hidden_size, tower.dim)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        image = F.normalize(self.tower(batch["image"]).float(), dim=-1)  # (B, dim)
        text = F.normalize(self.head(self.text(batch["ids"]), batch["end"]).float(), dim=-1)  # (B, dim)
        s = self.head.log_scale.clamp(max=4.6).exp() * image @ text.T  # (B, B)
        same = (batch["ids"][:, None] == batch["ids"][None]).all(-1).float()  # (B, B)
        target = torch.arange(len(s), device=s.device)
        loss = (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2
        right = same.gather(1, s.argmax(1, keepdim=True)).mean()
        return {"loss": loss, "right": right}


class TextHead(nn.Module):
    """Projection of the end token's state, and the temperature."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # 1 / 0.07, as in the paper

    def forward(self, states: Tensor, end: Tensor) -> Tensor:
        return self.proj(states[torch.arange(len(end), device=states.device), end])  # (B, dim)


def recipe(text: CLIPText, tower: ImageTower, tokenizer, scenes: list[Scene], images: np.ndarray) -> Recipe:
    """Pictures (N, 128, 128, 3) uint8 and their scenes; a batch is pictures with freshly worded captions."""
    contrast = Contrast(text, tower)

    def batch(step: int, share: Share) -> dict:
        g = share.generator(step)
        index = torch.randint(len(scenes), (share.batch_size,), generator=g)
        words = captions([scenes[i] for i in index.tolist()], np.random.default_rng(int(torch.randint(2**31, (1,), generator=g))))
        ids, index = share.mine(tokenizer(words)), share.mine(index)
        return {"image": to_signed(images[index.cpu().numpy()]).to(share.device), "ids": ids, "end": (ids == tokenizer.eos_id).int().argmax(1)}

    return Recipe([Player("clip", contrast, {"text_encoder": text, "image_tower": tower, "head": contrast.head})], batch)
