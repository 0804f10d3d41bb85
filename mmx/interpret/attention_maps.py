"""Attention maps, computed from recorded queries and the keys of a memory.

Axes: B memories, K streams, T text positions, S slots, L cross-attention layers, H heads, D head dimension,
E hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmx.interpret.attention_stats import cross_attention_layers, gate_values
from mmx.interpret.recorder import QueryRecorder
from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.nn.attention import attention_weights
from mmx.nn.prepack import PrepackedLinear


def attention_maps(recorder: QueryRecorder, memory: Memory, streams: int, layer: int) -> Tensor:
    """Attention weights of one cross-attention layer, [B, K, T, H, S], summing to one over S.

    A row without a visible slot is all zeros. `memory` is the one that was passed to the decoder with the recorder.
    """
    keys, _ = memory.layer(layer)
    maps = []
    for call in recorder.recorded(layer):
        weights = attention_weights(call.queries, keys.to(call.queries.dtype), call.mask, call.bias)
        maps.append(weights.unflatten(2, (streams, -1)).permute(0, 2, 3, 1, 4))
    return torch.cat(maps, 2)


@torch.no_grad()
def attention_for_tokens(decoder: TextDecoder, memory: Memory, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention weights of all cross-attention layers for given texts, [B, K, T, L, H, S].

    One forward pass under teacher forcing computes the queries that token-by-token generation of the same text
    computes, for every decoding method.

    Args:
        decoder: a TextDecoder.
        memory: the memory of B rows.
        tokens: int [B, K, T], prompt and text. Position t predicts token t + 1.
        mask: bool [B, K, T], False where a token is padding.
    """
    recorder = QueryRecorder()
    decoder.hidden_states(tokens, memory, mask, recorder=recorder)
    return all_attention_maps(recorder, memory, tokens.shape[1])


def all_attention_maps(recorder: QueryRecorder, memory: Memory, streams: int) -> Tensor:
    """Attention weights of every recorded layer, [B, K, T, L, H, S]."""
    return torch.stack([attention_maps(recorder, memory, streams, layer) for layer in recorder.layers], 3)


@torch.no_grad()
def value_weighted_attention(decoder: TextDecoder, memory: Memory, maps: Tensor) -> Tensor:
    """Attention times the norm of each slot's transformed value, A * ||V W_O||: [B, K, T, L, H, S] -> the same shape.

    Slots with large weight and small values (attention sinks) get a small result. Source: Kobayashi et al. 2020,
    "Attention is Not Only a Weight", section 3.1. Here W_O includes the gate of the layer.
    """
    norms = []
    gates = gate_values(decoder)
    for index, layer in enumerate(cross_attention_layers(decoder)):
        out: nn.Module = layer.cross_attention.out  # type: ignore[union-attr]
        weight: Tensor = out.dense_weight() if isinstance(out, PrepackedLinear) else out.weight  # type: ignore[assignment]
        by_head = weight.detach().float().unflatten(1, (decoder.config.num_heads, -1))  # [E, H, D]
        gram = torch.einsum("ehd,ehc->hdc", by_head, by_head)  # ||V W||^2 = V W W^T V^T avoids a tensor of S*E numbers
        values = memory.layer(index)[1].float()
        squared = torch.einsum("bhsd,hdc,bhsc->bhs", values, gram, values).clamp(min=0)
        gate = gates[index]
        norms.append(squared.sqrt() * abs(1.0 if gate is None else gate))
    return maps * torch.stack(norms, 1)[:, None, None].to(maps.dtype)
