"""The published file formats: diffusers' and transformers' config.json as our configs, their parameter names as ours.

Our modules say in one way what the libraries can be configured to do in many; which fields that leaves is in `fields`.
"""

from torch import Tensor

from labkit.errors import CheckpointError
from labkit.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from labkit.models.fields import (
    SCHEDULE_IGNORED, SCHEDULE_OFF, SCHEDULERS, TEXT_FIXED, TEXT_IGNORED, TEXT_OFF, UNET_FIXED, UNET_IGNORED, UNET_OFF, VAE_FIXED, VAE_OFF,
    check_fields, integer, integers, number, truth,
)  # fmt: skip
from labkit.schedule import BETA_SCHEDULES, PREDICTION_TYPES, SPACINGS, ScheduleConfig

ADDED = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
WITH_PROJECTION = "CLIPTextModelWithProjection"
# The VAE's attention had other names up to diffusers 0.17, and the published files of SD 1.x and 2.x still have them.
VAE_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def unet_config(raw: dict) -> UNetConfig:
    """config.json of a UNet2DConditionModel -> UNetConfig."""
    types = raw.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    ups = raw.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    used = {"sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block"}
    used |= {"norm_num_groups", "cross_attention_dim", "attention_head_dim", "num_attention_heads", "use_linear_projection"}
    used |= {"transformer_layers_per_block", "addition_embed_type", "upcast_attention", *ADDED}
    check_fields(raw, "UNet2DConditionModel", used, UNET_FIXED, UNET_OFF, UNET_IGNORED)
    known = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    if not isinstance(types, list) or any(t not in known for t in types):
        raise CheckpointError(f"down_block_types is {types}; labkit's U-Net is made of {' and '.join(known)}.")
    if ups != [known[t] for t in reversed(types)]:
        raise CheckpointError(f"up_block_types is {ups}; it must mirror down_block_types {types}.")
    widths = integers(raw, "block_out_channels", (320, 640, 1280, 1280), len(types))
    if raw.get("addition_embed_type") not in (None, "text_time"):
        raise CheckpointError(f"addition_embed_type is {raw['addition_embed_type']!r}; labkit's U-Net has 'text_time' (SDXL) or none.")
    added = raw.get("addition_embed_type") == "text_time"
    depths = integers(raw, "transformer_layers_per_block", 1, len(types), 64)
    if (blocks := (2 * integer(raw, "layers_per_block", 2, 16) + 1) * sum(depths)) > 1000:  # SDXL: 65; building millions would take for ever
        raise CheckpointError(f"transformer_layers_per_block and layers_per_block make {blocks} transformers; 1000 at most are built.")
    # diffusers' attention_head_dim is, by an old mistake, the number of heads
    heads = "num_attention_heads" if raw.get("num_attention_heads") is not None else "attention_head_dim"
    return UNetConfig(
        block_out_channels=widths,
        cross_attention=tuple(t.startswith("CrossAttn") for t in types),
        num_attention_heads=integers(raw, heads, 8, len(types)),
        layers_per_block=integer(raw, "layers_per_block", 2, 16),
        cross_attention_dim=integer(raw, "cross_attention_dim", 1280),
        in_channels=integer(raw, "in_channels", 4),
        out_channels=integer(raw, "out_channels", 4),
        norm_num_groups=integer(raw, "norm_num_groups", 32),
        use_linear_projection=truth(raw, "use_linear_projection", False),
        sample_size=integer(raw, "sample_size", 64),
        transformer_layers_per_block=depths[0] if len(set(depths)) == 1 else depths,
        **{field: integer(raw, field, 0) if added else None for field in ADDED},
        upcast_attention=truth(raw, "upcast_attention", False),
    )


def unet_to_diffusers(config: UNetConfig) -> dict:
    """UNetConfig -> config.json of a UNet2DConditionModel."""
    depths = config.transformer_layers_per_block
    return {
        **UNET_FIXED,
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.cross_attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.cross_attention)],
        "attention_head_dim": list(config.num_attention_heads),
        **{f: getattr(config, f) for f in ("layers_per_block", "cross_attention_dim", "in_channels", "out_channels")},
        **{f: getattr(config, f) for f in ("norm_num_groups", "use_linear_projection", "sample_size", "upcast_attention", *ADDED)},
        "addition_embed_type": "text_time" if config.addition_time_embed_dim else None,
        "transformer_layers_per_block": depths if isinstance(depths, int) else list(depths),
    }


VAE_FIELDS = ("layers_per_block", "in_channels", "out_channels", "latent_channels", "norm_num_groups", "scaling_factor", "sample_size")
VAE_FIELDS = (*VAE_FIELDS, "force_upcast")


def vae_config(raw: dict) -> VAEConfig:
    """config.json of an AutoencoderKL -> VAEConfig."""
    used = {*VAE_FIELDS, "block_out_channels", "down_block_types", "up_block_types"}
    check_fields(raw, "AutoencoderKL", used, VAE_FIXED, VAE_OFF, set())
    widths = raw.get("block_out_channels", [64])
    for field, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if raw.get(field, [block]) != [block] * (len(widths) if isinstance(widths, list) else 1):
            raise CheckpointError(f"{field} is {raw.get(field)}; labkit's VAE is made of {block}, one for each of block_out_channels.")
    scale = raw.get("scaling_factor", 0.18215)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise CheckpointError(f"scaling_factor is {scale!r}; a positive number is expected.")
    return VAEConfig(
        block_out_channels=integers(raw, "block_out_channels", (64,), len(widths) if isinstance(widths, list) else 1),
        layers_per_block=integer(raw, "layers_per_block", 1, 16),
        in_channels=integer(raw, "in_channels", 3),
        out_channels=integer(raw, "out_channels", 3),
        latent_channels=integer(raw, "latent_channels", 4),
        norm_num_groups=integer(raw, "norm_num_groups", 32),
        scaling_factor=float(scale),
        sample_size=integer(raw, "sample_size", 32),
        force_upcast=truth(raw, "force_upcast", None),  # diffusers' default is true, but files that do not have it predate the trouble
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
        **{f: getattr(config, f) for f in VAE_FIELDS if getattr(config, f) is not None},
    }


def text_config(raw: dict, kind: str = "CLIPTextModel") -> CLIPTextConfig:
    """config.json of a CLIPTextModel, or of a CLIPTextModelWithProjection -> CLIPTextConfig.

    `kind` is what model_index.json calls it; transformers' defaults are those of CLIP ViT-B/32.
    """
    if raw.get("model_type", "clip_text_model") != "clip_text_model":
        raise CheckpointError(f"model_type is {raw['model_type']!r}; labkit's text encoder is a clip_text_model.")
    if raw.get("architectures") not in (None, [], [kind]):
        raise CheckpointError(f"architectures is {raw['architectures']}; labkit's text encoder is a {kind} here.")
    fields = set(CLIPTextConfig.__dataclass_fields__)
    check_fields(raw, "clip_text_model", fields, TEXT_FIXED, TEXT_OFF, TEXT_IGNORED)
    act = raw.get("hidden_act", "quick_gelu")
    return CLIPTextConfig(
        vocab_size=integer(raw, "vocab_size", 49408, 10**7),
        max_position_embeddings=integer(raw, "max_position_embeddings", 77),
        hidden_size=integer(raw, "hidden_size", 512),
        intermediate_size=integer(raw, "intermediate_size", 2048),
        num_hidden_layers=integer(raw, "num_hidden_layers", 12, 512),
        num_attention_heads=integer(raw, "num_attention_heads", 8),
        hidden_act=act,
        projection_dim=integer(raw, "projection_dim", 512) if kind == WITH_PROJECTION else None,
    )


def text_kind(config: CLIPTextConfig) -> str:
    """What transformers calls an encoder of this config."""
    return WITH_PROJECTION if config.projection_dim else "CLIPTextModel"


def text_to_transformers(config: CLIPTextConfig, bos: int, eos: int, pad: int) -> dict:
    """CLIPTextConfig -> config.json of a CLIPTextModel, or of a CLIPTextModelWithProjection."""
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    ours = {field: value for field, value in vars(config).items() if value is not None}
    return {"architectures": [text_kind(config)], "model_type": "clip_text_model", "layer_norm_eps": 1e-5, **ours, **ids}


def schedule_config(raw: dict) -> ScheduleConfig:
    """scheduler_config.json of any scheduler -> ScheduleConfig, as DDIMScheduler.from_config would read it (its defaults included).

    Which sampler the file names does not matter, only the noise schedule. `clip_sample` is not looked at: diffusers' pipelines
    switch it off, for latents are not confined to [-1, 1].
    """
    if raw.get("_class_name", "DDIMScheduler") not in SCHEDULERS:
        raise CheckpointError(f"it describes a {raw['_class_name']}, whose noise is not that of Stable Diffusion; labkit reads a DDIMScheduler and its kin.")
    check_fields(raw, raw.get("_class_name", "DDIMScheduler"), set(ScheduleConfig.__dataclass_fields__), {}, SCHEDULE_OFF, SCHEDULE_IGNORED)
    config = ScheduleConfig(
        num_train_timesteps=integer(raw, "num_train_timesteps", 1000),
        beta_start=number(raw, "beta_start", 0.0001),
        beta_end=number(raw, "beta_end", 0.02),
        beta_schedule=raw.get("beta_schedule", "linear"),
        prediction_type=raw.get("prediction_type", "epsilon"),
        timestep_spacing=raw.get("timestep_spacing", "leading"),
        steps_offset=integer(raw, "steps_offset", 0, low=0),
        set_alpha_to_one=truth(raw, "set_alpha_to_one", True),
        rescale_betas_zero_snr=truth(raw, "rescale_betas_zero_snr", False),
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
    return {name if name.startswith("text_projection.") else f"text_model.{name}": tensor for name, tensor in tensors.items()}
