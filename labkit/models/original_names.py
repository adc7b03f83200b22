"""The parameter names of the original one-file checkpoints as diffusers' and transformers', as tables one can read.

    U-Net   input_blocks.{n}: a flat list.  n = 1 + level * (layers + 1) + i: block i of a level, the last one of it halves
            output_blocks.{n}: likewise upwards, n = level * (layers + 1) + i, the doubling being a part of a level's last block
    VAE     encoder.down.{level}.block.{i}; decoder.up counts its levels from the finest, diffusers in the order of use
    OpenCLIP  one matrix in_proj holds query, key and value, in this order; text_projection multiplies from the right, x @ W

The original code: CompVis/latent-diffusion (U-Net, VAE), openai/CLIP, mlfoundations/open_clip. The text encoders of SD 1.x and
the first of SDXL are in transformers' own names already. A name that no rule knows stays as it is, so that it is missed by nobody.
"""

import re
from functools import cache

from torch import Tensor

from labkit.errors import CheckpointError

# {n} stands for a number; {level} and {i} are reckoned from it, {up} is the level counted from the coarsest.
UNET = (
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("label_emb.0.0.", "add_embedding.linear_1."),  # SDXL: pooled text, sizes and crops
    ("label_emb.0.2.", "add_embedding.linear_2."),
    ("input_blocks.0.0.", "conv_in."),
    ("input_blocks.{n}.0.op.", "down_blocks.{level}.downsamplers.0.conv."),
    ("input_blocks.{n}.0.", "down_blocks.{level}.resnets.{i}."),
    ("input_blocks.{n}.1.", "down_blocks.{level}.attentions.{i}."),
    ("middle_block.0.", "mid_block.resnets.0."),
    ("middle_block.1.", "mid_block.attentions.0."),
    ("middle_block.2.", "mid_block.resnets.1."),
    ("output_blocks.{n}.0.", "up_blocks.{level}.resnets.{i}."),
    ("output_blocks.{n}.1.conv.", "up_blocks.{level}.upsamplers.0.conv."),  # where the level has no attention
    ("output_blocks.{n}.2.conv.", "up_blocks.{level}.upsamplers.0.conv."),
    ("output_blocks.{n}.1.", "up_blocks.{level}.attentions.{i}."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
)
UNET_RESNET = (
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
)
VAE = (
    ("encoder.down.{level}.block.{i}.", "encoder.down_blocks.{level}.resnets.{i}."),
    ("encoder.down.{level}.downsample.conv.", "encoder.down_blocks.{level}.downsamplers.0.conv."),
    ("decoder.up.{level}.block.{i}.", "decoder.up_blocks.{up}.resnets.{i}."),
    ("decoder.up.{level}.upsample.conv.", "decoder.up_blocks.{up}.upsamplers.0.conv."),
    *(
        (f"{side}.{old}", f"{side}.{new}")
        for side in ("encoder", "decoder")
        for old, new in (
            ("mid.block_1.", "mid_block.resnets.0."),
            ("mid.block_2.", "mid_block.resnets.1."),
            ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
            ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
            ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
            ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
            ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
            ("norm_out.", "conv_norm_out."),
        )
    ),
)
VAE_RESNET = (("nin_shortcut.", "conv_shortcut."),)
OPENCLIP = (
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("transformer.resblocks.{n}.ln_1.", "text_model.encoder.layers.{n}.layer_norm1."),
    ("transformer.resblocks.{n}.ln_2.", "text_model.encoder.layers.{n}.layer_norm2."),
    ("transformer.resblocks.{n}.mlp.c_fc.", "text_model.encoder.layers.{n}.mlp.fc1."),
    ("transformer.resblocks.{n}.mlp.c_proj.", "text_model.encoder.layers.{n}.mlp.fc2."),
    ("transformer.resblocks.{n}.attn.out_proj.", "text_model.encoder.layers.{n}.self_attn.out_proj."),
    ("transformer.resblocks.{n}.attn.in_proj_", "text_model.encoder.layers.{n}.self_attn.{{qkv}}_proj."),  # three in one
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
)
BUFFERS = ("logit_scale", "attn_mask", "text_model.embeddings.position_ids")  # of training, and tables 0, 1, 2, ...


def unet_tensors(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The U-Net, its names without "model.diffusion_model.", as diffusers' UNet2DConditionModel; `layers` ResNet blocks a level."""

    def place(n: int, family: str) -> dict[str, int]:
        level, i = divmod(n - 1 if family == "input_blocks" else n, layers + 1)
        return {"level": level, "i": i}

    def ours(name: str) -> str:
        new = _apply(UNET, name, lambda found, old: place(int(found["n"]), old.split(".")[0]) if "n" in found else {})
        return _inside(UNET_RESNET, new, ".resnets.")

    return _renamed(tensors, ours)


def vae_tensors(tensors: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The VAE, its names without "first_stage_model.", as diffusers' AutoencoderKL; attention was 1x1 convolutions, (C, C, 1, 1) -> (C, C)."""

    def ours(name: str) -> str:
        new = _apply(VAE, name, lambda found, old: {"up": levels - 1 - int(found["level"])} if "level" in found else {})
        return _inside(VAE_RESNET, new, ".resnets.")

    attention = {".attentions.0.to_q.", ".attentions.0.to_k.", ".attentions.0.to_v.", ".attentions.0.to_out."}
    flat = {n: t.flatten(1) if t.ndim > 2 and any(a in n for a in attention) else t for n, t in _renamed(tensors, ours).items()}
    return flat  # (C, C) each


def clip_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder in transformers' names, its prefix taken off, with or without "text_model." (which all files have by now)."""
    kept = {n: t for n, t in tensors.items() if not n.endswith(BUFFERS) and n != "embeddings.position_ids"}
    return _renamed(kept, lambda n: n if n.startswith(("text_model.", "text_projection.")) else f"text_model.{n}")


def openclip_tensors(tensors: dict[str, Tensor], layers: int | None = None, projection: bool = True) -> dict[str, Tensor]:
    """An OpenCLIP text encoder as transformers' CLIPTextModel; the first `layers` of it only, and its text_projection if asked for.

    SD 2.x reads the last layer but one, so its published folders leave the last layer and the projection out.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block = re.match(r"transformer\.resblocks\.(\d+)\.", name)
        if name in BUFFERS or not projection and name == "text_projection" or layers is not None and block and int(block[1]) >= layers:
            continue
        new = _apply(OPENCLIP, name)
        if "{qkv}" in new and tensor.ndim and tensor.shape[0] % 3 == 0:
            out |= {new.format(qkv=which): part.clone() for which, part in zip("qkv", tensor.chunk(3))}  # (3 D, ...) -> 3 of (D, ...)
        else:
            out[new] = tensor.T.contiguous() if name == "text_projection" and tensor.ndim == 2 else tensor
    return out


def ema_name(name: str) -> str:
    """Where the moving average of "model.diffusion_model.x.y" is kept: "model_ema.diffusion_modelxy", the dots being taken out."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


@cache
def _pattern(old: str) -> re.Pattern:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(old)))


def _apply(rules, name: str, more=lambda found, old: {}) -> str:
    """The name by the first rule that its beginning fits; as it is if there is none."""
    for old, new in rules:
        if match := _pattern(old).match(name):
            found = match.groupdict()
            return new.format(**{**found, **more(found, old)}) + name[match.end() :]
    return name


def _inside(rules, name: str, where: str) -> str:
    before, found, after = name.partition(where)
    i, _, rest = after.partition(".")
    return f"{before}{found}{i}.{_apply(rules, rest)}" if found else name


def _renamed(tensors: dict[str, Tensor], ours) -> dict[str, Tensor]:
    named = {ours(name): tensor for name, tensor in tensors.items()}
    if len(named) != len(tensors):
        taken: dict[str, str] = {}
        one, other = next((taken[ours(n)], n) for n in tensors if taken.setdefault(ours(n), n) != n)
        raise CheckpointError(f"{one} and {other} are one parameter, {ours(one)}: the file is damaged, fetch it again.")
    return named
