"""Opening and saving whole models, in the folder layout that diffusers reads and writes.

    model_index.json                              which part is of which kind
    unet/ vae/        config.json, diffusion_pytorch_model.safetensors
    text_encoder/     config.json, model.safetensors
    tokenizer/        vocab.json, merges.txt, ...
    scheduler/        scheduler_config.json       the noise schedule
    labkit.json                                   ours, optional: name, defaults, closed vocabulary

Loading is strict: every parameter is read, by name, in its shape, or an error of one line says which is not and what to do. It
opens safetensors only, which run no code. Saving writes everything into a folder beside the wanted one, which takes its name
only when all of it is there. Nothing is fetched unless the name is a hub id, and then only what is needed, and only once.
"""

import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from labkit.errors import CheckpointError, LabkitError
from labkit.models import formats
from labkit.models.clip import CLIPText
from labkit.models.files import fill, read_json, read_tensors, write_json, write_safetensors
from labkit.models.sources import DATA, STEMS, resolve, verify_sums, write_sums
from labkit.models.tokenizer import Tokenizer
from labkit.models.unet import UNet
from labkit.models.vae import VAE
from labkit.schedule import ScheduleConfig

__all__ = ["Parts", "load_pipeline", "save_pipeline", "resolve", "verify_sums", "write_sums"]

KINDS = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")


@dataclass(frozen=True)
class Parts:
    """What a checkpoint holds: the three networks, the tokenizer, the noise schedule, a name, and labkit.json as it stands."""

    unet: UNet
    vae: VAE
    text_encoder: CLIPText
    tokenizer: Tokenizer
    schedule_config: ScheduleConfig
    name: str
    metadata: dict = field(default_factory=dict)


def load_pipeline(name: str | Path, device="cpu", dtype: torch.dtype | None = torch.float32) -> Parts:
    """The parts of the model called `name`: "tabletop", a folder, or a hub id; on `device`, as `dtype` (None: as in the file)."""
    folder = resolve(name, dtype)
    if folder.resolve() == (DATA / "tabletop").resolve():
        verify_sums(folder)
    _check_index(folder)
    unet = _network(folder, "unet", formats.unet_config, UNet, lambda tensors: tensors, device, dtype)
    vae = _network(folder, "vae", formats.vae_config, VAE, formats.vae_names, device, dtype)
    text = _network(folder, "text_encoder", formats.text_config, CLIPText, formats.text_names, device, dtype)
    metadata = read_json(folder / "labkit.json") if (folder / "labkit.json").exists() else {}
    parts = Parts(
        unet,
        vae,
        text,
        Tokenizer.from_folder(folder / "tokenizer", max_length=text.config.max_position_embeddings),
        _in_file(folder / "scheduler" / "scheduler_config.json", formats.schedule_config),
        str(metadata.get("name") or (folder.resolve().name if Path(name).expanduser().is_dir() else name)),
        metadata,
    )
    _fit_together(parts, folder)
    return parts


def save_pipeline(lab, folder: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """Save a LatentDiffusion (or Parts) as a folder that labkit and diffusers open; weights as `dtype`, or as they are.

    The folder appears when it is complete, or not at all. One that exists is replaced only with `overwrite`, and only if it
    holds a model. Raises CheckpointError.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not overwrite:
            raise CheckpointError(f"{folder}: exists already; choose another name, or say overwrite=True.")
        if not (folder / "model_index.json").exists():
            raise CheckpointError(f"{folder}: is not a model (no model_index.json), so it will not be replaced; choose another name.")
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        unfinished.mkdir(parents=True)
        _write_parts(lab, unfinished, dtype)
        _take_the_place(unfinished, folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error}); nothing was changed there.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _check_index(folder: Path) -> None:
    """Raise unless model_index.json is that of a pipeline of Stable Diffusion's kind, made of parts that labkit has."""
    if not (folder / "model_index.json").exists():
        if (folder / "config.json").exists() and (folder.parent / "model_index.json").exists():
            raise CheckpointError(f"{folder}: is one part of a model; give the folder above it, {folder.parent}.")
        raise CheckpointError(f"{folder}: no model_index.json, so this is not a model in the diffusers layout; give the folder that holds it.")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") not in PIPELINES:
        raise CheckpointError(f"{folder}: is a {index.get('_class_name')}; labkit opens {PIPELINES[0]} (Stable Diffusion 1.x and 2.x).")
    for part, kind in KINDS.items():
        found = index.get(part)
        if not isinstance(found, list) or len(found) != 2 or None in found:
            raise CheckpointError(f"{folder / 'model_index.json'}: names no {part}; a complete model has {', '.join(KINDS)}.")
        if part in STEMS and found[1] != kind[1]:
            raise CheckpointError(f"{folder / 'model_index.json'}: {part} is a {found[1]}; labkit has a {kind[1]}.")


def _network(folder: Path, part: str, to_config, build, rename, device, dtype) -> nn.Module:
    config = _in_file(folder / part / "config.json", to_config)
    tensors, path = read_tensors(folder / part, STEMS[part], device, dtype)
    return fill(lambda: build(config), rename(tensors), path)


def _in_file(path: Path, to_config):
    """A config made of a JSON file; whatever is wrong with it is said with the file's name in front."""
    raw = read_json(path)
    try:
        return to_config(raw)
    except (LabkitError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _fit_together(parts: Parts, folder: Path) -> None:
    unet, vae, text = parts.unet.config, parts.vae.config, parts.text_encoder.config
    for found, expected, what in (
        (unet.in_channels, vae.latent_channels, "channels go into the U-Net, but the VAE's latents have"),
        (unet.out_channels, vae.latent_channels, "channels come out of the U-Net, but the VAE's latents have"),
        (unet.cross_attention_dim, text.hidden_size, "numbers per token are what the U-Net reads, but the text encoder gives"),
    ):
        if found != expected:
            raise CheckpointError(f"{folder}: {found} {what} {expected}; these parts are of different models (or of one for inpainting).")
    largest = max(parts.tokenizer.vocab.values())
    if largest >= text.vocab_size:
        raise CheckpointError(f"{folder}: the tokenizer goes up to token {largest}, the text encoder knows {text.vocab_size}; they do not belong together.")


def _write_parts(lab, folder: Path, dtype: torch.dtype | None) -> None:
    tok = lab.tokenizer
    text = formats.text_to_transformers(lab.text_encoder.config, tok.bos_id, tok.eos_id, tok.pad_id)
    write_json(formats.unet_to_diffusers(lab.unet.config), folder / "unet" / "config.json")
    write_json(formats.vae_to_diffusers(lab.vae.config), folder / "vae" / "config.json")
    write_json(text, folder / "text_encoder" / "config.json")
    write_json(formats.schedule_to_diffusers(lab.schedule_config), folder / "scheduler" / "scheduler_config.json")
    tok.save_folder(folder / "tokenizer")
    for part, rename in (("unet", dict), ("vae", dict), ("text_encoder", formats.text_names_saved)):
        tensors = rename(getattr(lab, part).state_dict())
        write_safetensors(tensors, folder / part / f"{STEMS[part]}.safetensors", dtype)
    absent = {part: [None, None] for part in ("safety_checker", "feature_extractor", "image_encoder")}
    # the oldest diffusers that labkit is tested to agree with; diffusers itself is never imported here
    index = {"_class_name": PIPELINES[0], "_diffusers_version": "0.38.0", "requires_safety_checker": False}
    write_json({**index, **KINDS, **absent}, folder / "model_index.json")
    write_json({**(getattr(lab, "metadata", None) or {}), "name": lab.name}, folder / "labkit.json")


def _take_the_place(unfinished: Path, folder: Path) -> None:
    """Rename; a folder that is there already is set aside first, and put back if the renaming fails."""
    if not folder.exists():
        unfinished.rename(folder)
        return
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.old"
    folder.rename(aside)
    try:
        unfinished.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
