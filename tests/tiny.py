"""A model of the true make and tiny widths that the tests draw with; random weights, strong enough that everything matters."""

import torch

from labkit.diffusion import LatentDiffusion
from labkit.models.clip import CLIPText
from labkit.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from labkit.models.tokenizer import Tokenizer, build_vocabulary
from labkit.models.unet import UNet
from labkit.models.vae import VAE
from labkit.schedule import ScheduleConfig

WORDS = "a red blue ball cube left of".split()
UNET = UNetConfig((32, 64), (True, False), (2, 4), 1, 48, norm_num_groups=8, sample_size=8)
VAE_ = VAEConfig((16, 32), 1, norm_num_groups=4, scaling_factor=0.31, sample_size=16)
TEXT = CLIPTextConfig(700, 16, 48, 96, 2, 4)


def strong(*networks, seed: int = 0):
    """Fill networks with random weights under which no part is idle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in (named for network in networks for named in network.named_parameters()):
            strength = 0.4 if "to_q" in name else 0.08  # attention far from uniform
            p.copy_(torch.randn(p.shape, generator=generator) * (strength if p.ndim > 1 else 0.1) + (p.ndim == 1) * 0.5)
    return networks


def build(**schedule) -> LatentDiffusion:
    """16x16 pixels, 8x8 latents, attention in two levels, a vocabulary of seven words."""
    unet, vae, text = strong(UNet(UNET), VAE(VAE_), CLIPText(TEXT))
    tokenizer = Tokenizer(*build_vocabulary(WORDS), max_length=16)
    metadata = {"defaults": {"steps": 4, "guidance": 5.0}, "vocabulary": WORDS}
    return LatentDiffusion(unet, vae, text, tokenizer, ScheduleConfig(**schedule), "tiny", metadata)
