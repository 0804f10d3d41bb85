"""Recorder: notes the queries of every looking layer while the decoder speaks. No hooks, no switch of kernels.

Alphabet: B memories, K streams, T text positions, S slots, H heads, D head width.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from mmx.nn.relative_position import CrossAttentionInputs


class RecordedQueries(NamedTuple):
    """One call of one layer: queries [B, H, K*T, D], and the mask and bias of their scores (see `Sight`)."""

    queries: Tensor
    mask: Tensor | None
    bias: Tensor | None


class QueryRecorder:
    """Hand it to the decoder (or a DecoderStep); afterwards `queries(layer, streams)` is all that was asked there."""

    def __init__(self) -> None:
        self._noted: dict[int, list[RecordedQueries]] = defaultdict(list)

    def record(self, layer: int, queries: Tensor, sight: CrossAttentionInputs) -> None:
        """Called by looking layer number `layer` with its queries [B, H, K*T, D]."""
        bias = None if sight.bias is None else sight.bias.detach()
        self._noted[layer].append(RecordedQueries(queries.detach(), sight.mask, bias))

    @property
    def layers(self) -> list[int]:
        """The looking layers that noted something."""
        return sorted(self._noted)

    def recorded(self, layer: int) -> list[RecordedQueries]:
        """The calls of one layer, one after the other."""
        return list(self._noted[layer])

    def queries(self, layer: int, streams: int) -> Tensor:
        """[B, H, K, T, D] of one layer, the texts of the calls one after the other. K = `streams` of each memory."""
        return torch.cat([noted.queries.unflatten(2, (streams, -1)) for noted in self._noted[layer]], 3)
