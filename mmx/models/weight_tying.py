"""Weight tying: one key and one value projection for all attention of a model (`tie_key_value: all`).

The projection of the first source owns the two linear layers. The other sources, the self-attention of the decoder and
that of text encoders use its weights. A token and a slot with the same features then have the same key (compare Press
and Wolf 2017, "Using the Output Embedding to Improve Language Models", which ties embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from mmx.errors import ConfigError
from mmx.models.decoder import TextDecoder
from mmx.models.projection import KeyValueProjection
from mmx.models.source import Source
from mmx.nn.layers import SelfAttention, TiedLinear, TiedQKVProjection


@dataclass(frozen=True)
class _Owner:
    """The source whose projection owns the weights."""

    source: str
    projection: KeyValueProjection


def tie_key_value(sources: Mapping[str, Source], decoder: TextDecoder) -> None:
    """Tie all key and value projections to those of the first source. May be called again after sources were added.

    Raises:
        ConfigError: code `tie_key_value.shape`, if sizes or numbers of heads differ.
    """
    (first, first_source), *others = sources.items()
    owner = _Owner(first, first_source.projection)
    for name, source in others:
        _tie_projection(source.projection, f"source {name}", owner)
    modules: dict[str, nn.Module] = {name: source.encoder for name, source in sources.items()}
    modules["the decoder"] = decoder
    for name, module in modules.items():
        for submodule in module.modules():
            if isinstance(submodule, SelfAttention):
                _tie_self_attention(submodule, name, owner)


def _tie_projection(projection: KeyValueProjection, name: str, owner: _Owner) -> None:
    _check_shape(name, projection.key.weight.shape, owner)
    projection.key = TiedLinear(owner.projection.key)  # type: ignore[assignment]
    projection.value = TiedLinear(owner.projection.value)  # type: ignore[assignment]


def _tie_self_attention(attention: SelfAttention, name: str, owner: _Owner) -> None:
    qkv = attention.qkv
    query = qkv.query if isinstance(qkv, TiedQKVProjection) else _query_projection(attention)
    _check_shape(name, query.weight.shape, owner)
    _check_heads(name, attention, owner)
    key = TiedLinear(owner.projection.key)
    value = TiedLinear(owner.projection.value)
    attention.qkv = TiedQKVProjection(query, key, value)


def _query_projection(attention: SelfAttention) -> nn.Linear:
    """The query rows of a fused projection, as a linear layer of their own."""
    qkv = attention.qkv
    assert isinstance(qkv, nn.Linear)
    head_dim = qkv.out_features // (attention.num_heads + 2 * attention.num_kv_heads)
    rows = head_dim * attention.num_heads
    query = nn.Linear(qkv.in_features, rows, bias=qkv.bias is not None)
    query.weight.data = qkv.weight.data[:rows].clone()
    if qkv.bias is not None:
        query.bias.data = qkv.bias.data[:rows].clone()
    return query


def _check_shape(name: str, shape: tuple[int, ...], owner: _Owner) -> None:
    given = list(shape)
    expected = list(owner.projection.key.weight.shape)
    if given != expected:
        raise ConfigError(
            f"tie_key_value: all: {name} projects {given[1]} to {given[0]} features, and source {owner.source} "
            f"{expected[1]} to {expected[0]}; give them the same hidden_size, num_heads and head_dim.",
            code="tie_key_value.shape",
            module=name,
            shape=given,
            expected=expected,
        )


def _check_heads(name: str, attention: SelfAttention, owner: _Owner) -> None:
    """Compare the numbers of heads: weights of equal shape may still be split into other heads."""
    expected = owner.projection.num_heads
    if (attention.num_heads, attention.num_kv_heads) != (expected, expected):
        raise ConfigError(
            f"tie_key_value: all: {name} has num_heads {attention.num_heads} and num_kv_heads "
            f"{attention.num_kv_heads}, and source {owner.source} has {expected} heads; give them the same num_heads, "
            "and no num_kv_heads.",
            code="tie_key_value.shape",
            module=name,
            heads=[attention.num_heads, attention.num_kv_heads],
            expected=expected,
        )
