"""Training of the U-Net on latents, and of the text encoder with it: guess the noise.

    L = E_{x0, t, eps} w_t || eps - eps_theta(q_sample(x0, t, eps), t, tau_theta(y)) ||^2     DDPM (Ho et al. 2020), eq. 14; LDM, eq. 3
    w_t = min(max(SNR_t, floor), gamma) / SNR_t            gamma: Hang et al. 2023, "Min-SNR Weighting", section 3.4
                                                           floor: Salimans & Ho 2022, "Progressive Distillation", section 4, truncated SNR

x0 is a sample of the encoder's Gaussian times the scale factor, t is uniform, y a fresh caption; one caption in ten is replaced
by the empty one, so that the same network also learns p(x) and can be guided (Ho & Salimans 2022). The text encoder tau starts
from contrastive training and learns on, as in LDM; Stable Diffusion freezes CLIP's, which had seen 400 million captions.
At nearly clean timesteps eps is guessed almost from x_t alone and badly at that: gamma keeps them from ruling the gradient. At
noisy timesteps x_t is nearly eps itself, so that the error of eps is small however wrong the guess of x0: floor lets them count.
Layout is decided there, and some lessons (lessons.py) are drawn from there.
Latents do not depend on what is learnt here, so they are computed once.
"""
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.device import Noise
from labkit.errors import LabkitError
from labkit.guidance import classifier_free
from labkit.models.clip import CLIPText
from labkit.models.layers import ResnetBlock, SpatialTransformer
from labkit.models.unet import UNet
from labkit.models.vae import VAE
from labkit.models.whole import whole_file
from labkit.samplers import ddim
from labkit.schedule import Schedule, ScheduleConfig, eps_prediction, q_sample
from labkit.tap import listen
from labkit.training.data import Scene, captions, contact_sheet, to_signed
from labkit.training.lessons import Timetable
from labkit.training.loop import LoopConfig, Player, Recipe, Share
from labkit.training.vae import scale_factor

DROPOUT = 0.1  # of the captions
SHEET_PROMPTS = ("a red sphere", "a small white cube at night", "a pencil sketch of a yellow cone", "a red cube and a blue sphere",
                 "three green cylinders", "a red sphere left of a blue cube", "a purple metal cone on a checkered table", "two white cones and a cyan cube")


class NoisePrediction(nn.Module):
    """The objective: weighted mean squared error of the predicted noise; its plain mean over early and late timesteps is shown apart.

    A network that predicts v or x0 is asked for the noise that follows from it. `text` None: batches bring the condition c in place of token ids.
    """

    def __init__(self, unet: UNet, text: CLIPText | None, schedule: Schedule, gamma: float, floor: float = 0.0) -> None:
        super().__init__()
        self.unet, self.text, self.schedule = unet, text, schedule
        self.denoise = eps_prediction(lambda x_t, t, c: self.unet(x_t, t, c), schedule)
        self.register_buffer("weight", min_snr(schedule, gamma, floor).float(), persistent=False)  # (T,); goes to the device with the network

    def forward(self, batch: dict) -> dict[str, Tensor]:
        t, eps = batch["t"], batch["eps"]
        x_t = q_sample(batch["x0"], t, eps, self.schedule)  # (B, 4, h, w)
        c = self.text(batch["ids"]) if self.text else batch["c"]
        error = (self.denoise(x_t, t, c) - eps).pow(2).flatten(1).mean(1)  # (B,)
        loss = (self.weight[t] * error).mean()
        late = (t >= self.schedule.config.num_train_timesteps // 2).float()
        return {"loss": loss, "clean": (error * (1 - late)).sum() / (1 - late).sum().clamp(min=1), "noisy": (error * late).sum() / late.sum().clamp(min=1)}


def min_snr(schedule: Schedule, gamma: float = 5.0, floor: float = 0.0) -> Tensor:
    """Weights of the squared error of eps, (T,): the SNR held between floor and gamma, over the SNR; as an error of x0 it weighs what is in the numerator.

    floor = 0: min-SNR. floor = 0, gamma = inf: all 1. floor = 1, gamma = inf: the truncated SNR.
    """
    if not 0 <= floor <= gamma or not gamma > 0:
        raise LabkitError(f"gamma is {gamma} and floor {floor}; give SNRs with 0 <= floor <= gamma such as 0 and 5, gamma may be float('inf')")
    return schedule.snr.clamp(floor, gamma) / schedule.snr


def explicit_attention(objective: nn.Module):
    """A `with` in which all its attention is matrix products and a softmax."""
    return listen(objective, {"*.probs": lambda probs, name: None})


def attention_for(objective: NoisePrediction, config: LoopConfig, device: torch.device):
    """A `with` in which its attention is what trains faster: explicit on a CPU in bfloat16, while the probabilities of 32x32 places have room; else the fused kernel."""
    explicit = device.type == "cpu" and config.autocasts(device) and objective.unet.config.sample_size <= 32
    return explicit_attention(objective) if explicit else nullcontext()


@torch.no_grad()
def start_quiet(unet: UNet) -> UNet:
    """Zero the last layer of every residual branch and of the network, so that it starts as identity and guesses no noise.

    Makes the first thousand steps count; from ADM (Dhariwal & Nichol 2021) on everybody does it.
    """
    last = [m.conv2 for m in unet.modules() if isinstance(m, ResnetBlock)] + [m.proj_out for m in unet.modules() if isinstance(m, SpatialTransformer)]
    for layer in (*last, unet.conv_out):
        layer.weight.zero_()
        layer.bias.zero_()
    return unet


@torch.no_grad()
def latents(vae: VAE, images: np.ndarray, path: Path, device: str | None = None, scale: float | None = None, batch_size: int = 16) -> dict[str, Tensor]:
    """Mean and standard deviation of every picture's scaled latent, (N, 4, h, w) each, and the scale (), measured if None; kept in `path`.

    What is there already is taken if this very autoencoder made it, of as many pictures or more.
    """
    made_by = {"vae": fingerprint(vae)}
    if path.exists() and _metadata(path) == made_by and (found := load_file(path))["mean"].shape[0] >= len(images):
        return found
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    vae, means, stds = vae.to(device), [], []
    scale = scale_factor(vae, images[:2000]) if scale is None else scale
    for i in tqdm(range(0, len(images), batch_size), desc="latents", leave=False):
        q = vae.encode(to_signed(images[i : i + batch_size]).to(device))
        means.append((q.mean * scale).cpu().contiguous())
        stds.append((q.std * scale).cpu())
    found = {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous(), "scale": torch.tensor(scale)}
    with whole_file(path, overwrite=True) as unfinished:
        try:
            save_file(found, unfinished, metadata=made_by)
        except SafetensorError as error:  # what the library calls a full disk
            raise OSError(None, " ".join(str(error).split())) from None
    return found


def fingerprint(network: nn.Module) -> str:
    """SHA-256 over names and values of the parameters: equal only for the same weights."""
    digest = sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _metadata(path: Path) -> dict | None:
    with safe_open(path, "pt") as file:
        return file.metadata()


def saved_scale(path: Path) -> float:
    """The scale factor measured when `latents` wrote this file."""
    with safe_open(path, "pt") as file:
        return float(file.get_tensor("scale"))


def draw(latents: dict[str, Tensor], everyone: Tensor, t: Tensor, g: torch.Generator, share: Share) -> tuple[dict[str, Tensor], list[bool]]:
    """A share of the noising of everyone's pictures (B,) to timesteps t (B,): its x0, t and eps; and whose words of the share are to be dropped."""
    n, index = len(everyone), share.mine(everyone).cpu()
    posterior, eps = (share.mine(torch.randn(n, *latents["mean"].shape[1:], generator=g)) for _ in range(2))
    dropped = share.mine(torch.rand(n, generator=g) < DROPOUT).tolist()
    x0 = latents["mean"][index].to(share.device) + latents["std"][index].to(share.device) * posterior
    return {"x0": x0, "t": share.mine(t), "eps": eps}, dropped


def recipe(unet: UNet, text: CLIPText, tokenizer, vae: VAE, latents: dict[str, Tensor], scenes: list[Scene], config: ScheduleConfig,
           gamma: float = 5.0, floor: float = 0.0, timetable: Timetable | None = None) -> Recipe:
    """Latents as from `latents`, with the scenes they show; captions are worded afresh for every batch. What is learnt when is as `timetable` has it; None: everything, always."""
    schedule, scale = Schedule(config), float(latents["scale"])
    text.train().requires_grad_(True)

    def batch(step: int, share: Share) -> dict:
        g, n, rng = share.generator(step), share.batch_size, np.random.default_rng([share.seed, step, 0])
        if timetable is None:
            everyone, t = (torch.randint(high, (n,), generator=g) for high in (len(scenes), config.num_train_timesteps))
            spoken = captions([scenes[i] for i in everyone.tolist()], rng)
        else:
            lessons, everyone, t = timetable.choose(step, g, n)
            spoken = [lesson.caption(scenes[i], rng) for lesson, i in zip(lessons, everyone.tolist())]
        drawn, dropped = draw(latents, everyone, t, g, share)
        words = ["" if drop else w for drop, w in zip(dropped, spoken[share.rank :: share.world])]  # the same in any number of processes
        return {**drawn, "ids": tokenizer(words).to(share.device)}

    @torch.no_grad()
    def sheet(modules: dict[str, nn.Module]) -> object:
        network = modules["unet"]
        device, n = next(network.parameters()).device, len(SHEET_PROMPTS)
        c, uncond = (modules["text_encoder"](tokenizer(words).to(device)) for words in (list(SHEET_PROMPTS) * 2, [""] * 2 * n))  # (B, L, D)
        noise = Noise(range(2 * n), tuple(latents["mean"].shape[1:]))
        for step in ddim(classifier_free(network, c, uncond, 4.0), noise.draw().to(device), schedule, 20):
            z = step.x
        return contact_sheet(vae.to(device).decode(z / scale).cpu(), columns=n)

    return Recipe([Player("diffusion", NoisePrediction(unet, text, schedule, gamma, floor), {"unet": unet, "text_encoder": text})], batch, sheet)
