"""A step of training tabletop's U-Net (batch 16) and autoencoder (batch 4), in bfloat16 beside float32, in one process and in turns; medians of nine.

    OMP_NUM_THREADS=1 python tests/benchmarks/precision.py

Forward, backward and the optimiser's step, as training/loop.py takes them. Say the processor beside the figures: without AMX or AVX-512's products of
bfloat16 the first of a pair is many times slower, and labkit does not choose it there.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from speed import alternate

from labkit.device import has_bfloat16
from labkit.models.tower import ImageTower
from labkit.models.unet import UNet
from labkit.models.vae import VAE
from labkit.schedule import Schedule
from labkit.training import loop
from labkit.training import vae as autoencoding
from labkit.training.diffusion import NoisePrediction, attention_for
from labkit.training.loop import LoopConfig, Player, Recipe, State
from labkit.training.tabletop import PRESETS

PRESET = PRESETS["tabletop"]


def unet() -> tuple[Player, dict]:
    g, network = torch.Generator().manual_seed(0), UNet(PRESET.unet_config)
    x0, eps = torch.randn(2, 16, 4, 16, 16, generator=g)
    batch = {"x0": x0, "eps": eps, "t": torch.randint(1000, (16,), generator=g), "c": torch.randn(16, 32, PRESET.unet_config.cross_attention_dim, generator=g)}
    return Player("unet", NoisePrediction(network, None, Schedule(PRESET.schedule), PRESET.gamma, PRESET.floor), {"unet": network}), batch


def vae() -> tuple[Player, dict]:
    g, network = torch.Generator().manual_seed(0), VAE(PRESET.vae_config)
    player = autoencoding.recipe(network, ImageTower(), images=None, loss=replace(PRESET.vae_loss, adversarial=0.0)).players[0]
    return player, {"image": torch.rand(4, 3, 128, 128, generator=g) * 2 - 1, "noise": torch.randn(4, 4, 16, 16, generator=g), "step": 10**6}


def main() -> None:
    print(f"{torch.backends.cpu.get_cpu_capability()}; labkit takes {'bfloat16' if has_bfloat16('cpu') else 'float32'} here")
    loop.has_bfloat16 = lambda device: True  # measured, whatever would be chosen
    for what, make in (("U-Net, batch 16", unet), ("autoencoder, batch 4", vae)):
        pair = []
        for precision in ("bf16", "no"):
            torch.manual_seed(0)
            player, batch = make()
            config = LoopConfig(steps=100, batch_size=16, lr=1e-4, mixed_precision=precision)
            state = State(Recipe([player], batch=None), config, Accelerator(cpu=True))

            def step(state=state, player=player, batch=batch, config=config) -> None:
                with attention_for(player.objective, config, torch.device("cpu")) if player.name == "unet" else nullcontext():
                    state.step(0, dict(batch))

            pair.append(step)
        bf16, float32, _ = alternate(*pair, rounds=9)
        print(f"{what:24} bfloat16 {bf16:.3f} s  float32 {float32:.3f} s  ratio {bf16 / float32:.2f}", flush=True)


if __name__ == "__main__":
    main()
