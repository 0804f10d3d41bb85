"""The small classes that transformers here are composed of: norms, positions, attention, feed-forward, residuals.

Alphabet: N streams, T text positions, E width, H heads, D head width. Masks: True = may be attended.
A variant is a class and a line in a table, not a flag inside a forward.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmx.config.schema import BaseTransformerConfig, RopeScaling
from mmx.nn.attention import attention


class PastKeyValues(Protocol):
    """What self-attention has already seen: takes the new keys and values [N, H, T, D], returns all of them."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


def build_norm(kind: str, width: int, eps: float = 1e-5) -> nn.Module:
    """`layer`: Ba et al. 2016; `rms`: Zhang and Sennrich 2019; `none` passes through."""
    norms: dict[str, Callable[[], nn.Module]] = {
        "layer": lambda: nn.LayerNorm(width, eps),
        "rms": lambda: nn.RMSNorm(width, eps),
        "none": nn.Identity,
    }
    return norms[kind]()


# ---- positions -------------------------------------------------------------------------------------------------


class NoPositionEmbedding(nn.Module):
    """Adds nothing: order is told elsewhere (rope), or not at all."""

    def forward(self, positions: Tensor) -> float:
        """positions: [N, T] -> a zero to add."""
        return 0.0


class LearnedPositionEmbedding(nn.Module):
    """One trained vector a position."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width) * 0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """positions: int [N, T] below `count` -> [N, T, E]."""
        return F.embedding(positions, self.weight)


class SinusoidalPositionEmbedding(nn.Module):
    """Fixed waves of growing length (Vaswani et al. 2017, section 3.5): sine half, then cosine half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, positions: Tensor) -> Tensor:
        """positions: int or float [...] -> [..., E]."""
        half = self.width // 2
        rates = torch.exp(torch.arange(half, device=positions.device) * (-math.log(10000.0) / max(half - 1, 1)))
        angles = positions.float().unsqueeze(-1) * rates
        return F.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, self.width - 2 * half))


class RotaryEmbedding(nn.Module):
    """Rotate queries and keys by their position, so that scores see only distances (Su et al. 2021, section 3.4)."""

    def __init__(self, head_width: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.head_width, self.theta, self.scaling = head_width, theta, scaling

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [N, H, T, D], positions: [N, T] -> [N, H, T, D]."""
        angles = positions.float().unsqueeze(-1) * self._rates(x.device)
        cosine, sine = (wave.to(x.dtype).unsqueeze(1) for wave in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, -1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)

    def _rates(self, device: torch.device) -> Tensor:
        """Radians a position, [D / 2]."""
        rates = 1.0 / self.theta ** (torch.arange(0, self.head_width, 2, device=device) / self.head_width)
        if self.scaling is None:
            return rates
        low, high = self.scaling.low_freq_factor, self.scaling.high_freq_factor
        turns = (
            self.scaling.original_max_position_embeddings * rates / (2 * math.pi)
        )  # within the positions that were trained
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return kept * rates + (1 - kept) * rates / self.scaling.factor


def build_position_embedding(config: BaseTransformerConfig) -> nn.Module:
    """The vectors added to the token embeddings."""
    schemes: dict[str, Callable[[], nn.Module]] = {
        "learned": lambda: LearnedPositionEmbedding(config.max_position_embeddings, config.hidden_size),
        "sinusoidal": lambda: SinusoidalPositionEmbedding(config.hidden_size),
        "rope": NoPositionEmbedding,
        "none": NoPositionEmbedding,
    }
    return schemes[config.positions]()


# ---- sublayers -------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Positions of one text attend to each other. Queries, keys and values come from one fused projection."""

    def __init__(self, config: BaseTransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        together = (self.num_heads + 2 * self.num_kv_heads) * config.head_dim
        self.qkv: nn.Module = nn.Linear(config.hidden_size, together, bias=config.bias)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.bias)
        rope = config.positions == "rope"
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.rope_scaling) if rope else None

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor, past: PastKeyValues | None = None) -> Tensor:
        """x: [N, T, E], mask: bool [N, 1, T, all positions] (None: all), positions: [N, T] -> [N, T, E]."""
        together = split_heads(self.qkv(x), self.num_heads + 2 * self.num_kv_heads)
        queries, keys, values = together.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 1)
        if self.rotary is not None:
            queries, keys = self.rotary(queries, positions), self.rotary(keys, positions)
        if past is not None:
            keys, values = past.append(keys, values)
        return self.out(merge_heads(attention(queries, keys, values, mask)))


class TiedLinear(nn.Module):
    """A linear map that belongs to somebody else, who alone trains and saves it. It answers in the type it is asked
    in: a decoder may speak in bfloat16 while the source that owns the map reads in float32."""

    def __init__(self, owned: nn.Linear) -> None:
        super().__init__()
        self._owned = (owned,)  # within a tuple, where a module does not look for its parts

    @property
    def weight(self) -> Tensor:
        """The owner's weight."""
        return self._owned[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the type of x."""
        (owned,) = self._owned
        return F.linear(x, owned.weight.to(x.dtype), None if owned.bias is None else owned.bias.to(x.dtype))


class TiedQKVProjection(nn.Module):
    """Queries, keys and values of a self-attention, of which only the queries are its own."""

    def __init__(self, query: nn.Linear, key: TiedLinear, value: TiedLinear) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, E] -> [N, T, 3 * E]."""
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


class FeedForward(nn.Module):
    """Two linear maps with an activation between (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, config: BaseTransformerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.out = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        return self.out(self.activation(self.up(x)))


class GLUFeedForward(FeedForward):
    """One map opens and closes the other (Shazeer 2020, "GLU Variants Improve Transformer", equation 6)."""

    def __init__(self, config: BaseTransformerConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        return self.out(self.activation(self.gate(x)) * self.up(x))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def build_feed_forward(config: BaseTransformerConfig) -> FeedForward:
    """The feed-forward of one block."""
    return GLUFeedForward(config) if config.glu else FeedForward(config)


class TanhGate(nn.Module):
    """A door that starts shut (Alayrac et al. 2022, "Flamingo", section 2.2): tanh of a scalar that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x by the opening, in -1..1."""
        return self.alpha.tanh() * x


class Dropout(nn.Module):
    """Srivastava et al. 2014. On a CPU the draw is what costs, and one random byte a number is enough: the probability
    is rounded to 1/256, and the scale is that of the rounded one."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability, self.bytes = probability, min(round(probability * 256), 255)

    def forward(self, x: Tensor) -> Tensor:
        """In training, zero each number with the probability and scale the others up; else x."""
        if not self.training or self.bytes == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.probability)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.bytes
        return x * (kept * (256 / (256 - self.bytes))).to(x.dtype)


# ---- residual paths --------------------------------------------------------------------------------------------


class PreNorm(nn.Module):
    """x + sublayer(norm(x)): the residual path stays free (Xiong et al. 2020, figure 1b)."""

    def __init__(self, config: BaseTransformerConfig, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = build_norm(config.norm, config.hidden_size, config.norm_eps)
        self.dropout, self.gate = Dropout(config.dropout), gate or nn.Identity()

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        return x + self.gate(self.dropout(sublayer(self.norm(x))))


class PostNorm(PreNorm):
    """norm(x + sublayer(x)): as in the original transformer (Xiong et al. 2020, figure 1a)."""

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        return self.norm(x + self.gate(self.dropout(sublayer(x))))


def build_residual(config: BaseTransformerConfig, gate: nn.Module | None = None) -> PreNorm:
    """The residual path round one sublayer."""
    return {"pre": PreNorm, "post": PostNorm}[config.norm_placement](config, gate)


class TokenEmbedding(nn.Module):
    """Tokens and their positions to vectors: table, scale, positions, then norm and dropout where there are any."""

    def __init__(self, config: BaseTransformerConfig, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, config.hidden_size) * 0.02)
        self.scale, self.positions = config.embedding_scale, build_position_embedding(config)
        self.norm = build_norm(config.norm if config.embedding_norm else "none", config.hidden_size, config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions: int [N, T] -> [N, T, E]."""
        embedded = F.embedding(tokens, self.weight) * self.scale + self.positions(positions)
        return self.dropout(self.norm(embedded.to(self.weight.dtype)))  # the waves of sinusoidal positions are float32


# ---- shapes ----------------------------------------------------------------------------------------------------


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[N, T, heads*D] -> [N, heads, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[N, H, T, D] -> [N, T, H*D]."""
    return x.transpose(1, 2).flatten(2)


def position_ids_from_mask(mask: Tensor) -> Tensor:
    """bool [N, T] of tokens that exist -> the position of each among them; padding, left or right, counts nothing."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def init_weights(module: nn.Module, layers: int) -> None:
    """Normal 0.02 for linear maps; maps back into the residual path shrink with depth (Radford et al. 2019, 2.3)."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02 / (math.sqrt(2 * layers) if name.endswith(".out") else 1.0))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
