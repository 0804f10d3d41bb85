"""Attention maps: recomputed from recorded queries and the memory's keys, by the same pure function that defines them.

Alphabet: B memories, K streams, T text positions, S slots, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmx.attention import attention_weights
from mmx.inspection.recorder import Recorder
from mmx.memory import Memory


def attention_maps(
    recorder: Recorder, memory: Memory, streams: int, layer: int, visibility: Tensor | None = None
) -> Tensor:
    """Where each position of each stream looked in one looking layer: [B, K, T, H, S], each row summing to one.

    `visibility` as it was given to the decoder. A row that could see nothing is all zeros.
    """
    queries = recorder.queries(layer, streams)
    keys, _ = memory.layer(layer)
    mask = memory.attendable(streams, queries.shape[3], visibility)
    weights = attention_weights(queries.flatten(2, 3), keys.to(queries.dtype), mask)
    return weights.unflatten(2, (streams, -1)).permute(0, 2, 3, 1, 4)


def entropy(weights: Tensor) -> Tensor:
    """Shannon entropy in bits of each spotlight [..., S] -> [...]; 0 on one slot, log2 S for the plain average."""
    return -(weights * torch.where(weights > 0, weights, 1.0).log2()).sum(-1)
