"""The original one-file layout of Stable Diffusion: which model it is, and its parts as if they lay in a diffusers folder.

    model.diffusion_model.*                        the U-Net; a moving average of it may be kept beside it as model_ema.*
    first_stage_model.*                            the VAE
    cond_stage_model.transformer.*                 SD 1.x: CLIP ViT-L
    cond_stage_model.model.*                       SD 2.x: OpenCLIP ViT-H, of which the last layer is not used
    conditioner.embedders.0.transformer.*, .1.model.*    SDXL: CLIP ViT-L and OpenCLIP ViT-bigG; its refiner has embedders.0.model.* only

The file has no configuration. Names and shapes tell which of these it is, and every width, depth and number of blocks; what they cannot
tell (heads, the VAE's scale, the noise schedule) is that of the published model, in FAMILIES. Two things are told by neither and are
options: what the network predicts (`prediction_type`), and the vocabulary of the tokenizer, which is not in the file.
Layout: CompVis/latent-diffusion, Stability-AI/stablediffusion, Stability-AI/generative-models (Rombach 2022, Podell 2023).
"""

import math
import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from labkit.errors import CheckpointError
from labkit.models.files import few, read_safetensors
from labkit.models.header import read_header
from labkit.models.original_layout import LEFT_OUT, UNET, VAE, Family, OneFile
from labkit.models.original_names import ema_name
from labkit.schedule import PREDICTION_TYPES

FAMILIES = (
    Family("Stable Diffusion 1.x", {"text_encoder": "cond_stage_model.transformer."}, "", 512, heads=8),
    Family("Stable Diffusion 2.x", {"text_encoder": "cond_stage_model.model."}, "", 768),
    Family("SDXL", {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."}, "XL", 1024, 0.13025),
    Family("the SDXL refiner", {"text_encoder_2": "conditioner.embedders.0.model."}, "XLImg2Img", 1024, 0.13025),
)
OTHERS = (  # what else comes as one .safetensors file, by what a name of it has
    ("lora", "it is a LoRA, a change to a model and not a model; load the model it was made for"),
    (r"^control_model\.", "it is a ControlNet, which steers a model and is not one"),
    (r"joint_blocks\.", "it is Stable Diffusion 3, which has no U-Net"),
    (r"double_blocks\.", "it is Flux, which has no U-Net"),
    (r"^down_blocks\.", "it is one part of a model in the diffusers layout; load the folder that holds model_index.json"),
    (r"^text_model\.", "it is a text encoder by itself; load the folder that holds model_index.json"),
    (r"^encoder\.down\.", "it is a VAE by itself; load a whole model"),
)
NOT_STANDARD = (  # models of the same layout that do something else, by a name in them
    ("edm_mean", "was trained with EDM's noise (Playground 2.5), which labkit's schedules do not have"),
    ("edm_vpred.", "was trained with EDM's noise (CosXL), which labkit's schedules do not have"),
    ("depth_model.", "reads a depth map beside the text (SD 2 depth), which labkit's U-Net does not"),
    ("embedder.", "reads an image embedding beside the text (unCLIP), which labkit's U-Net does not"),
    ("noise_augmentor.", "reads an image embedding beside the text (unCLIP), which labkit's U-Net does not"),
    ("low_scale_model.", "enlarges pictures (the x4 upscaler), which labkit does not"),
)
SPARE = ("cond_stage_model.logit_scale", "cond_stage_model.text_projection", "cond_stage_model.transformer.logit_scale")  # of the wrappers


def open_one_file(
    path: str | Path, ema: bool = False, prediction_type: str | None = None, tokenizer: str | Path | None = None, check: bool = False
) -> OneFile:
    """A one-file `.safetensors` checkpoint; only its header is read. Raises CheckpointError.

    `ema`: the U-Net's moving average in place of its last weights, where the file has both (it is the better for drawing, the other
    for further training). `prediction_type`: "epsilon" or "v_prediction"; None takes what marks the file has (see `recognise`).
    `check`: tensors that hold NaN or infinity are refused when they are read.
    """
    path = Path(path)
    entries = read_header(path)

    def read(wanted, device, dtype):
        return read_safetensors(path, device, dtype, wanted, check)

    counted = "global_step" in entries and math.prod(entries["global_step"].shape) == 1
    step = read_safetensors(path, names=["global_step"])["global_step"] if counted else None
    return recognise(path, {name: entry.empty() for name, entry in entries.items()}, read, step, ema, prediction_type, tokenizer)


def recognise(path, table, read, global_step=None, ema=False, prediction_type=None, tokenizer=None) -> OneFile:
    """The OneFile of a table of names and shapes: which model it is, and that it is whole. Raises CheckpointError.

    What an SD 2.x network predicts cannot be seen in its weights: v, as the 768-pixel models do, unless the file's `global_step` is
    875000 (2-base) or it is for inpainting (9 channels), which predict eps. For 2.1-base say prediction_type="epsilon". The others
    predict eps unless a tensor `v_pred` marks them, as fine-tuned SDXL models do. `ztsnr` marks a last timestep that is all noise, which says
    something for a network that predicts v only (eps there tells nothing of x0). ComfyUI and its kin go by these two; diffusers by neither.
    """
    found = [f for f in FAMILIES if all(any(name.startswith(prefix) for name in table) for prefix in f.texts.values())]
    if any(name.startswith(UNET) for name in table):
        for mark, what in NOT_STANDARD:
            if any(name.startswith(mark) for name in table):
                raise CheckpointError(f"{path}: is a model that {what}.")
    lacking = [f"{what} ({prefix}*)" for what, prefix in (("U-Net", UNET), ("VAE", VAE)) if not any(name.startswith(prefix) for name in table)]
    lacking += ["text encoder (cond_stage_model.* or conditioner.*)"] if not found else []
    if lacking:
        what = next((what for mark, what in OTHERS if any(re.search(mark, name) for name in table)), None)
        what = what or f"it holds no {', no '.join(lacking)}; a checkpoint with all parts is needed (its names are {few(sorted(table)) or 'none'})"
        raise CheckpointError(f"{path}: not a whole Stable Diffusion model in the original one-file layout: {what}.")
    family, known = found[-1], (UNET, VAE, *found[-1].texts.values())
    if unknown := [name for name in table if not name.startswith(known) and not LEFT_OUT.fullmatch(name) and name not in SPARE]:
        raise CheckpointError(f"{path}: is {family.name}, but holds {len(unknown)} tensors that do not belong to it ({few(unknown)}); get another file.")
    if prediction_type not in (None, *PREDICTION_TYPES[:2]):
        raise CheckpointError(f"prediction_type is {prediction_type!r}; give one of {', '.join(PREDICTION_TYPES[:2])}.")
    one = OneFile(Path(path), family, table, read, "epsilon", ema=ema, vocabulary=tokenizer)
    channels = one.size(UNET + "input_blocks.0.0.weight", 1)
    if channels not in (4, 9):
        raise CheckpointError(f"{path}: its U-Net reads {channels} channels; labkit opens models of 4, and of 9 (inpainting).")
    of_v = "v_pred" in table or family.name == "Stable Diffusion 2.x" and channels == 4 and _number(global_step) != 875000
    predicts = prediction_type or ("v_prediction" if of_v else "epsilon")
    one = replace(one, prediction_type=predicts, zero_snr=predicts == "v_prediction" and "ztsnr" in table)
    _check_whole(one)
    return one


def _check_whole(one: OneFile) -> None:
    """Raise unless U-Net and text encoders are of one model, and the moving average is there if it is asked for."""
    reads, width = one.config("unet")["cross_attention_dim"], sum(one.config(part)["hidden_size"] for part in one.family.texts)
    if reads != width:
        raise CheckpointError(f"{one.path}: its U-Net reads {reads} numbers per token, its text encoding has {width}; it is a mixture of two models.")
    if ("label_emb.0.0.weight" in {n.removeprefix(UNET) for n in one.table}) != ("XL" in one.family.pipeline):
        raise CheckpointError(f"{one.path}: has the text encoder of {one.family.name}, but not its U-Net (label_emb); labkit does not open it.")
    weights = [name for name in one.table if name.startswith(UNET)]
    if one.ema and (missing := [ema_name(name) for name in weights if ema_name(name) not in one.table]):
        if len(missing) == len(weights):
            raise CheckpointError(f"{one.path}: holds no moving average (model_ema.*); leave ema out, its weights may be the average already.")
        raise CheckpointError(f"{one.path}: its moving average lacks {len(missing)} parameters ({few(missing)}); it is not complete, fetch it again.")


def _number(value) -> int | None:
    if isinstance(value, Tensor):
        return int(value) if value.numel() == 1 and not value.is_floating_point() else None
    return value if isinstance(value, int) else None
