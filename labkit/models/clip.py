"""CLIP's text encoder: a causal transformer whose last states are what Stable Diffusion reads.

    h_0 = E[token] + P[position];   h <- h + SelfAttention_causal(LN(h));   h <- h + MLP(LN(h));   states = LN(h)
    quick_gelu(x) = x * sigmoid(1.702 x)                                                   Radford et al. 2021 and its code

Causal: a token sees itself and what is before it, so the state of the end token has seen everything. Parameter names are
those of transformers' CLIPTextModel. The `resid` taps carry each layer's token states, `attn` taps as everywhere.

    SD 1, SD 2     c = LN(h_n)
    SDXL           states = h_{n-1}, without a norm;    pooled = W LN(h_n)[end token]        Podell et al. 2023, section 2.1
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
    """states = clip(ids): token ids (B, L) -> (B, L, D) states after the final LayerNorm; with a projection also `pooled`."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        if config.hidden_act not in ACTIVATIONS:
            raise LabkitError(f"hidden_act {config.hidden_act!r} is unknown; known are {', '.join(ACTIVATIONS)}")
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        if config.projection_dim:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.hidden(ids)[-1])

    def hidden(self, ids: Tensor) -> list[Tensor]:
        """The residual stream h_0 ... h_n, each (B, L, D), before the final LayerNorm: h_i is what layer i has left."""
        h = [self.embeddings(ids)]  # (B, L, D)
        for layer in self.encoder.layers:
            h.append(layer(h[-1]))
        return h

    def pooled(self, h: Tensor, ids: Tensor, eos: int) -> Tensor:
        """The whole text as one vector (B, P): the projected state of its first end token, of h = h_n (B, L, D).

        Raises LabkitError if this encoder has no projection.
        """
        if not self.config.projection_dim:
            raise LabkitError("This text encoder has no projection (CLIPTextModel); a CLIPTextModelWithProjection has one.")
        end = (ids == eos).int().argmax(dim=1)  # (B,) the first one: what follows is padding
        return self.text_projection(self.final_layer_norm(h[torch.arange(len(h), device=h.device), end]))  # (B, P)


class Embeddings(nn.Module):
    """A vector per token plus a vector per position."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        length, context = ids.shape[1], self.position_embedding.num_embeddings
        if length > context:
            raise LabkitError(f"{length} tokens do not fit into the text encoder's context of {context}; shorten the prompt")
        return self.token_embedding(ids) + self.position_embedding.weight[:length]  # (B, L, D)


def embedding(count: int, dim: int) -> nn.Embedding:
    """nn.Embedding(count, dim), N(0, 1); not that itself, because random numbers on the meta device have torch import its compiler, a second of loading."""
    weight = torch.empty(count, dim)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)


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
        if dim % heads:
            raise LabkitError(f"{heads} attention heads cannot share {dim} channels evenly")
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
