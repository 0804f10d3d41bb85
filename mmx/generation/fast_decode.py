"""Fast single-token decoding: what `TextDecoder` computes for T = 1, as plain function calls instead of modules.

Axes: B memories, K streams, N = B*K, L layers, H heads, D head dimension, E hidden size, S slots, V vocabulary.

For a small model, half of the time of a decoding step is the overhead of Python's module calls. Here the functions and
weights are looked up once per memory. The slow reference is the decoder itself (`CachedDecodeStep` with `fast=False`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.nn.attention import attention, fold_streams, unfold_streams
from mmx.nn.cross_attention import CrossAttention
from mmx.nn.kv_cache import KVCache
from mmx.nn.layers import FeedForward, GLUFeedForward, PostNorm, PreNorm, SelfAttention, TokenEmbedding
from mmx.nn.position_embedding import LearnedPositionEmbedding, NoPositionEmbedding
from mmx.nn.transformer import DecoderLayer

TensorFunction = Callable[[Tensor], Tensor]


class _StepState:
    """What changes with each token: positions, masks, and the tensors of the KV cache.

    The functions of the layers refer to this object. It must not refer to them: a reference cycle would keep the keys
    and values of a memory alive until the garbage collector runs.
    """

    length: int  # filled positions of the cache, the new token included
    positions: Tensor  # int [1 or N, 1]
    self_attention_mask: Tensor | None  # bool [N, 1, 1, length]
    cross_attention_mask: Tensor | None
    cross_attention_bias: Tensor | None
    streams: int  # K
    keys: Sequence[Tensor]  # of each layer, [N, H, capacity, D]
    values: Sequence[Tensor]


class FastDecodeStep:
    """A decoding step over one memory: tokens [N] in, logits [N, V] out; the cache grows by one position."""

    def __init__(self, decoder: TextDecoder, memory: Memory) -> None:
        self.decoder = decoder
        self.memory = memory
        self._state = _StepState()
        weight = decoder.embedding.weight
        self._on_cpu = weight.device.type == "cpu"
        self._embed = _embedding(decoder.embedding, self._state)
        self._norm = _norm(decoder.norm)
        self._sublayers: list[TensorFunction] = []
        keys = [layer.to(weight.dtype) for layer in memory.keys]
        values = [layer.to(weight.dtype) for layer in memory.values]
        layers: list[DecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
        for index, layer in enumerate(layers):
            self._add(layer.self_residual, _self_attention(layer.self_attention, index, self._state))
            cross_attention = layer.cross_attention
            if cross_attention is not None:
                source = cross_attention.index if len(keys) > 1 else 0
                function = _cross_attention(cross_attention, keys[source], values[source], self._state)
                self._add(layer.cross_residual, function)
            self._add(layer.feed_residual, _feed_forward(layer.feed_forward))

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token to each of N streams; return the logits [N, V] of the next token."""
        self._update_state(tokens, cache)
        x = self._embed(tokens)
        for sublayer in self._sublayers:
            x = sublayer(x)
        cache.advance(1)
        return self.decoder.logits(self._norm(x))

    def _add(self, residual: PreNorm, sublayer: TensorFunction) -> None:
        self._sublayers.append(_residual(residual, sublayer))

    def _update_state(self, tokens: Tensor, cache: KVCache) -> None:
        state = self._state
        exists = cache.extend_mask(torch.ones_like(tokens, dtype=torch.bool)[:, None])
        state.length = exists.shape[1]
        # Without padding, all streams are at the same position and attend to everything. On a GPU the test would
        # synchronize and take longer than it saves.
        no_padding = self._on_cpu and bool(exists.all())
        if no_padding:
            state.self_attention_mask = None
            state.positions = tokens.new_full((1, 1), state.length - 1)
        else:
            state.self_attention_mask = exists[:, None, None]
            state.positions = exists.sum(-1, keepdim=True) - 1
        state.keys = cache.keys.unbind()
        state.values = cache.values.unbind()
        state.streams = len(tokens) // self.memory.batch_size
        inputs = self.decoder.cross_attention_inputs(self.memory, state.positions.expand(len(tokens), 1))
        state.cross_attention_mask = inputs.mask
        state.cross_attention_bias = inputs.bias


def supports_fast_decode(decoder: TextDecoder) -> bool:
    """Whether `FastDecodeStep` computes the same as the decoder: it has no dropout and no gradients."""
    return not decoder.training and not torch.is_grad_enabled()


def _linear(module: nn.Module) -> TensorFunction:
    """Return a linear layer as a function; modules that replace one, prepacked or with an adapter, are called."""
    if type(module) is not nn.Linear:
        return module.forward
    weight = module.weight
    bias = module.bias
    return lambda x: F.linear(x, weight, bias)


def _identity(x: Tensor) -> Tensor:
    return x


def _norm(module: nn.Module) -> TensorFunction:
    """Return a norm or gate as a function."""
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        weight = module.weight
        bias = module.bias
        eps = module.eps
        return lambda x: F.layer_norm(x, shape, weight, bias, eps)
    return _identity if isinstance(module, nn.Identity) else module.forward


def _residual(module: PreNorm, sublayer: TensorFunction) -> TensorFunction:
    norm = _norm(module.norm)
    gate = _norm(module.gate)
    if isinstance(module, PostNorm):
        return lambda x: norm(x + gate(sublayer(x)))
    return lambda x: x + gate(sublayer(norm(x)))


def _feed_forward(module: FeedForward) -> TensorFunction:
    up = _linear(module.up)
    out = _linear(module.out)
    activation = module.activation
    if isinstance(module, GLUFeedForward):
        gate = _linear(module.gate)
        return lambda x: out(activation(gate(x)) * up(x))
    return lambda x: out(activation(up(x)))


def _embedding(module: TokenEmbedding, state: _StepState) -> TensorFunction:
    weight = module.weight
    scale = module.scale
    position_embedding = module.positions
    norm = _norm(module.norm)

    def embed(tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, weight)
        if scale != 1.0:
            x = x * scale
        if isinstance(position_embedding, LearnedPositionEmbedding):
            x = x + F.embedding(state.positions[:, 0], position_embedding.weight)
        elif not isinstance(position_embedding, NoPositionEmbedding):
            x = (x + position_embedding(state.positions[:, 0])).to(weight.dtype)
        return norm(x)

    return embed


def _self_attention(module: SelfAttention, index: int, state: _StepState) -> TensorFunction:
    qkv = _linear(module.qkv)
    out = _linear(module.out)
    rotary = module.rotary
    num_heads = module.num_heads
    first_value = num_heads + module.num_kv_heads
    fused_heads = first_value + module.num_kv_heads

    def attend(x: Tensor) -> Tensor:
        fused = qkv(x).view(len(x), fused_heads, 1, -1)
        queries = fused[:, :num_heads]
        key = fused[:, num_heads:first_value]
        if rotary is not None:
            queries = rotary(queries, state.positions)
            key = rotary(key, state.positions)
        keys = state.keys[index][:, :, : state.length]
        values = state.values[index][:, :, : state.length]
        keys[:, :, -1:] = key
        values[:, :, -1:] = fused[:, first_value:]
        return out(attention(queries, keys, values, state.self_attention_mask).flatten(1))

    return attend


def _cross_attention(module: CrossAttention, keys: Tensor, values: Tensor, state: _StepState) -> TensorFunction:
    query = _linear(module.query)
    out = _linear(module.out)
    num_heads = module.num_heads

    def attend(x: Tensor) -> Tensor:
        queries = query(x).view(len(x), num_heads, 1, -1)
        if state.streams == 1:
            output = attention(queries, keys, values, state.cross_attention_mask, state.cross_attention_bias)
            return out(output.flatten(1))
        folded = fold_streams(queries, len(keys))
        output = attention(folded, keys, values, state.cross_attention_mask, state.cross_attention_bias)
        return out(unfold_streams(output, state.streams).flatten(1))

    return attend
