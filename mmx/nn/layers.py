"""Layers of a transformer: norms, self-attention, feed-forward, residual connections, dropout, token embedding.

Axes: N streams, T text positions, E hidden size, H heads, D head dimension. Masks: True = may be attended.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmx.config.schema import BaseTransformerConfig
from mmx.nn.attention import attention
from mmx.nn.kv_cache import LayerKVCache
from mmx.nn.position_embedding import RotaryEmbedding, build_position_embedding
from mmx.nn.unpadding import apply_unpadded


def build_norm(kind: str, hidden_size: int, eps: float = 1e-5) -> nn.Module:
    """Return a norm: `layer` (Ba et al. 2016), `rms` (Zhang and Sennrich 2019), or `none` (identity)."""
    norms: dict[str, Callable[[], nn.Module]] = {
        "layer": lambda: nn.LayerNorm(hidden_size, eps),
        "rms": lambda: nn.RMSNorm(hidden_size, eps),
        "none": nn.Identity,
    }
    return norms[kind]()


# ---- self-attention --------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection of queries, keys and values."""

    def __init__(self, config: BaseTransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        fused = (self.num_heads + 2 * self.num_kv_heads) * config.head_dim
        self.qkv: nn.Module = nn.Linear(config.hidden_size, fused, bias=config.bias)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.bias)
        self.rotary: RotaryEmbedding | None = None
        if config.positions == "rope":
            self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.rope_scaling)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        cache: LayerKVCache | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Return [N, T, E].

        Args:
            x: [N, T, E].
            mask: bool [N, 1, T, all positions]; None if every position may be attended.
            positions: int [N, T].
            cache: keys and values of earlier positions; extended in place.
            indices: the positions to be computed, see `mmx.nn.unpadding`; all if None.
        """
        fused = split_heads(apply_unpadded(self.qkv, x, indices), self.num_heads + 2 * self.num_kv_heads)
        queries, keys, values = fused.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 1)
        if self.rotary is not None:
            queries = self.rotary(queries, positions)
            keys = self.rotary(keys, positions)
        if cache is not None:
            keys, values = cache.append(keys, values)
        return apply_unpadded(self.out, merge_heads(attention(queries, keys, values, mask)), indices)


class TiedLinear(nn.Module):
    """A linear layer whose parameters belong to another module, which alone trains and saves them.

    Weights are cast to the dtype of the input: a decoder may run in bfloat16 while the owner of the weights runs in
    float32.
    """

    def __init__(self, owner: nn.Linear) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it is not registered as a submodule

    @property
    def weight(self) -> Tensor:
        """The weight of the owner."""
        return self._owner[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of x."""
        (owner,) = self._owner
        bias = None if owner.bias is None else owner.bias.to(x.dtype)
        return F.linear(x, owner.weight.to(x.dtype), bias)


class TiedQKVProjection(nn.Module):
    """Query, key and value projection of a self-attention whose key and value weights are tied."""

    def __init__(self, query: nn.Linear, key: TiedLinear, value: TiedLinear) -> None:
        super().__init__()
        self.query = query
        self.key = key
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, E] -> [N, T, 3 * E]."""
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


# ---- feed-forward ----------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """Two linear layers with an activation between them (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, config: BaseTransformerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.out = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        return self.out(self.activation(self.up(x)))


class GLUFeedForward(FeedForward):
    """Feed-forward with a gated linear unit (Shazeer 2020, "GLU Variants Improve Transformer", equation 6)."""

    def __init__(self, config: BaseTransformerConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        return self.out(self.activation(self.gate(x)) * self.up(x))


def build_feed_forward(config: BaseTransformerConfig) -> FeedForward:
    """Return the feed-forward of one layer."""
    return GLUFeedForward(config) if config.glu else FeedForward(config)


# ---- residual connections --------------------------------------------------------------------------------------------


class TanhGate(nn.Module):
    """Tanh gate, initialized to zero (Alayrac et al. 2022, "Flamingo", section 2.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return tanh(alpha) * x."""
        return self.alpha.tanh() * x


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) with one random byte per element on a CPU, where drawing dominates its cost.

    The probability is rounded to a multiple of 1/256, and the scale is that of the rounded probability.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.threshold = min(round(probability * 256), 255)

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element with the given probability and scale up the others in training; else return x."""
        if not self.training or self.threshold == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.probability)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.threshold
        return x * (kept * (256 / (256 - self.threshold))).to(x.dtype)


class PreNorm(nn.Module):
    """Pre-norm residual connection: x + sublayer(norm(x)) (Xiong et al. 2020, figure 1b)."""

    def __init__(self, config: BaseTransformerConfig, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.dropout = Dropout(config.dropout)
        self.gate = gate or nn.Identity()

    def forward(self, x: Tensor, sublayer: Callable[..., Tensor], *args: object) -> Tensor:
        """[N, T, E] -> [N, T, E]; `args` are passed to the sublayer after the normalized x."""
        return x + self.gate(self.dropout(sublayer(self.norm(x), *args)))


class PostNorm(PreNorm):
    """Post-norm residual connection: norm(x + sublayer(x)) (Xiong et al. 2020, figure 1a)."""

    def forward(self, x: Tensor, sublayer: Callable[..., Tensor], *args: object) -> Tensor:
        """[N, T, E] -> [N, T, E]; `args` are passed to the sublayer after x."""
        return self.norm(x + self.gate(self.dropout(sublayer(x, *args))))


def build_residual(config: BaseTransformerConfig, gate: nn.Module | None = None) -> PreNorm:
    """Return the residual connection around one sublayer."""
    return {"pre": PreNorm, "post": PostNorm}[config.norm_placement](config, gate)


# ---- embedding and shapes --------------------------------------------------------------------------------------------


class TokenEmbedding(nn.Module):
    """Token embedding: weight, scale, position embedding, then optionally norm and dropout."""

    def __init__(self, config: BaseTransformerConfig, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, config.hidden_size) * 0.02)
        self.scale = config.embedding_scale
        self.positions = build_position_embedding(config)
        self.norm = build_norm(config.norm if config.embedding_norm else "none", config.hidden_size, config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions: int [N, T] -> [N, T, E]."""
        embedded = F.embedding(tokens, self.weight) * self.scale + self.positions(positions)
        return self.dropout(self.norm(embedded.to(self.weight.dtype)))  # sinusoidal positions are float32


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[N, T, H*D] -> [N, H, T, D]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[N, H, T, D] -> [N, T, H*D]."""
    return x.transpose(1, 2).flatten(2)


def init_weights(module: nn.Module, num_layers: int) -> None:
    """Draw the weights of linear layers from a normal distribution with standard deviation 0.02; zero their biases.

    Layers named `out`, which write to the residual connection, are scaled down by sqrt(2 * num_layers) (Radford et al.
    2019, section 2.3).
    """
    for name, submodule in module.named_modules():
        if isinstance(submodule, nn.Linear):
            scale = math.sqrt(2 * num_layers) if name.endswith(".out") else 1.0
            nn.init.normal_(submodule.weight, std=0.02 / scale)
            if submodule.bias is not None:
                nn.init.zeros_(submodule.bias)
