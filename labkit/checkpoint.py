"""Opening and saving whole models, in the folder layout that diffusers reads and writes.

    model_index.json                              which part is of which kind
    unet/ vae/        config.json, diffusion_pytorch_model.safetensors
    text_encoder/     config.json, model.safetensors          SDXL also has a text_encoder_2/ (its refiner has only that one)
    tokenizer/        vocab.json, merges.txt, ...             and a tokenizer_2/
    scheduler/        scheduler_config.json       the noise schedule
    labkit.json                                   ours, optional: name, defaults, closed vocabulary

Loading is strict: every parameter is read, by name, in its shape, or an error of one line says which is not and what to do. It
opens safetensors only, which run no code. Saving writes everything into a folder beside the wanted one, which takes its name
only when all of it is there. Nothing is fetched unless the name is a hub id, and then only what is needed, and only once.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from labkit.device import vae_dtype
from labkit.errors import CheckpointError, LabkitError
from labkit.models import formats
from labkit.models.clip import CLIPText
from labkit.models.files import fill, write_json, write_safetensors
from labkit.models.folder import Folder
from labkit.models.original_layout import OneFile
from labkit.models.single_file import open_one_file
from labkit.models.sources import DATA, STEMS, resolve, verify_sums, write_sums
from labkit.models.tokenizer import Tokenizer
from labkit.models.unet import UNet
from labkit.models.vae import VAE
from labkit.models.whole import whole_folder
from labkit.schedule import Schedule, ScheduleConfig

__all__ = ["Parts", "load_pipeline", "save_pipeline", "resolve", "verify_sums", "write_sums"]

KINDS = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}
SECOND = {"text_encoder_2": ["transformers", formats.WITH_PROJECTION], "tokenizer_2": ["transformers", "CLIPTokenizer"]}  # SDXL
PIPELINES = tuple(f"StableDiffusion{xl}{task}Pipeline" for xl in ("", "XL") for task in ("", "Img2Img", "Inpaint"))


@dataclass(frozen=True)
class Parts:
    """What a checkpoint holds: the networks, tokenizers, the noise schedule, a name, and labkit.json as it stands.

    SDXL has two text encoders. Its refiner has one, which is `text_encoder` here, though its folder is text_encoder_2.
    `force_zeros`: an empty negative prompt is zeros in place of states (model_index.json: force_zeros_for_empty_prompt).
    """

    unet: UNet
    vae: VAE
    text_encoder: CLIPText
    tokenizer: Tokenizer
    schedule_config: ScheduleConfig
    name: str
    metadata: dict = field(default_factory=dict)
    text_encoder_2: CLIPText | None = None
    tokenizer_2: Tokenizer | None = None
    force_zeros: bool = False


def load_pipeline(
    name: str | Path, device="cpu", dtype: torch.dtype | None = torch.float32, variant: str | None = None, check: bool = False, **one_file
) -> Parts:
    """The parts of the model called `name`: "tabletop", a folder, one file, or a hub id; on `device`, as `dtype` (None: as in the file).

    `variant` asks for one set of weights by name ("fp16"); raises CheckpointError, which lists what there is, if one part has none.
    Weights that are in the wanted type already are views of the mapped file and are not read before they are used (models/files.py says
    what that means); with `check` all are read, and NaN or infinity in them is a CheckpointError. What is converted is always checked.
    `one_file` are the options of `open_one_file`, for a checkpoint of one file: ema, prediction_type, tokenizer.
    """
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"\w+", variant)):
        raise CheckpointError(f"variant is {variant!r}; give a name such as 'fp16', or None.")
    path = resolve(name, dtype, variant)
    if one_file and path.is_dir():
        raise CheckpointError(f"{path}: {', '.join(one_file)} is for a checkpoint of one file; in a folder its own files say it.")
    if variant is not None and path.is_file():
        raise CheckpointError(f"{path}: variant is for folders, which may hold several sets of weights; this is one file, load it without.")
    if path.resolve() == (DATA / "tabletop").resolve():
        verify_sums(path)
    source = open_one_file(path, **one_file, check=check) if path.is_file() else Folder(path, variant, check)
    index = _check_index(source)

    def network(part: str, config, build, rename, dtype=dtype) -> nn.Module:
        table, file = source.tensors(part, "meta", dtype)
        return fill(lambda: build(config), rename(table), lambda: rename(source.tensors(part, device, dtype)[0]), file)

    def text(part: str) -> tuple[CLIPText, Tokenizer]:
        config = _in_file(source, part, lambda raw: formats.text_config(raw, index[part][1]))
        return network(part, config, CLIPText, formats.text_names), source.tokenizer(part, config.max_position_embeddings)

    vae_config = _in_file(source, "vae", formats.vae_config)
    unet = network("unet", _in_file(source, "unet", formats.unet_config), UNet, dict)
    vae = network("vae", vae_config, VAE, formats.vae_names, vae_dtype(dtype, vae_config.force_upcast))
    texts = [text(part) for part in ("text_encoder", "text_encoder_2") if part in index]
    metadata = _checked_metadata(source)
    parts = Parts(
        unet,
        vae,
        *texts[0],
        _in_file(source, "scheduler", lambda raw: Schedule(formats.schedule_config(raw)).config),  # its tables can be made
        str(metadata.get("name") or _called(name, path)),
        metadata,
        *(texts[1] if texts[1:] else (None, None)),
        force_zeros="text_encoder_2" in index and bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    _fit_together(parts, path)
    return parts


def save_pipeline(lab, folder: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """Save a LatentDiffusion (or Parts) as a folder that labkit and diffusers open; weights as `dtype`, or as they are.

    The folder appears when it is complete, or not at all. One that exists is replaced only with `overwrite`, and only if it
    holds a model. Raises CheckpointError.
    """
    folder = Path(folder).absolute()
    with whole_folder(folder, overwrite) as unfinished:
        _write_parts(lab, unfinished, dtype)
    return folder


def _called(name: str | Path, path: Path) -> str:
    """What a model without a name of its own is called: its file, its folder, or the hub id it was asked for by."""
    if path.is_file():
        return path.stem
    return path.resolve().name if Path(os.path.expanduser(name)).is_dir() else str(name)


def _check_index(source: Folder | OneFile) -> dict:
    """model_index.json without the parts that are absent; raises unless it is of Stable Diffusion's kind, made of parts labkit has."""
    raw, folder = source.index(), source.path
    if raw.get("_class_name") not in PIPELINES:
        kind = f"{folder / 'model_index.json'}: is of a {raw.get('_class_name')}"
        raise CheckpointError(f"{kind}; labkit opens StableDiffusionPipeline (1.x, 2.x), StableDiffusionXLPipeline and kin.")
    index, kinds = {key: value for key, value in raw.items() if value not in (None, [None, None])}, KINDS
    if "XL" in raw["_class_name"]:
        kinds = {**KINDS, **SECOND}
        if not {"text_encoder", "tokenizer"} & set(index):  # the refiner
            kinds = {part: kind for part, kind in kinds.items() if part not in ("text_encoder", "tokenizer")}
    for part, kind in kinds.items():
        found = index.get(part)
        if not isinstance(found, list) or len(found) != 2 or None in found:
            raise CheckpointError(f"{folder / 'model_index.json'}: names no {part}; a complete model has {', '.join(kinds)}.")
        if part in STEMS and found[1] != kind[1]:
            raise CheckpointError(f"{folder / 'model_index.json'}: {part} is a {found[1]}; labkit has a {kind[1]}.")
    return {key: value for key, value in index.items() if key in kinds or key not in {**KINDS, **SECOND}}


def _in_file(source: Folder | OneFile, part: str, to_config):
    """A config made of a part's JSON file; whatever is wrong with it is said with the file's name in front."""
    raw = source.config(part)
    try:
        return to_config(raw)
    except (LabkitError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{source.where(part)}: {error}") from None


def _checked_metadata(source: Folder | OneFile) -> dict:
    """labkit.json, in which "defaults" is a table and "vocabulary" a list of words; {} without one."""
    metadata = source.metadata()
    for key, kind, what in (("defaults", dict, "a table of options"), ("vocabulary", list, "a list of words")):
        if metadata.get(key) is not None and not isinstance(metadata[key], kind):
            raise CheckpointError(f"{source.path / 'labkit.json'}: {key} is {metadata[key]!r}; {what} is expected.")
    if not all(isinstance(word, str) for word in metadata.get("vocabulary") or ()):
        raise CheckpointError(f"{source.path / 'labkit.json'}: vocabulary must be a list of words.")
    return metadata


def _texts(lab) -> list[tuple[str, CLIPText, Tokenizer]]:
    """The text encoders with their tokenizers and the ending of their folders' names: "", and "_2" for one with a projection."""
    first = ("_2" if lab.text_encoder.config.projection_dim else "", lab.text_encoder, lab.tokenizer)
    second = getattr(lab, "text_encoder_2", None)
    return [first] if second is None else [first, ("_2", second, lab.tokenizer_2)]


def _fit_together(parts: Parts, folder: Path) -> None:
    unet, latent, texts = parts.unet.config, parts.vae.config.latent_channels, _texts(parts)
    width = sum(encoder.config.hidden_size for _, encoder, _ in texts)
    pooled, per_size, told = texts[-1][1].config.projection_dim, unet.addition_time_embed_dim, unet.projection_class_embeddings_input_dim
    for found, expected, what in (
        (unet.in_channels, (latent, 2 * latent + 1), "channels go into the U-Net, but the VAE's latents have"),  # 2 n + 1: inpainting
        (unet.out_channels, (latent,), "channels come out of the U-Net, but the VAE's latents have"),
        (unet.cross_attention_dim, (width,), "numbers per token are what the U-Net reads, but the text encoder gives"),
    ):
        if found not in expected:
            raise CheckpointError(f"{folder}: {found} {what} {expected[0]}; these parts are of different models.")
    if bool(pooled) != bool(per_size) or (pooled and told - pooled not in (5 * per_size, 6 * per_size)):
        raise CheckpointError(
            f"{folder}: the U-Net reads {told or 'no'} numbers beside the text states, the text encoder gives {pooled or 'no'} and the sizes five or six "
            f"times {per_size or 0}; these parts are of different models."
        )
    for _, encoder, tokenizer in texts:
        largest, known = max(tokenizer.vocab.values()), encoder.config.vocab_size
        if largest >= known:
            raise CheckpointError(f"{folder}: the tokenizer goes up to token {largest}, the text encoder knows {known}; they do not belong together.")
    if len({tokenizer.max_length for _, _, tokenizer in texts}) > 1:
        raise CheckpointError(f"{folder}: the two tokenizers make sequences of different lengths; they do not belong together.")


def _write_parts(lab, folder: Path, dtype: torch.dtype | None) -> None:
    write_json(formats.unet_to_diffusers(lab.unet.config), folder / "unet" / "config.json")
    write_json(formats.vae_to_diffusers(lab.vae.config), folder / "vae" / "config.json")
    write_json(formats.schedule_to_diffusers(lab.schedule_config), folder / "scheduler" / "scheduler_config.json")
    for part in ("unet", "vae"):
        write_safetensors(getattr(lab, part).state_dict(), folder / part / f"{STEMS[part]}.safetensors", dtype)
    for end, encoder, tok in _texts(lab):
        config = formats.text_to_transformers(encoder.config, tok.bos_id, tok.eos_id, tok.pad_id)
        write_json(config, folder / f"text_encoder{end}" / "config.json")
        tensors = formats.text_names_saved(encoder.state_dict())
        write_safetensors(tensors, folder / f"text_encoder{end}" / f"{STEMS['text_encoder']}.safetensors", dtype)
        tok.save_folder(folder / f"tokenizer{end}")
    write_json(_index(lab), folder / "model_index.json")
    write_json({**(getattr(lab, "metadata", None) or {}), "name": lab.name}, folder / "labkit.json")


def _index(lab) -> dict:
    """model_index.json: the pipeline of diffusers that these parts make, and the classes of the parts."""
    texts, unet = _texts(lab), lab.unet.config
    inpaint = "Inpaint" if unet.in_channels != unet.out_channels else ""
    # the oldest diffusers that labkit is tested to agree with; diffusers itself is never imported here
    index = {"_diffusers_version": "0.38.0", **{part: KINDS[part] for part in ("unet", "vae", "scheduler")}}
    for end, encoder, _ in texts:
        index[f"text_encoder{end}"] = ["transformers", formats.text_kind(encoder.config)]
        index[f"tokenizer{end}"] = KINDS["tokenizer"]
    absent = {part: [None, None] for part in ("feature_extractor", "image_encoder")}
    if not unet.addition_time_embed_dim:
        absent |= {"safety_checker": [None, None], "requires_safety_checker": False}
        return {"_class_name": f"StableDiffusion{inpaint}Pipeline", **index, **absent}
    if len(texts) == 1:
        absent |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    index["force_zeros_for_empty_prompt"] = getattr(lab, "force_zeros", False)
    scored = unet.projection_class_embeddings_input_dim == texts[-1][1].config.projection_dim + 5 * unet.addition_time_embed_dim
    if scored or inpaint:
        index["requires_aesthetics_score"] = scored
    return {"_class_name": f"StableDiffusionXL{inpaint or ('Img2Img' if scored else '')}Pipeline", **index, **absent}
