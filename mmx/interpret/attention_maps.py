"""Attention maps: recomputed from recorded queries and the memory's keys, by the same pure function that defines them.

Alphabet: B memories, K streams, T text positions, S slots, L looking layers, H heads, D head width.
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
    """Where each position of each stream looked in one looking layer: [B, K, T, H, S], each row summing to one.

    A row that could see nothing is all zeros. `memory`: the one that was looked at while the recorder took notes.
    """
    keys, _ = memory.layer(layer)
    maps = [
        attention_weights(noted.queries, keys.to(noted.queries.dtype), noted.mask, noted.bias)
        for noted in recorder.recorded(layer)
    ]
    return torch.cat([weights.unflatten(2, (streams, -1)).permute(0, 2, 3, 1, 4) for weights in maps], 2)


@torch.no_grad()
def attention_for_tokens(decoder: TextDecoder, memory: Memory, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Where a text that is already there looked, in every looking layer: [B, K, T, L, H, S].

    tokens: int [B, K, T], prompt and words; position t is where token t + 1 was chosen. One pass over the whole text
    asks what was asked word by word while it was said, whoever chose the words: greedily, by lot, or the best beam.
    """
    recorder = QueryRecorder()
    decoder.hidden_states(tokens, memory, mask, recorder=recorder)
    return all_attention_maps(recorder, memory, tokens.shape[1])


def all_attention_maps(recorder: QueryRecorder, memory: Memory, streams: int) -> Tensor:
    """The maps of all looking layers that a recorder holds: [B, K, T, L, H, S]."""
    return torch.stack([attention_maps(recorder, memory, streams, layer) for layer in recorder.layers], 3)


@torch.no_grad()
def value_weighted_attention(decoder: TextDecoder, memory: Memory, maps: Tensor) -> Tensor:
    """Maps [B, K, T, L, H, S] with each slot weighed by how much it hands over: A * ||V W_O||, the same shape.

    A slot that is looked at much and says nothing (a sink) vanishes. Source: Kobayashi et al. 2020, "Attention is Not
    Only a Weight", section 3.1; here with the opening of the layer's gate as a part of W_O.
    """
    norms = []
    for index, (block, opening) in enumerate(zip(cross_attention_layers(decoder), gate_values(decoder))):
        out: nn.Module = block.cross_attention.out  # type: ignore[union-attr]
        weight: Tensor = out.weights() if isinstance(out, PrepackedLinear) else out.weight  # type: ignore[assignment]
        by_head = weight.detach().float().unflatten(1, (decoder.config.num_heads, -1))  # [E, H, D]
        gram = torch.einsum("ehd,ehc->hdc", by_head, by_head)  # ||V W||^2 = V W W^T V^T, without S*E numbers
        values = memory.layer(index)[1].float()
        squared = torch.einsum("bhsd,hdc,bhsc->bhs", values, gram, values).clamp(min=0)
        norms.append(squared.sqrt() * abs(1.0 if opening is None else opening))
    return maps * torch.stack(norms, 1)[:, None, None].to(maps.dtype)
