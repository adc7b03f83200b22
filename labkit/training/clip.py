"""Contrastive training of the text encoder and the image tower: the tower is done then, the text encoder learns on with the U-Net.

    s_ij = exp(tau) <image_i, text_j>  (unit vectors);   L = 1/2 [ CE(rows of s) + CE(columns of s) ]     CLIP (Radford et al. 2021), fig. 3

Each picture is also held against its own caption twisted into a false one (relations turned round, colours exchanged): contrast among different
scenes is won by a bag of words, and an encoder trained on it alone has nearly one state for "left of" and "right of" (Yuksekgonul et al. 2023,
"When and why vision-language models behave like bags-of-words, and what to do about it", whose NegCLIP this is).

Captions of a small world repeat. Where two of a batch are the same text, either picture is a right answer; sharing the
target between them would give the same loss, since equal texts have equal states, so it is not done. `right` counts both.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.models.clip import CLIPText
from labkit.models.tower import ImageTower
from labkit.scenes.captions import caption, twisted
from labkit.training.data import Scene, to_signed
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
        scale = self.head.log_scale.clamp(max=4.6).exp()
        s = scale * image @ text.T  # (B, B)
        same = (batch["ids"][:, None] == batch["ids"][None]).all(-1).float()  # (B, B)
        target = torch.arange(len(s), device=s.device)
        false = F.normalize(self.head(self.text(batch["false"]), batch["false_end"]).float(), dim=-1)  # (B, dim)
        own = (scale * (image * false).sum(-1)).masked_fill(~batch["twisted"], -torch.inf)  # (B,)
        loss = (F.cross_entropy(torch.cat([s, own[:, None]], 1), target) + F.cross_entropy(s.T, target)) / 2
        right = same.gather(1, s.argmax(1, keepdim=True)).mean()
        told = (s.diagonal() > own)[batch["twisted"]].float().sum() / batch["twisted"].sum().clamp(min=1)
        return {"loss": loss, "right": right, "told": told}


class TextHead(nn.Module):
    """Projection of the end token's state, and the temperature."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # 1 / 0.07, as in the paper

    def forward(self, states: Tensor, end: Tensor) -> Tensor:
        return self.proj(states[torch.arange(len(end), device=states.device), end])  # (B, dim)


def recipe(text: CLIPText, tower: ImageTower, tokenizer, scenes: list[Scene], images: np.ndarray, whereabouts: float = 0.0) -> Recipe:
    """Pictures (N, 128, 128, 3) uint8 and their scenes; a batch is pictures with freshly worded captions, true and, where `twisted`, false ones."""
    contrast = Contrast(text, tower)

    def batch(step: int, share: Share) -> dict:
        g = share.generator(step)
        index = torch.randint(len(scenes), (share.batch_size,), generator=g)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=g)))
        shown = [scenes[i] for i in index.tolist()]
        said = [caption(scene, rng, whereabouts=whereabouts) for scene in shown]
        lies = [twisted(one, scene, rng) for one, scene in zip(said, shown)]
        ids, false = (share.mine(tokenizer(words)) for words in ([one.text for one in said], [lie or "" for lie in lies]))
        end, false_end = ((x == tokenizer.eos_id).int().argmax(1) for x in (ids, false))
        pictures = to_signed(images[share.mine(index).cpu().numpy()]).to(share.device)
        is_twisted = share.mine(torch.tensor([lie is not None for lie in lies]))
        return {"image": pictures, "ids": ids, "end": end, "false": false, "false_end": false_end, "twisted": is_twisted}

    return Recipe([Player("clip", contrast, {"text_encoder": text, "image_tower": tower, "head": contrast.head})], batch)
