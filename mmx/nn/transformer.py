"""Transformer with cross-attention to a Memory; the base of the text decoder and the question encoder.

Axes: B memories, K streams, N = B*K, T text positions, S slots, L layers, H heads, D head dimension, E hidden size.
Masks: True = may be attended. Cache and recorder are arguments; the modules keep no state.
"""

from functools import partial

import torch
from torch import Tensor, nn

from mmx.config.schema import TransformerConfig
from mmx.errors import MmxError
from mmx.memory import Memory
from mmx.nn.cross_attention import CrossAttention, CrossAttentionInputs, Recorder
from mmx.nn.kv_cache import KVCache, LayerKVCache
from mmx.nn.layers import (
    SelfAttention,
    TanhGate,
    TokenEmbedding,
    build_feed_forward,
    build_norm,
    build_residual,
)
from mmx.nn.position_embedding import position_ids_from_mask
from mmx.nn.relative_position import RelativePositionBias, relative_distances
from mmx.nn.unpadding import apply_unpadded, unpadded_indices
from mmx.nn.wait_k import wait_k_mask


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward.

    Args:
        config: configuration of the transformer.
        cross_attention_index: number of this layer among those with cross-attention; None for a layer without it.
    """

    def __init__(self, config: TransformerConfig, cross_attention_index: int | None) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.self_residual = build_residual(config)
        self.cross_attention: CrossAttention | None = None
        if cross_attention_index is not None:
            self.cross_attention = CrossAttention(config, cross_attention_index)
            self.cross_residual = build_residual(config, TanhGate() if config.gate == "tanh" else None)
        self.feed_forward = build_feed_forward(config)
        self.feed_residual = build_residual(config)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        cache: LayerKVCache | None,
        inputs: CrossAttentionInputs,
    ) -> Tensor:
        """[N, T, E] -> [N, T, E]; the arguments are those of SelfAttention and CrossAttention."""
        x = self.self_residual(x, self.self_attention, mask, positions, cache, inputs.indices)
        if self.cross_attention is not None:
            x = self.cross_residual(x, self.cross_attention, inputs)
        return self.feed_residual(x, partial(apply_unpadded, self.feed_forward), inputs.indices)


class Transformer(nn.Module):
    """Token embedding, layers and final norm: tokens and a memory to hidden states.

    Args:
        config: configuration of the transformer.
        vocab_size: number of tokens of the tokenizer.
        causal: whether a token attends only to itself and the tokens before it; else it attends to the whole text.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, causal: bool = True) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.padded_vocab_size or vocab_size
        self.causal = causal
        self.embedding = TokenEmbedding(config, self.vocab_size)
        cross_attention_index = {layer: index for index, layer in enumerate(config.cross_attention_layers)}
        self.layers = nn.ModuleList(
            DecoderLayer(config, cross_attention_index.get(i)) for i in range(config.num_layers)
        )
        self.norm = build_norm(
            config.norm if config.norm_placement == "pre" else "none", config.hidden_size, config.norm_eps
        )
        self.relative_position_bias: RelativePositionBias | None = None
        if config.cross_attention_positions == "relative":
            self.relative_position_bias = RelativePositionBias(config.num_heads, config.max_relative_distance)

    def hidden_states(
        self,
        tokens: Tensor,
        memory: Memory,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
        visibility: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [B, K, T, E] after the final norm; those of padding are not defined.

        Args:
            tokens: int [B, K, T], K texts over each memory.
            memory: keys and values of the sources, B rows.
            mask: bool [B, K, T], False for padding.
            cache: keys and values of earlier positions; extended in place.
            recorder: receives the queries of every cross-attention layer.
            visibility: bool [T, S], the slots that each text position may attend.

        Raises:
            MmxError: code `memory.shape`, if the memory is not one of this model for B rows; code
                `kv_cache.capacity`, if the tokens do not fit into the cache.
        """
        batch, streams, length = tokens.shape
        self._check_memory(memory, batch)
        tokens = tokens.flatten(0, 1)
        exists = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.flatten(0, 1)
        all_exist = exists if cache is None else cache.extend_mask(exists)
        positions = position_ids_from_mask(all_exist)[:, -length:]
        self_attention_mask = _self_attention_mask(all_exist, length, self.causal)
        inputs = self.cross_attention_inputs(memory, positions, visibility, recorder)
        if self.causal and mask is not None and cache is None and recorder is None:
            inputs = inputs._replace(indices=unpadded_indices(exists))
        x = self.embedding(tokens, positions)
        for index, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layer(index)
            x = layer(x, self_attention_mask, positions, layer_cache, inputs)
        if cache is not None:
            cache.advance(length)
        return self.norm(x).unflatten(0, (batch, streams))

    def cross_attention_inputs(
        self, memory: Memory, positions: Tensor, visibility: Tensor | None = None, recorder: Recorder | None = None
    ) -> CrossAttentionInputs:
        """Return memory, mask and bias of cross-attention for text positions, int [N, T]."""
        streams = len(positions) // memory.batch_size
        mask = memory.cross_attention_mask(streams, positions.shape[1], visibility)
        wait_k = self.config.wait_k
        if wait_k is None and self.relative_position_bias is None:
            return CrossAttentionInputs(memory, mask, None, recorder)
        distances = relative_distances(positions, memory)
        if wait_k is not None:
            allowed = wait_k_mask(distances, wait_k)
            mask = allowed if mask is None else mask & allowed
        bias = None if self.relative_position_bias is None else self.relative_position_bias(distances)
        return CrossAttentionInputs(memory, mask, bias, recorder)

    def empty_memory(self, batch: int) -> Memory:
        """Return a memory of `batch` rows without slots: the decoder over it is a plain language model."""
        config = self.config
        weight = self.embedding.weight
        num_layers = len(config.cross_attention_layers)
        return Memory.empty(
            num_layers, batch, config.num_heads, config.head_dim, dtype=weight.dtype, device=weight.device
        )

    def _check_memory(self, memory: Memory, batch: int) -> None:
        """Raise MmxError for a memory of other shape.

        Without this check, a memory of fewer rows would be treated as having more streams.
        """
        layers, rows, heads, _, head_dim = memory.keys.shape
        config = self.config
        expected_layers = len(config.cross_attention_layers)
        fits = layers in (1, expected_layers) and (rows, heads, head_dim) == (batch, config.num_heads, config.head_dim)
        if not fits:
            given = [layers, rows, heads, head_dim]
            expected = [expected_layers, batch, config.num_heads, config.head_dim]
            raise MmxError(
                f"the memory has [L, B, H, D] = {given}, expected {expected}; encode the inputs with this model, one "
                "row for each row of tokens.",
                code="memory.shape",
                given=given,
                expected=expected,
            )


def _self_attention_mask(exists: Tensor, length: int, causal: bool) -> Tensor | None:
    """Return the mask of the last `length` positions, bool [N, 1, length or 1, T]; None if all may be attended.

    Args:
        exists: bool [N, T], False for padding, earlier positions included.
    """
    if length == 1 and exists.device.type == "cpu" and bool(exists.all()):  # on a GPU the test would synchronize
        return None
    return _causal_mask(exists, length) if causal else exists[:, None, None]


def _causal_mask(exists: Tensor, length: int) -> Tensor:
    """Return the causal mask of the last `length` positions, bool [N, 1, length, T], without padding.

    A padded position attends to itself, so that no row of the kernel is empty; no other position attends to it.
    """
    total = exists.shape[1]
    rows = torch.arange(total - length, total, device=exists.device)[:, None]
    columns = torch.arange(total, device=exists.device)
    return (((columns <= rows) & exists[:, None]) | (columns == rows)).unsqueeze(1)
