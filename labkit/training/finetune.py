"""A model trained on with one's own pictures: the U-Net learns, autoencoder and text encoders stay what they are.

    L = E_{(x, y), t, eps} w_t || eps - eps_theta(q_sample(x0, t, eps), t, tau(y)) ||^2,   x0 ~ scale q(z | x)          as diffusion.py has it

Any model that draws from words alone: tabletop, Stable Diffusion 1.x and 2.x, SDXL. Nine captions in ten are told, the tenth is left out, as guidance wants it.
"""

import json
from copy import copy
from pathlib import Path

import torch
from torch import nn

from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.models.condition import Condition, silenced
from labkit.models.unet import UNet
from labkit.models.whole import whole_file
from labkit.recipe import check_words_alone, unknown_words
from labkit.training import diffusion
from labkit.training.data import contact_sheet, to_signed
from labkit.training.imagefolder import Pictures, read_folder
from labkit.training.loop import LoopConfig, Player, Recipe, Share, run

CONFIG = LoopConfig(steps=500, batch_size=4, lr=1e-5, warmup=20, ema_decay=0.99, save_every=100, sheet_every=500, mixed_precision="bf16")
CLOSED = 1e-4  # the learning rate of a small model of a closed vocabulary, such as tabletop
SHOWN = 4  # pictures of the sheet


def read_pictures(lab: LatentDiffusion, folder: str | Path, on_bad: str = "refuse", progress: bool = True) -> Pictures:
    """The pictures of a folder at the side that a model draws, with captions it can read; LabkitError, as `read_folder`, if there are others."""

    def fault(text: str) -> str | None:
        if unknown := unknown_words(lab, text):
            return f"{lab.name} does not know {', '.join(map(repr, unknown))}"
        cut = next((rest for _, tokenizer in lab.texts if (rest := tokenizer.cut(text))), None)
        return f"its caption is too long, {cut[:40]!r} would be cut off" if cut else None

    return read_folder(folder, lab.unet.config.sample_size * lab.vae.config.factor, fault, on_bad, progress)


def finetune(lab: LatentDiffusion, pictures: Pictures, folder: str | Path, config: LoopConfig = CONFIG, progress: bool = True) -> LatentDiffusion:
    """A model like `lab` whose U-Net was trained on `pictures`; `lab` itself is not changed. Goes on where an earlier run in `folder` stopped.

    Raises LabkitError if `lab` is not in float32 or needs more than words, or if the folder's run began with other pictures or another model.
    """
    check_words_alone(lab)
    if lab.dtype is not torch.float32:
        raise LabkitError(f"{lab.name} is in {str(lab.dtype).removeprefix('torch.')}, too coarse for small steps; load it with dtype='float32'.")
    folder, batch_size = Path(folder), min(16, max(1, 2**20 // pictures.side**2))
    begin(folder, {"pictures": pictures.sha256, "weights": diffusion.fingerprint(lab.unet)})
    latents = diffusion.latents(lab.vae, pictures, folder / "latents.safetensors", str(lab.device), lab.vae.config.scaling_factor, batch_size)
    unet = UNet(lab.unet.config)
    unet.load_state_dict(lab.unet.state_dict())
    taught = recipe(lab, unet, pictures, latents)
    with diffusion.attention_for(taught.players[0].objective, config, lab.device):
        trained = run(taught, config, folder, lab.device.type, progress)
    return with_unet(lab, trained["unet"], folder.name)


def recipe(lab: LatentDiffusion, unet: UNet, pictures: Pictures, latents: dict, gamma: float = 5.0) -> Recipe:
    """Latents as from `diffusion.latents`, with the captions of their pictures; the sheet shows pictures above what is drawn of their captions."""

    def batch(step: int, share: Share) -> dict:
        g, n = share.generator(step), share.batch_size
        everyone, t = (torch.randint(high, (n,), generator=g) for high in (len(pictures), lab.schedule_config.num_train_timesteps))
        drawn, dropped = diffusion.draw(latents, everyone, t, g, share)
        words = ["" if drop else pictures.texts[i] for drop, i in zip(dropped, share.mine(everyone).tolist())]
        c = lab.encode_text(words)  # (B, L, D)
        if lab.force_zeros and isinstance(c, Condition):
            c = silenced(c, torch.tensor(dropped, device=lab.device))
        return {**drawn, "c": c.to(share.device)}

    def sheet(modules: dict[str, nn.Module]) -> object:
        drawn = with_unet(lab, modules["unet"], lab.name).generate(list(pictures.texts[:SHOWN]), seed=list(range(len(pictures)))[:SHOWN], progress=False)
        return contact_sheet(torch.cat([to_signed(pictures[:SHOWN]), lab.decode(drawn.latents).cpu() * 2 - 1]), columns=len(drawn.images))

    return Recipe([Player("diffusion", diffusion.NoisePrediction(unet, None, lab.schedule, gamma), {"unet": unet})], batch, sheet)


def with_unet(lab: LatentDiffusion, unet: UNet, name: str) -> LatentDiffusion:
    """The same model with another U-Net, under another name."""
    other = copy(lab)
    other.unet, other.name, other.metadata = unet, name, {**lab.metadata, "name": name}
    return other


def begin(folder: Path, what: dict) -> None:
    """Note in folder/begun.json what a run starts from; LabkitError if it was started from something else."""
    path = folder / "begun.json"
    if not path.exists():
        with whole_file(path, overwrite=True) as unfinished:
            unfinished.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in what if before[name] != what[name]]
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise LabkitError(f"{path}: cannot be read ({error}); train in another folder.") from None
    if other:
        raise LabkitError(f"{folder}: this run began with other {other[0]} than these; train in another folder, or give it those.")
