"""Cross-attention: queries from the text, keys and values from a Memory.

Axes: B memories, K streams, N = B*K, T text positions, S slots, H heads, D head dimension, E hidden size.
Masks: True = may be attended.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from mmx.config.schema import TransformerConfig
from mmx.memory import Memory
from mmx.nn.attention import attention, fold_streams, unfold_streams
from mmx.nn.layers import merge_heads, split_heads
from mmx.nn.unpadding import apply_unpadded


class Recorder(Protocol):
    """Receives the queries of every cross-attention layer. Recording is off by default and costs nothing."""

    def record(self, layer: int, queries: Tensor, inputs: CrossAttentionInputs) -> None:
        """Called by cross-attention layer number `layer` with its queries [B, H, K*T, D] and its inputs."""
        ...


class CrossAttentionInputs(NamedTuple):
    """What the cross-attention layers of one forward pass share.

    Attributes:
        memory: keys and values of the sources.
        mask: bool, broadcastable to [B, 1, K*T, S]; None if every slot may be attended.
        bias: added to the scores, [B, H, K*T, S]; None for no bias.
        recorder: receives the queries of every layer.
        indices: the text positions to be computed, see `mmx.nn.unpadding`; all if None.
    """

    memory: Memory
    mask: Tensor | None
    bias: Tensor | None = None
    recorder: Recorder | None = None
    indices: Tensor | None = None


class CrossAttention(nn.Module):
    """Multi-head attention to a memory. It has no key and value weights: the memory holds keys and values.

    Args:
        config: configuration of the transformer.
        index: number of this layer among those with cross-attention, which selects its keys and values in the memory.
    """

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.index = index
        inner = config.num_heads * config.head_dim
        self.query = nn.Linear(config.hidden_size, inner, bias=config.bias)
        self.out = nn.Linear(inner, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, inputs: CrossAttentionInputs) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        memory = inputs.memory
        queries = split_heads(apply_unpadded(self.query, x, inputs.indices), self.num_heads)
        queries = fold_streams(queries, memory.batch_size)
        if inputs.recorder is not None:
            inputs.recorder.record(self.index, queries, inputs)
        keys, values = memory.layer(self.index)
        output = attention(queries, keys.to(queries.dtype), values.to(queries.dtype), inputs.mask, inputs.bias)
        streams = len(x) // memory.batch_size
        return apply_unpadded(self.out, merge_heads(unfold_streams(output, streams)), inputs.indices)
