"""The published file formats: diffusers' and transformers' config.json as our configs, their parameter names as ours.

Our modules say in one way what the libraries can be configured to do in many. A field of theirs is therefore either one that
our config has, or one that must have the only value our modules implement, or one that changes nothing in the numbers. Anything
else is an error that names the field, so that no checkpoint is ever run by the wrong network.
"""

from typing import Any

from torch import Tensor

from labkit.errors import CheckpointError
from labkit.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from labkit.schedule import BETA_SCHEDULES, PREDICTION_TYPES, SPACINGS, ScheduleConfig

# What our modules do, in diffusers' words; a field that is absent has the same value by default.
UNET_FIXED = {
    "act_fn": "silu", "attention_type": "default", "center_input_sample": False, "class_embeddings_concat": False, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "resnet_out_scale_factor": 1.0, "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional", "transformer_layers_per_block": 1,
}  # fmt: skip
UNET_IGNORED = {"upcast_attention", "dropout", "addition_embed_type_num_heads"}  # of float16, of training, of a part that is not there
VAE_FIXED = {"act_fn": "silu", "mid_block_add_attention": True, "use_post_quant_conv": True, "use_quant_conv": True}
VAE_IGNORED = {"force_upcast"}
# The VAE's attention had other names up to diffusers 0.17, and the published files of SD 1.x and 2.x still have them.
VAE_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def unet_config(raw: dict) -> UNetConfig:
    """config.json of a UNet2DConditionModel -> UNetConfig."""
    types = raw.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    ups = raw.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    used = {"sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block"}
    used |= {"norm_num_groups", "cross_attention_dim", "attention_head_dim", "num_attention_heads", "use_linear_projection"}
    _check(raw, "UNet2DConditionModel", used, UNET_FIXED, UNET_IGNORED)
    known = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    if not isinstance(types, list) or any(t not in known for t in types):
        raise CheckpointError(f"down_block_types is {types}; labkit's U-Net is made of {' and '.join(known)}.")
    if ups != [known[t] for t in reversed(types)]:
        raise CheckpointError(f"up_block_types is {ups}; it must mirror down_block_types {types}.")
    widths = _ints(raw, "block_out_channels", (320, 640, 1280, 1280), len(types))
    # diffusers' attention_head_dim is, by an old mistake, the number of heads
    heads = "num_attention_heads" if raw.get("num_attention_heads") is not None else "attention_head_dim"
    return UNetConfig(
        block_out_channels=widths,
        cross_attention=tuple(t.startswith("CrossAttn") for t in types),
        num_attention_heads=_ints(raw, heads, 8, len(types)),
        layers_per_block=_int(raw, "layers_per_block", 2, 32),
        cross_attention_dim=_int(raw, "cross_attention_dim", 1280),
        in_channels=_int(raw, "in_channels", 4),
        out_channels=_int(raw, "out_channels", 4),
        norm_num_groups=_int(raw, "norm_num_groups", 32),
        use_linear_projection=bool(raw.get("use_linear_projection", False)),
        sample_size=_int(raw, "sample_size", 64),
    )


def unet_to_diffusers(config: UNetConfig) -> dict:
    """UNetConfig -> config.json of a UNet2DConditionModel."""
    return {
        **UNET_FIXED,
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.cross_attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.cross_attention)],
        "attention_head_dim": list(config.num_attention_heads),
        **{f: getattr(config, f) for f in ("layers_per_block", "cross_attention_dim", "in_channels", "out_channels")},
        **{f: getattr(config, f) for f in ("norm_num_groups", "use_linear_projection", "sample_size")},
    }


VAE_FIELDS = ("layers_per_block", "in_channels", "out_channels", "latent_channels", "norm_num_groups", "scaling_factor", "sample_size")


def vae_config(raw: dict) -> VAEConfig:
    """config.json of an AutoencoderKL -> VAEConfig."""
    _check(raw, "AutoencoderKL", {*VAE_FIELDS, "block_out_channels", "down_block_types", "up_block_types"}, VAE_FIXED, VAE_IGNORED)
    widths = raw.get("block_out_channels", [64])
    for field, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if raw.get(field, [block]) != [block] * (len(widths) if isinstance(widths, list) else 1):
            raise CheckpointError(f"{field} is {raw.get(field)}; labkit's VAE is made of {block}, one for each of block_out_channels.")
    scale = raw.get("scaling_factor", 0.18215)
    if not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise CheckpointError(f"scaling_factor is {scale!r}; a positive number is expected.")
    return VAEConfig(
        block_out_channels=_ints(raw, "block_out_channels", (64,), len(widths) if isinstance(widths, list) else 1),
        layers_per_block=_int(raw, "layers_per_block", 1, 32),
        in_channels=_int(raw, "in_channels", 3),
        out_channels=_int(raw, "out_channels", 3),
        latent_channels=_int(raw, "latent_channels", 4),
        norm_num_groups=_int(raw, "norm_num_groups", 32),
        scaling_factor=float(scale),
        sample_size=_int(raw, "sample_size", 32),
    )


def vae_to_diffusers(config: VAEConfig) -> dict:
    """VAEConfig -> config.json of an AutoencoderKL."""
    n = len(config.block_out_channels)
    return {
        **VAE_FIXED,
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
        **{f: getattr(config, f) for f in VAE_FIELDS},
    }


def text_config(raw: dict) -> CLIPTextConfig:
    """config.json of a CLIPTextModel -> CLIPTextConfig; transformers' defaults are those of CLIP ViT-B/32."""
    if raw.get("model_type", "clip_text_model") != "clip_text_model":
        raise CheckpointError(f"model_type is {raw['model_type']!r}; labkit's text encoder is a clip_text_model.")
    if raw.get("architectures") not in (None, [], ["CLIPTextModel"]):
        raise CheckpointError(f"architectures is {raw['architectures']}; labkit's text encoder is a CLIPTextModel.")
    if raw.get("layer_norm_eps", 1e-5) != 1e-5:
        raise CheckpointError(f"layer_norm_eps is {raw['layer_norm_eps']}; labkit's text encoder has 1e-05.")
    return CLIPTextConfig(
        vocab_size=_int(raw, "vocab_size", 49408, 10**7),
        max_position_embeddings=_int(raw, "max_position_embeddings", 77),
        hidden_size=_int(raw, "hidden_size", 512),
        intermediate_size=_int(raw, "intermediate_size", 2048),
        num_hidden_layers=_int(raw, "num_hidden_layers", 12, 512),
        num_attention_heads=_int(raw, "num_attention_heads", 8),
        hidden_act=str(raw.get("hidden_act", "quick_gelu")),
    )


def text_to_transformers(config: CLIPTextConfig, bos: int, eos: int, pad: int) -> dict:
    """CLIPTextConfig -> config.json of a CLIPTextModel."""
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "layer_norm_eps": 1e-5, **vars(config), **ids}


def schedule_config(raw: dict) -> ScheduleConfig:
    """scheduler_config.json of any scheduler -> ScheduleConfig, as DDIMScheduler.from_config would read it (its defaults included).

    Which sampler the file names does not matter, only the noise schedule. `clip_sample` is not looked at: diffusers' pipelines
    switch it off, for latents are not confined to [-1, 1].
    """
    for field in ("trained_betas", "thresholding"):
        if raw.get(field):
            raise CheckpointError(f"{field} is {str(raw[field])[:40]}; labkit's schedules do not have that.")
    config = ScheduleConfig(
        num_train_timesteps=_int(raw, "num_train_timesteps", 1000),
        beta_start=float(raw.get("beta_start", 0.0001)),
        beta_end=float(raw.get("beta_end", 0.02)),
        beta_schedule=raw.get("beta_schedule", "linear"),
        prediction_type=raw.get("prediction_type", "epsilon"),
        timestep_spacing=raw.get("timestep_spacing", "leading"),
        steps_offset=_int(raw, "steps_offset", 0, low=0),
        set_alpha_to_one=bool(raw.get("set_alpha_to_one", True)),
        rescale_betas_zero_snr=bool(raw.get("rescale_betas_zero_snr", False)),
    )
    for field, known in (("beta_schedule", BETA_SCHEDULES), ("prediction_type", PREDICTION_TYPES), ("timestep_spacing", SPACINGS)):
        if getattr(config, field) not in known:
            raise CheckpointError(f"{field} is {getattr(config, field)!r}; labkit knows {', '.join(known)}.")
    return config


def schedule_to_diffusers(config: ScheduleConfig) -> dict:
    """ScheduleConfig -> scheduler_config.json of a DDIMScheduler."""
    return {"_class_name": "DDIMScheduler", "clip_sample": False, "thresholding": False, **vars(config)}


def vae_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an AutoencoderKL file under our names: those of the middle attention have changed over the years."""

    def ours(name: str) -> str:
        where, _, last = name.rpartition(".")
        before, _, part = where.rpartition(".")
        return f"{before}.{VAE_OLD_NAMES[part]}.{last}" if ".attentions." in name and part in VAE_OLD_NAMES else name

    return {ours(name): tensor for name, tensor in tensors.items()}


def text_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a CLIPTextModel file under our names: without "text_model.", and without the table 0, 1, 2, ... of old files."""
    named = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    named.pop("embeddings.position_ids", None)
    return named


def text_names_saved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back: with "text_model.", which every published file has and every version of transformers reads."""
    return {f"text_model.{name}": tensor for name, tensor in tensors.items()}


def _check(raw: dict, kind: str, used: set[str], fixed: dict[str, Any], ignored: set[str]) -> None:
    if raw.get("_class_name", kind) != kind:
        raise CheckpointError(f"it describes a {raw['_class_name']}; labkit has a {kind}.")
    for field, value in raw.items():
        if field.startswith("_") or field in used | ignored or field in fixed and value == fixed[field]:
            continue
        if field in fixed and not (field == "transformer_layers_per_block" and isinstance(value, list) and set(value) == {1}):
            raise CheckpointError(f"{field} is {value!r}; labkit's {kind} has {fixed[field]!r} only.")
        if field not in fixed and value not in (None, False):
            raise CheckpointError(f"{field} is {value!r}; labkit's {kind} does not have that.")


def _int(raw: dict, field: str, default: int, high: int = 10**6, low: int = 1) -> int:
    value = default if raw.get(field) is None else raw[field]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise CheckpointError(f"{field} is {value!r}; an integer from {low} to {high} is expected.")
    return value


def _ints(raw: dict, field: str, default, n: int) -> tuple[int, ...]:
    """A field that is one integer for all resolutions or a list with one for each."""
    value = default if raw.get(field) is None else raw[field]
    values = [value] * n if isinstance(value, int) else list(value) if isinstance(value, (list, tuple)) else []
    if len(values) != n or n > 16:
        raise CheckpointError(f"{field} is {value!r}; {n} integers are expected, one for each resolution.")
    return tuple(_int({field: v}, field, 0, 65536) for v in values)
