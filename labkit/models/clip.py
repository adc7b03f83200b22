"""CLIP's text encoder: a causal transformer whose last states are what Stable Diffusion reads.

    h_0 = E[token] + P[position];   h <- h + SelfAttention_causal(LN(h));   h <- h + MLP(LN(h));   states = LN(h)
    quick_gelu(x) = x * sigmoid(1.702 x)                                                   Radford et al. 2021 and its code

Causal: a token sees itself and what is before it, so the state of the end token has seen everything. Parameter names are
those of transformers' CLIPTextModel. The `resid` taps carry each layer's token states, `attn` taps as everywhere.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from labkit.errors import LabkitError
from labkit.models.config import CLIPTextConfig
from labkit.tap import Tap

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class CLIPText(nn.Module):
    """states = clip(ids): token ids (B, L) -> (B, L, D) states after the final LayerNorm."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        if config.hidden_act not in ACTIVATIONS:
            raise LabkitError(f"hidden_act {config.hidden_act!r} is unknown; known are {', '.join(ACTIVATIONS)}")
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embeddings(ids)  # (B, L, D)
        for layer in self.encoder.layers:
            h = layer(h)
        return self.final_layer_norm(h)


class Embeddings(nn.Module):
    """A vector per token plus a vector per position."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        # from_pretrained, because nn.Embedding(...) on the meta device has torch import its compiler, two seconds of loading
        self.token_embedding = nn.Embedding.from_pretrained(torch.randn(config.vocab_size, config.hidden_size), freeze=False)
        self.position_embedding = nn.Embedding.from_pretrained(torch.randn(config.max_position_embeddings, config.hidden_size), freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        length, context = ids.shape[1], self.position_embedding.num_embeddings
        if length > context:
            raise LabkitError(f"{length} tokens do not fit into the text encoder's context of {context}; shorten the prompt")
        return self.token_embedding(ids) + self.position_embedding.weight[:length]  # (B, L, D)


class Layers(nn.Module):
    """The stack, under the name its parameters have in the files."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CausalAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)
        self.resid = Tap()  # (B, L, D)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.self_attn(self.layer_norm1(h))
        return self.resid(h + self.mlp(self.layer_norm2(h)))  # (B, L, D)


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token cannot see what comes after it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.probs = Tap()  # (B, heads, L, L)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (rearrange(proj(h), "b l (h d) -> b h l d", h=self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.probs.active:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, L, L)
            future = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).triu(1)
            out = self.probs(scores.masked_fill(future, float("-inf")).softmax(dim=-1)) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(out, "b h l d -> b l (h d)"))  # (B, L, D)


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(h)))
