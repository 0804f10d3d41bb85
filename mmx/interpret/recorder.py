"""Recorder of cross-attention queries, passed to the decoder as an argument. It needs no hooks.

Axes: B memories, K streams, T text positions, S slots, H heads, D head dimension.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from mmx.nn.cross_attention import CrossAttentionInputs


class RecordedQueries(NamedTuple):
    """One call of one layer: queries [B, H, K*T, D], and the mask and bias of its scores (see CrossAttentionInputs)."""

    queries: Tensor
    mask: Tensor | None
    bias: Tensor | None


class QueryRecorder:
    """Records the queries of every cross-attention layer during forward passes of a decoder or a CachedDecodeStep."""

    def __init__(self) -> None:
        self._calls: dict[int, list[RecordedQueries]] = defaultdict(list)

    def record(self, layer: int, queries: Tensor, inputs: CrossAttentionInputs) -> None:
        """Store the queries [B, H, K*T, D] of one call of a layer. The decoder calls this."""
        bias = None if inputs.bias is None else inputs.bias.detach()
        self._calls[layer].append(RecordedQueries(queries.detach(), inputs.mask, bias))

    @property
    def layers(self) -> list[int]:
        """Indices of the cross-attention layers with recorded calls."""
        return sorted(self._calls)

    def recorded(self, layer: int) -> list[RecordedQueries]:
        """All calls of one layer, in order."""
        return list(self._calls[layer])

    def queries(self, layer: int, streams: int) -> Tensor:
        """Queries of one layer, [B, H, K, T, D], its calls concatenated along T; K is `streams`."""
        return torch.cat([call.queries.unflatten(2, (streams, -1)) for call in self._calls[layer]], 3)
