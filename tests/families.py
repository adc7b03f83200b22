"""Every Stable Diffusion as diffusers writes it to disk: config files as published, at full size or narrow, with random weights.

`write(family, folder)` builds each part with diffusers or transformers, fills it, and saves a folder in the true layout. The
narrow ones have all the kinds of blocks of the full ones.
"""

import json
from pathlib import Path

import torch
from labkit.models.tokenizer import Tokenizer, build_vocabulary

WORDS = "a red blue ball cube left of".split()

UNET = {
    "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
}  # fmt: skip
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def blocks(*levels: tuple[str, str]) -> dict:
    return {"down_block_types": [down for down, _ in levels], "up_block_types": [up for _, up in reversed(levels)]}


SD15_UNET = {
    **UNET, **blocks(CROSS, CROSS, CROSS, PLAIN), "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
    "sample_size": 64,
}  # fmt: skip
SD21_UNET = {
    **SD15_UNET, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False, "num_class_embeds": None,
    "only_cross_attention": False, "sample_size": 96, "upcast_attention": True, "use_linear_projection": True, "class_embed_type": None,
}  # fmt: skip
SDXL_UNET = {
    **UNET, **blocks(PLAIN, CROSS, CROSS), "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "class_embed_type": None, "class_embeddings_concat": False,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_dim": 2048, "cross_attention_norm": None, "dual_cross_attention": False,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "mid_block_only_cross_attention": None, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None, "num_class_embeds": None, "only_cross_attention": False, "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "sample_size": 128,
    "time_cond_proj_dim": None, "time_embedding_act_fn": None, "time_embedding_dim": None, "time_embedding_type": "positional",
    "timestep_post_act": None, "transformer_layers_per_block": [1, 2, 10], "upcast_attention": None, "use_linear_projection": True,
}  # fmt: skip
REFINER_UNET = {
    **SDXL_UNET, **blocks(PLAIN, CROSS, CROSS, PLAIN), "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560, "transformer_layers_per_block": 4,
}  # fmt: skip
VAE = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
SDXL_VAE = {**VAE, "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}
CLIP_L = {
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu",
    "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
    "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip
OPEN_H = {
    **CLIP_L, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
    "projection_dim": 512,
}  # fmt: skip
BIG_G = {
    **CLIP_L, "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120,
    "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
}  # fmt: skip
BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "steps_offset": 1, "clip_sample": False, "trained_betas": None,
}  # fmt: skip
PNDM = {**BETAS, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
V = {**BETAS, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
EULER = {
    **BETAS, "_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0,
    "skip_prk_steps": True, "timestep_spacing": "leading", "use_karras_sigmas": False,
}  # fmt: skip

FULL = {  # family -> the pipeline's class, its parts' configs, and what model_index.json says besides
    "sd15": ("StableDiffusionPipeline", {"unet": SD15_UNET, "vae": VAE, "text_encoder": CLIP_L, "scheduler": PNDM}, {}),
    "sd21": ("StableDiffusionPipeline", {"unet": SD21_UNET, "vae": {**VAE, "sample_size": 768}, "text_encoder": OPEN_H, "scheduler": V}, {}),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {"unet": SDXL_UNET, "vae": SDXL_VAE, "text_encoder": CLIP_L, "text_encoder_2": BIG_G, "scheduler": EULER},
        {"force_zeros_for_empty_prompt": True},
    ),
    "refiner": (
        "StableDiffusionXLImg2ImgPipeline",
        {"unet": REFINER_UNET, "vae": SDXL_VAE, "text_encoder_2": BIG_G, "scheduler": EULER},
        {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    ),
    "inpaint": ("StableDiffusionInpaintPipeline", {"unet": {**SD15_UNET, "in_channels": 9}, "vae": VAE, "text_encoder": CLIP_L, "scheduler": PNDM}, {}),
    "sdxl-inpaint": (
        "StableDiffusionXLInpaintPipeline",
        {"unet": {**SDXL_UNET, "in_channels": 9}, "vae": SDXL_VAE, "text_encoder": CLIP_L, "text_encoder_2": BIG_G, "scheduler": EULER},
        {"force_zeros_for_empty_prompt": True},
    ),
}  # fmt: skip


def narrow(family: str) -> tuple[str, dict, dict]:
    """The family with a few channels in each part: a VAE of factor 2, and U-Nets of as many levels as the full one has."""
    kind, parts, said = FULL[family]
    unet, small = parts["unet"], dict(parts)
    levels, xl = len(unet["block_out_channels"]), "text_encoder_2" in parts
    widths = [16, 32, 48, 48][:levels]
    heads = 2 if unet["attention_head_dim"] == 8 else [1, 2, 4, 4][:levels]
    small["unet"] = {
        **unet, "block_out_channels": widths, "norm_num_groups": 8, "sample_size": 8, "attention_head_dim": heads, "layers_per_block": 1,
        "cross_attention_dim": {"refiner": 40}.get(family, 64 if xl else 24),
    }  # fmt: skip
    if xl:
        numbers = 5 if family == "refiner" else 6
        small["unet"] |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + numbers * 8}
        small["unet"]["transformer_layers_per_block"] = 2 if family == "refiner" else [1, 2, 3]
        second = {"hidden_size": 40, "intermediate_size": 64, "num_attention_heads": 4, "projection_dim": 20}
        small["text_encoder_2"] = {**BIG_G, **second, "num_hidden_layers": 3, "vocab_size": 700}
    if "text_encoder" in parts:
        first = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2}
        small["text_encoder"] = {**parts["text_encoder"], **first, "num_hidden_layers": 3, "vocab_size": 700}
    small["vae"] = {**parts["vae"], "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    small["vae"] |= {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}
    return kind, small, said


def module(part: str, config: dict) -> torch.nn.Module:
    """One network as diffusers or transformers builds it."""
    import diffusers
    import transformers

    if part == "unet":
        return diffusers.UNet2DConditionModel.from_config(config)
    if part == "vae":
        return diffusers.AutoencoderKL.from_config(config)
    return getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))


def randomise(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights that keep activations of order one, biases and norms random too, so that no part is idle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            fresh = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(fresh * (1.0 if "embedding.weight" in name else (p.numel() / p.shape[0]) ** -0.5))
            else:
                p.copy_(0.1 * fresh + ("norm" in name and name.endswith("weight")))
    return network.eval()


def tokenizer(pad: str, full: bool) -> Tokenizer:
    """A tokenizer of CLIP's kind: seven words; at full size filled up to CLIP's 49,408 tokens, so that BOS and EOS have CLIP's ids."""
    vocab, merges = build_vocabulary(WORDS)
    if full:
        tokens = sorted(vocab, key=vocab.get)
        vocab = {token: i for i, token in enumerate([*tokens[:-2], *(f"filler{i}" for i in range(49408 - len(tokens))), *tokens[-2:]])}
    return Tokenizer(vocab, merges, pad=pad)


def beside_diffusers(pipelines: dict[str, str], kind: str, folder: Path) -> dict:
    """{family: (LatentDiffusion, diffusers' pipeline of a kind, with DDIM)} of the same weights; `pipelines` has "XL" for those whose class is so named."""
    import diffusers
    from labkit.checkpoint import load_pipeline
    from labkit.diffusion import LatentDiffusion

    made = {}
    for family, xl in pipelines.items():
        at = write(family, folder / family)
        pipe = getattr(diffusers, f"StableDiffusion{xl}{kind}Pipeline").from_pretrained(at)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        made[family] = LatentDiffusion(**vars(load_pipeline(at))), pipe
    return made


def write(family: str, folder: Path, full: bool = False, dtype: torch.dtype = torch.float32, **options) -> Path:
    """Save the family's pipeline, part by part (one in memory at a time), as diffusers' and transformers' own save_pretrained does."""
    kind, parts, said = FULL[family] if full else narrow(family)
    index = {"_class_name": kind, "_diffusers_version": "0.42.1", **said}
    optional = ["safety_checker", "feature_extractor", "image_encoder"] if "XL" not in kind else ["feature_extractor", "image_encoder"]
    index |= {name: [None, None] for name in [*optional, *(["text_encoder", "tokenizer"] if family == "refiner" else [])]}
    for part, config in parts.items():
        if part == "scheduler":
            index[part] = ["diffusers", config["_class_name"]]
            (folder / part).mkdir(parents=True)
            (folder / part / "scheduler_config.json").write_text(json.dumps(config))
            continue
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            network = module(part, config) if full else randomise(module(part, config), len(part))
        finally:
            torch.set_default_dtype(before)
        network.eval().save_pretrained(folder / part, **options)
        index[part] = ["transformers" if "text" in part else "diffusers", type(network).__name__]
        del network
        if "text" in part:
            name = part.replace("text_encoder", "tokenizer")
            tokenizer("!" if part.endswith("_2") or family == "sd21" else "<|endoftext|>", full).save_folder(folder / name)
            index[name] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
