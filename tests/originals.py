"""Checkpoints in the original one-file layout, made of diffusers' and transformers' random models by the way back, block by block.

That the way back is the right one is not taken on trust: test_single_file.py gives what comes out to diffusers' own converter.
"""

import torch

SD1_UNET = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "in_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2, "norm_num_groups": 32, "norm_eps": 1e-5, "out_channels": 4, "sample_size": 64,
}  # fmt: skip
SD2_UNET = {**SD1_UNET, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True, "sample_size": 96,
            "upcast_attention": True}  # fmt: skip
SDXL_UNET = {
    **SD2_UNET, "upcast_attention": False, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "sample_size": 128,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
REFINER_UNET = {
    **SDXL_UNET, "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536], "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"], "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "projection_class_embeddings_input_dim": 2560,
}  # fmt: skip
VAE = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 512, "scaling_factor": 0.18215,
}  # fmt: skip
CLIP_L = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"}
CLIP_H = {**CLIP_L, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"}
CLIP_G = {**CLIP_H, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280}
SMALL = {"block_out_channels": [32, 64], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "layers_per_block": 1,
         "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 64, "sample_size": 8}  # fmt: skip
SMALL_VAE = {**VAE, "block_out_channels": [32, 64], "down_block_types": VAE["down_block_types"][:2], "up_block_types": VAE["up_block_types"][:2],
             "layers_per_block": 1, "sample_size": 16}  # fmt: skip
SMALL_CLIP = {**CLIP_L, "vocab_size": 700, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "conv_shortcut": "skip_connection"}  # fmt: skip


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, so that no two can be taken for each other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.06 if p.ndim > 1 else 0.2) + (p.ndim == 1) * 0.5)
    return module.eval()


def unet_original(state: dict, config: dict) -> dict:
    """diffusers' U-Net -> model.diffusion_model.*; written from the side of the original code: a flat list of blocks."""
    out, layers, levels = {}, config["layers_per_block"], len(config["block_out_channels"])

    def put(old: str, new: str, names: dict | None = None):
        for name in [n for n in state if n.startswith(old + ".")]:
            rest = name.removeprefix(old + ".")
            if names:
                head, last = rest.rsplit(".", 1)
                rest = f"{names[head]}.{last}"
            out[f"model.diffusion_model.{new}.{rest}"] = state[name]

    for old, new in (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"), ("conv_in", "input_blocks.0.0"),
                     ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
                     ("conv_norm_out", "out.0"), ("conv_out", "out.2"), ("mid_block.attentions.0", "middle_block.1")):  # fmt: skip
        put(old, new)
    put("mid_block.resnets.0", "middle_block.0", RESNET)
    put("mid_block.resnets.1", "middle_block.2", RESNET)
    n = 1
    for level in range(levels):
        for i in range(layers):
            put(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{n}.0", RESNET)
            put(f"down_blocks.{level}.attentions.{i}", f"input_blocks.{n}.1")
            n += 1
        if level < levels - 1:
            put(f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{n}.0.op")
            n += 1
    n = 0
    for level in range(levels):
        for i in range(layers + 1):
            put(f"up_blocks.{level}.resnets.{i}", f"output_blocks.{n}.0", RESNET)
            put(f"up_blocks.{level}.attentions.{i}", f"output_blocks.{n}.1")
            if i == layers and level < levels - 1:
                place = 2 if config["up_block_types"][level].startswith("Cross") else 1
                put(f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{n}.{place}.conv")
            n += 1
    assert len(out) == len(state)
    return out


def vae_original(state: dict, levels: int) -> dict:
    """diffusers' VAE -> first_stage_model.*; the decoder's levels are counted from the finest, attention is 1x1 convolutions."""
    out = {}
    for name, tensor in state.items():
        new = name
        for level in range(levels):
            new = new.replace(f"encoder.down_blocks.{level}.resnets.", f"encoder.down.{level}.block.")
            new = new.replace(f"encoder.down_blocks.{level}.downsamplers.0.", f"encoder.down.{level}.downsample.")
            new = new.replace(f"decoder.up_blocks.{level}.resnets.", f"decoder.up.{levels - 1 - level}.block.")
            new = new.replace(f"decoder.up_blocks.{level}.upsamplers.0.", f"decoder.up.{levels - 1 - level}.upsample.")
        for old, original in (("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"), ("conv_shortcut", "nin_shortcut"),
                              ("conv_norm_out", "norm_out"), ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
                              ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"), ("mid_block.attentions.0.to_", "mid.attn_1.")):  # fmt: skip
            new = new.replace(old, original)
        out[f"first_stage_model.{new}"] = tensor[:, :, None, None] if ".attn_1." in new and tensor.ndim == 2 else tensor
    return out


def clip_original(state: dict, prefix: str = "cond_stage_model.transformer.") -> dict:
    """transformers' CLIPTextModel under its own names; old files also have the table of positions."""
    out = {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}
    return {**out, f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def openclip_original(state: dict, prefix: str = "cond_stage_model.model.", last: bool = False) -> dict:
    """transformers' CLIP -> OpenCLIP's names; `last` adds a layer that is not used and a projection (SD 2.x)."""
    state = {n.removeprefix("text_model."): t for n, t in state.items()}
    out = {
        "positional_embedding": state["embeddings.position_embedding.weight"], "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"], "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.zeros(()),
    }  # fmt: skip
    n = 0
    while (old := f"encoder.layers.{n}.") + "layer_norm1.weight" in state:
        new = f"transformer.resblocks.{n}."
        for end in ("weight", "bias"):
            out[f"{new}attn.in_proj_{end}"] = torch.cat([state[f"{old}self_attn.{which}_proj.{end}"] for which in "qkv"])
            for a, b in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
                         ("self_attn.out_proj", "attn.out_proj")):  # fmt: skip
                out[f"{new}{b}.{end}"] = state[f"{old}{a}.{end}"]
        n += 1
    if "text_projection.weight" in state:
        out["text_projection"] = state["text_projection.weight"].T.contiguous()
    if last:
        block = f"transformer.resblocks.{n - 1}."
        out |= {name.replace(block, f"transformer.resblocks.{n}."): tensor + 1 for name, tensor in out.items() if name.startswith(block)}
        out["text_projection"] = torch.zeros_like(out["positional_embedding"][0]).outer(out["positional_embedding"][0])
    return {prefix + name: tensor for name, tensor in out.items()}


def ema_original(state: dict, change=lambda t: t + 1) -> dict:
    """The moving average's copy of model.diffusion_model.*, as LitEma names its buffers."""
    average = {f"model_ema.{''.join(name.split('.')[1:])}": change(t) for name, t in state.items() if name.startswith("model.diffusion_model.")}
    return {**average, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000, dtype=torch.int32)}


TABLES = {"alphas_cumprod": torch.ones(1000), "betas": torch.ones(1000), "sqrt_recipm1_alphas_cumprod": torch.ones(1000)}  # buffers of the schedule
