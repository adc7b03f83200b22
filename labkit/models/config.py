"""Architectures as values: a frozen dataclass per network, and the ones we know by name.

Field names are those of the checkpoints' own config files (diffusers, transformers) wherever the meaning is the same.
Sources: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; Radford et al. 2021 (CLIP);
Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis".
"""
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class UNetConfig:
    """The eps-prediction U-Net. One entry per resolution, from the finest down."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # width at each resolution
    cross_attention: tuple[bool, ...] = (True, True, True, False)  # transformers at this resolution; the middle always has one
    num_attention_heads: tuple[int, ...] = (8, 8, 8, 8)  # SD 1.x files call this "attention_head_dim": 8
    layers_per_block: int = 2  # ResNet blocks per resolution on the way down; one more on the way up
    cross_attention_dim: int = 768  # width of the text states
    in_channels: int = 4
    out_channels: int = 4
    norm_num_groups: int = 32
    use_linear_projection: bool = False  # SD 2.x: linear layers in and out of the transformers, SD 1.x: 1x1 convolutions
    sample_size: int = 64  # latent side the network was trained at
    transformer_layers_per_block: int | tuple[int, ...] = 1  # transformer blocks in a row; SDXL has (1, 2, 10), one for each resolution
    addition_time_embed_dim: int | None = None  # SDXL: features of each size number; None: the network reads states only
    projection_class_embeddings_input_dim: int | None = None  # SDXL: pooled text and all these features together, 1280 + 6 * 256
    upcast_attention: bool = False  # SD 2.1: diffusers' hint for float16; labkit's scores stay in its range without

    def depth(self, level: int) -> int:
        """Transformer blocks in a row at a resolution; the middle has as many as the last one."""
        depths = self.transformer_layers_per_block
        return depths if isinstance(depths, int) else depths[level]

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]


@dataclass(frozen=True)
class VAEConfig:
    """The KL autoencoder; every resolution but the last halves the picture, so f = 2 ** (len - 1)."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2  # encoder; the decoder has one more
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # 1 / std of the latents over the training images: gives the diffusion unit variance
    sample_size: int = 512
    force_upcast: bool | None = None  # SDXL: its activations leave float16's range, so it must compute in float32; None: not said

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class CLIPTextConfig:
    """The causal text transformer of CLIP."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77  # context length, BOS and EOS included
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    projection_dim: int | None = None  # SDXL's second encoder: width of the pooled text; None: there is no projection


SD15_UNET = UNetConfig()
SD15_VAE = VAEConfig()
SD15_TEXT = CLIPTextConfig()

# OpenCLIP-H is 24 layers deep; its last one is left out, and the final norm stands on the one before
SD21_UNET = replace(SD15_UNET, num_attention_heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True, sample_size=96,
                    upcast_attention=True)
SD21_VAE = replace(SD15_VAE, sample_size=768)
SD21_TEXT = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu")

SDXL_UNET = UNetConfig(
    block_out_channels=(320, 640, 1280),
    cross_attention=(False, True, True),
    num_attention_heads=(5, 10, 20),
    cross_attention_dim=2048,  # 768 of one text encoder and 1280 of the other
    use_linear_projection=True,
    sample_size=128,
    transformer_layers_per_block=(1, 2, 10),
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
SDXL_REFINER_UNET = replace(
    SDXL_UNET,
    block_out_channels=(384, 768, 1536, 1536),
    cross_attention=(False, True, True, False),
    num_attention_heads=(6, 12, 24, 24),
    cross_attention_dim=1280,
    transformer_layers_per_block=4,
    projection_class_embeddings_input_dim=2560,  # five numbers: size, crop, aesthetic score
)
SDXL_VAE = replace(SD15_VAE, scaling_factor=0.13025, sample_size=1024, force_upcast=True)
SDXL_TEXT = SD15_TEXT
SDXL_TEXT_2 = CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", projection_dim=1280
)

# tabletop: small enough to be trained on two CPU cores, built of the same parts in the same order
TABLETOP_UNET = UNetConfig(
    block_out_channels=(96, 192, 256),  # at 16x16, 8x8, 4x4 latents: cheap where the places are many, wide where they are few
    cross_attention=(True, True, False),
    num_attention_heads=(4, 4, 4),
    layers_per_block=1,
    cross_attention_dim=128,
    norm_num_groups=16,
    sample_size=16,
)
TABLETOP_VAE = VAEConfig(
    block_out_channels=(16, 32, 64, 128),  # most of the cost sits at full resolution, so it is narrow there
    layers_per_block=1,
    norm_num_groups=8,
    scaling_factor=1.0,  # measured from the data after training
    sample_size=128,
)
TABLETOP_TEXT = CLIPTextConfig(
    vocab_size=1024,  # set from the tokenizer at training
    max_position_embeddings=32,  # the longest caption has 28 words
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
)
