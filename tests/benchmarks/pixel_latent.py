"""Pixels or latents: what a step costs in either, and what the same processor time of training buys.

    python tests/benchmarks/pixel_latent.py [minutes] [folder]

Rombach et al. 2022, figure 6, in small (f = 1 against f = 8). Two U-Nets learn the same 3000 pictures of one object, 128x128, from the same frozen text
encoder, one thread, so many minutes of processor time each (default 10, and as many again to draw and judge). In latents it is tabletop-mini's network. In pixels
it is the same network with three more, narrow resolutions before it, without attention, as pixel models have it: the places where latents begin are the same
16x16. A step of each is timed first, and the learning rate's course is laid over the steps that fit. What is not counted: the autoencoder, which was trained
before, as in the paper's figure. 62 prompts ("a red sphere", two of each training combination) are drawn by both in 20 steps of DDIM, guidance 4, and read by the verifier.
Leaves pixel_latent.json and pixel_latent.png in the folder (default out/pixel_latent): the figures, and five pictures of each, latents above. Those in data/pictures are
what notebook 03 shows.
"""

import json
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import labkit
from labkit import plots
from labkit.device import Noise
from labkit.guidance import classifier_free
from labkit.models.unet import UNet
from labkit.samplers import ddim
from labkit.scenes.prompts import PAIRS
from labkit.scenes.verify import read, share
from labkit.schedule import Schedule
from labkit.training import diffusion, loop, sheets
from labkit.training.data import World, contact_sheet, renders, scenes, to_signed
from labkit.training.tabletop import PRESETS

MINI = PRESETS["tabletop-mini"]
BATCH, STEPS, GUIDANCE = 16, 20, 4.0
SHOWN = (0, 9, 18, 26, 30)  # prompts whose pictures are kept
CONFIGS = {
    "latents": replace(MINI.unet_config, sample_size=16),
    "pixels": replace(
        MINI.unet_config, in_channels=3, out_channels=3, sample_size=128, norm_num_groups=16,
        block_out_channels=(16, 16, 32, *MINI.unet_config.block_out_channels), cross_attention=(False,) * 3 + MINI.unet_config.cross_attention,
        num_attention_heads=(1, 1, 1, *MINI.unet_config.num_attention_heads)),
}


def main(minutes: float, out: Path) -> None:
    torch.set_num_threads(1)
    lab, of = labkit.load("tabletop", "cpu"), scenes(World(counts=(1,)), 0, 3000)
    pictures = renders(World(counts=(1,)), 0, 3000, out / "data")
    pixels = to_signed(pictures)
    data = {"pixels": {"mean": pixels, "std": torch.zeros_like(pixels), "scale": torch.tensor(1.0)},
            "latents": diffusion.latents(lab.vae, pictures, out / "latents.safetensors", "cpu", lab.vae.config.scaling_factor)}
    prompts = [f"a {colour} {shape}" for colour, shape in PAIRS] * 2
    found, drawn = {"minutes": minutes, "prompts": [prompts[k] for k in SHOWN]}, {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        unet, text = diffusion.start_quiet(UNet(config)), deepcopy(lab.text_encoder)
        recipe = diffusion.recipe(unet, text, lab.tokenizer, lab.vae, data[name], of, lab.schedule_config)
        text.requires_grad_(False)
        recipe.players[0].trains.pop("text_encoder")
        recipe.sheet = None
        each = seconds_a_step(recipe)
        steps = max(int(60 * minutes / each), 2)
        with TemporaryDirectory() as room:
            config_ = loop.LoopConfig(steps=steps, batch_size=BATCH, lr=1e-3, warmup=min(100, steps // 10 + 1), cooldown=0.5, ema_decay=0.99, save_every=10**9)
            start = time.process_time()
            unet = loop.run(recipe, config_, room, "cpu", progress=False)["unet"]
            spent = time.process_time() - start
        start = time.process_time()
        x = draw(unet, lab, prompts)  # (62, C, h, w)
        x = torch.cat([lab.decode(part).cpu() for part in x.split(16)]) if name == "latents" else x.clamp(-1, 1) / 2 + 0.5
        took = (time.process_time() - start) / len(prompts)
        drawn[name] = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
        found[name] = {"parameters": sum(p.numel() for p in unet.parameters()), "seconds a step": round(each, 3), "steps": steps, "processor minutes": round(spent / 60, 2),
                       "seconds a picture": round(took, 2), **judged(x)}
        print(name, found[name], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    plots.write(out / "pixel_latent.json", json.dumps(found, indent=1) + "\n")
    sheet = contact_sheet(to_signed(np.concatenate([drawn[name][list(SHOWN)] for name in CONFIGS])), columns=len(SHOWN))
    plots.write(out / "pixel_latent.png", sheets.png(sheet))
    print(json.dumps(found, indent=1))


def seconds_a_step(recipe: loop.Recipe, count: int = 4) -> float:
    """Processor seconds of a training step, the fastest of some, on copies that are thrown away."""
    rehearsal = deepcopy(recipe.players[0].objective)
    optimiser = torch.optim.AdamW(rehearsal.unet.parameters(), lr=0.0, fused=True)
    share_, taken = loop.Share(0, 1, BATCH, 0, torch.device("cpu")), []
    rehearsal.to(memory_format=torch.channels_last)
    for step in range(count):
        start = time.process_time()
        optimiser.zero_grad()
        rehearsal(recipe.batch(step, share_))["loss"].backward()
        optimiser.step()
        taken.append(time.process_time() - start)
    return min(taken[1:])


@torch.no_grad()
def draw(unet: UNet, lab: labkit.LatentDiffusion, prompts: list[str]) -> torch.Tensor:
    """(B, C, h, w) at the end of DDIM, a picture a prompt, seeds 0, 1, ..."""
    parts = []
    for k in range(0, len(prompts), 16):
        words = prompts[k : k + 16]
        c, uncond = lab.encode_text(words), lab.encode_text([""] * len(words))
        noise = Noise(range(k, k + len(words)), (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)).draw()
        *_, last = ddim(classifier_free(unet, c, uncond, GUIDANCE), noise, Schedule(lab.schedule_config), STEPS)
        parts.append(last.x)
    return torch.cat(parts)


def judged(x: torch.Tensor) -> dict[str, dict]:
    """How many of the pictures (62, 3, H, W) in [0, 1] show one object and no more, and of the colour, the shape, and both that were asked for."""
    seen = [[(o.colour, o.shape) for o in one.objects] for one in read(x)]
    right = {"one object": lambda colour, shape, pair: True, "of the colour": lambda colour, shape, pair: colour == pair[0],
             "of the shape": lambda colour, shape, pair: shape == pair[1], "of both": lambda colour, shape, pair: (colour, shape) == pair}
    return {name: share(sum(len(one) == 1 and test(*one[0], pair) for one, pair in zip(seen, PAIRS * 2)), len(seen)) for name, test in right.items()}


if __name__ == "__main__":
    given = sys.argv[1:]
    main(float(given[0]) if given else 10.0, Path(given[1]) if len(given) > 1 else Path("out/pixel_latent"))
