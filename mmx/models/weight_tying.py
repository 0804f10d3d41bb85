"""Sharing: one W_K and one W_V for all attention, so that a word and a slot that mean the same have the same key.

The first source's projection owns the two maps; the other sources, the decoder's self-attention and that of text
encoders borrow them (Press and Wolf 2017, "Using the Output Embedding", tie the words; this ties how they are read).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mmx.errors import ConfigError
from mmx.models.decoder import TextDecoder
from mmx.models.projection import KeyValueProjection
from mmx.models.source import Source
from mmx.nn.layers import SelfAttention, TiedLinear, TiedQKVProjection


def tie_key_value(sources: Mapping[str, Source], decoder: TextDecoder) -> None:
    """Let all attention read by the first source's keys and values. Raises ConfigError where shapes differ.

    May be called again when sources have come in.
    """
    (first, owner), *others = [(name, source.projection) for name, source in sources.items()]
    for name, projection in others:
        _check(f"source {name}", projection.key.weight.shape, first, owner.key.weight.shape)
        projection.key, projection.value = TiedLinear(owner.key), TiedLinear(owner.value)  # type: ignore[assignment]
    readers: dict[str, nn.Module] = {name: source.encoder for name, source in sources.items()}
    for name, module in {**readers, "the decoder": decoder}.items():
        for part in module.modules():
            if isinstance(part, SelfAttention):
                _borrow(part, name, first, owner)


def _borrow(part: SelfAttention, name: str, first: str, owner: KeyValueProjection) -> None:
    given = part.qkv
    query = given.query if isinstance(given, TiedQKVProjection) else _query(given, part.num_heads, part.num_kv_heads)
    _check(name, query.weight.shape, first, owner.key.weight.shape)
    _check_heads(name, (part.num_heads, part.num_kv_heads), first, owner.heads)
    part.qkv = TiedQKVProjection(query, TiedLinear(owner.key), TiedLinear(owner.value))


def _query(qkv: nn.Module, heads: int, key_heads: int) -> nn.Linear:
    """The first rows of a fused projection, as a map of their own."""
    assert isinstance(qkv, nn.Linear)
    rows = qkv.out_features // (heads + 2 * key_heads) * heads
    query = nn.Linear(qkv.in_features, rows, bias=qkv.bias is not None)
    query.weight.data = qkv.weight.data[:rows].clone()
    if qkv.bias is not None:
        query.bias.data = qkv.bias.data[:rows].clone()
    return query


def _check(name: str, shape: tuple[int, ...], first: str, owned: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(owned):
        raise ConfigError(
            f"tie_key_value: all: {name} maps {shape[1]} to {shape[0]}, source {first} {owned[1]} to {owned[0]}; give "
            "them the same width, heads and head_width."
        )


def _check_heads(name: str, heads: tuple[int, int], first: str, owned: int) -> None:
    """Equal shapes may still be cut into other heads, or into fewer of keys than of queries."""
    if heads != (owned, owned):
        raise ConfigError(
            f"tie_key_value: all: {name} has {heads[0]} heads of queries and {heads[1]} of keys, source {first} {owned} "
            "of both; give them the same heads, and no kv_heads."
        )
