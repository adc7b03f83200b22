"""Training of where things stand: the loss of diffusion.py on little else, before the rest.

    captions   "a red sphere on the left"; "a red sphere left of a blue cube", "a red sphere in front and a blue cube on the right"
    t          from the noisier half, where places are decided
    pictures   of one object at first, then mostly of two

What one word says of a picture is learnt from its gradient, and that drowns in the noise of all the other examples: a signal in a share p of the batch takes some
1 / p^2 as many steps. Measured on tabletop: in the mixed training one caption in ten said on which side a single object stands, and after 70,000 samples turning it round
cost nothing; after 10,000 of little else it raised the error of x0 at t = 900 by an eighth, in the end by a third. So this is a curriculum (Bengio et al. 2009): what is rare is learnt first, and
kept by what of it is in the mixture.
"""
import numpy as np
import torch
from torch import Tensor

from labkit.models.clip import CLIPText
from labkit.models.unet import UNet
from labkit.scenes.captions import caption, stands
from labkit.schedule import Schedule, ScheduleConfig
from labkit.training.data import Scene
from labkit.training.diffusion import NoisePrediction, draw
from labkit.training.loop import Player, Recipe, Share

SINGLES = (0.85, 0.3)  # share of pictures of one object, at first and later
FIRST = 0.5  # the share of the steps that "at first" is


def recipe(unet: UNet, text: CLIPText, tokenizer, latents: dict[str, Tensor], scenes: list[Scene], config: ScheduleConfig, steps: int,
           gamma: float = 5.0, floor: float = 0.0) -> Recipe:
    """Latents as from `diffusion.latents`, with the scenes they show; `steps` is the length of the whole run."""
    schedule, T = Schedule(config), config.num_train_timesteps
    text.train().requires_grad_(True)
    alone = torch.tensor([len(s.objects) == 1 and stands(s.objects[0]) is not None for s in scenes], dtype=torch.float32)
    pairs = torch.tensor([len(s.objects) == 2 for s in scenes], dtype=torch.float32)

    def batch(step: int, share: Share) -> dict:
        singles = SINGLES[0] if step < FIRST * steps else SINGLES[1]
        weights = singles * alone / alone.sum().clamp(min=1) + (1 - singles) * pairs / pairs.sum().clamp(min=1)
        drawn, everyone, dropped = draw(latents, weights, T, step, share, often=(T // 2, T, 1.0))
        rng = np.random.default_rng([share.seed, step, 1])
        spoken = [located(scenes[i], rng) for i in everyone.tolist()]
        words = ["" if drop else w for drop, w in zip(dropped, spoken[share.rank :: share.world])]
        return {**drawn, "ids": tokenizer(words).to(share.device)}

    return Recipe([Player("layout", NoisePrediction(unet, text, schedule, gamma, floor), {"unet": unet, "text_encoder": text})], batch)


def located(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that says where something stands, if one of some draws does; mostly terse."""
    for _ in range(8):
        said = caption(scene, rng, "medium" if rng.random() < 0.3 else "terse", whereabouts=1.0)
        if any(word.kind in ("relation", "whereabouts") for word in said.words):
            break
    return said.text
