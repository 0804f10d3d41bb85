"""One more token of every stream, as plain calls: what `TextDecoder` does for T = 1, without the way through modules.

Alphabet: B memories, K streams, N = B*K, H heads, D head width, E width, S slots, V vocabulary.

Word after word the same few operations run on single rows; half of the time of a small model is Python finding them.
Here they are found once. The slow twin is the decoder itself (`DecoderStep` with `unrolled=False`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.nn.attention import attention, fold_streams, unfold_streams
from mmx.nn.kv_cache import KVCache
from mmx.nn.layers import (
    FeedForward,
    GLUFeedForward,
    LearnedPositionEmbedding,
    NoPositionEmbedding,
    PostNorm,
    PreNorm,
    SelfAttention,
    TokenEmbedding,
)
from mmx.nn.transformer import CrossAttention, DecoderLayer

Map = Callable[[Tensor], Tensor]


class _StepState:
    """What holds for the token in hand: where it stands, what it may see, what is held. No operation is in it: those
    hold it, and a circle would keep the keys and values of a whole memory until Python looks for circles."""

    end: int  # positions held, the token's own included
    positions: Tensor  # [1 or N, 1]
    seen: Tensor | None
    visible: Tensor | None
    bias: Tensor | None
    streams: int
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


class FastDecodeStep:
    """A decoder's step over one memory: tokens [N] in, logits [N, V] out, the cache one position longer."""

    def __init__(self, decoder: TextDecoder, memory: Memory) -> None:
        self.decoder, self.memory, self.now = decoder, memory, _StepState()
        like, now = decoder.embedding.weight, self.now
        looked_at = [(k.to(like.dtype), v.to(like.dtype)) for k, v in zip(memory.keys, memory.values)]
        self.on_cpu = like.device.type == "cpu"
        self.embed, self.norm = _embedding(decoder.embedding, now), _norm(decoder.norm)
        self.sublayers: list[Map] = []
        blocks: list[DecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
        for index, block in enumerate(blocks):
            self.sublayers.append(_residual(block.self_residual, _self_attention(block.self_attention, index, now)))
            if (look := block.cross_attention) is not None:
                keys, values = looked_at[look.index if len(looked_at) > 1 else 0]
                self.sublayers.append(_residual(block.cross_residual, _cross_attention(look, keys, values, now)))
            self.sublayers.append(_residual(block.feed_residual, _feed_forward(block.feed_forward)))

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token to each of N streams; return the logits [N, V] of what follows."""
        held, now = cache.extend_mask(torch.ones_like(tokens, dtype=torch.bool)[:, None]), self.now
        now.end = held.shape[1]
        # Where no stream was padded all stand at one place, and see all that is held. To ask a GPU would take longer.
        everything = self.on_cpu and bool(held.all())
        now.seen = None if everything else held[:, None, None]
        now.positions = tokens.new_full((1, 1), now.end - 1) if everything else held.sum(-1, keepdim=True) - 1
        now.keys, now.values = cache.keys.unbind(), cache.values.unbind()
        now.streams = len(tokens) // self.memory.batch_size
        sight = self.decoder.cross_attention_inputs(self.memory, now.positions.expand(len(tokens), 1))
        now.visible, now.bias = sight.mask, sight.bias
        x = self.embed(tokens)
        for sublayer in self.sublayers:
            x = sublayer(x)
        cache.advance(1)
        return self.decoder.logits(self.norm(x))


def supports_fast_decode(decoder: TextDecoder) -> bool:
    """Whether nothing is lost: dropout and gradients are for training."""
    return not decoder.training and not torch.is_grad_enabled()


def _linear(part: nn.Module) -> Map:
    """A linear map; what stands in for one (packed, or with an adapter) is asked as it is."""
    if type(part) is not nn.Linear:
        return part.forward
    weight, bias = part.weight, part.bias
    return lambda x: F.linear(x, weight, bias)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _norm(part: nn.Module) -> Map:
    """A norm, or a gate; of those that do nothing not even the call is left."""
    if isinstance(part, nn.LayerNorm):
        shape, weight, bias, eps = part.normalized_shape, part.weight, part.bias, part.eps
        return lambda x: F.layer_norm(x, shape, weight, bias, eps)
    return _as_it_is if isinstance(part, nn.Identity) else part.forward


def _residual(part: PreNorm, sublayer: Map) -> Map:
    norm, gate = _norm(part.norm), _norm(part.gate)
    if isinstance(part, PostNorm):
        return lambda x: norm(x + gate(sublayer(x)))
    return lambda x: x + gate(sublayer(norm(x)))


def _feed_forward(part: FeedForward) -> Map:
    up, out, activation = _linear(part.up), _linear(part.out), part.activation
    if isinstance(part, GLUFeedForward):
        gate = _linear(part.gate)
        return lambda x: out(activation(gate(x)) * up(x))
    return lambda x: out(activation(up(x)))


def _embedding(part: TokenEmbedding, now: _StepState) -> Map:
    table, scale, scheme, norm = part.weight, part.scale, part.positions, _norm(part.norm)

    def run(tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, table)
        x = x if scale == 1.0 else x * scale
        if isinstance(scheme, LearnedPositionEmbedding):
            x = x + F.embedding(now.positions[:, 0], scheme.weight)
        elif not isinstance(scheme, NoPositionEmbedding):
            x = (x + scheme(now.positions[:, 0])).to(table.dtype)
        return norm(x)

    return run


def _self_attention(part: SelfAttention, index: int, now: _StepState) -> Map:
    qkv, out, rotary = _linear(part.qkv), _linear(part.out), part.rotary
    heads, first_value = part.num_heads, part.num_heads + part.num_kv_heads
    together = first_value + part.num_kv_heads

    def run(x: Tensor) -> Tensor:
        parts = qkv(x).view(len(x), together, 1, -1)
        queries, key, value = parts[:, :heads], parts[:, heads:first_value], parts[:, first_value:]
        if rotary is not None:
            queries, key = rotary(queries, now.positions), rotary(key, now.positions)
        keys, values, end = now.keys[index], now.values[index], now.end
        keys[:, :, end - 1 : end], values[:, :, end - 1 : end] = key, value
        return out(attention(queries, keys[:, :, :end], values[:, :, :end], now.seen).flatten(1))

    return run


def _cross_attention(part: CrossAttention, keys: Tensor, values: Tensor, now: _StepState) -> Map:
    query, out, heads = _linear(part.query), _linear(part.out), part.num_heads

    def run(x: Tensor) -> Tensor:
        queries = query(x).view(len(x), heads, 1, -1)
        if now.streams == 1:
            return out(attention(queries, keys, values, now.visible, now.bias).flatten(1))
        read = attention(fold_streams(queries, len(keys)), keys, values, now.visible, now.bias)
        return out(unfold_streams(read, now.streams).flatten(1))

    return run
