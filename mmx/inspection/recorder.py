"""Recorder: notes the queries of every looking layer while the decoder speaks. No hooks, no switch of kernels.

Alphabet: B memories, K streams, T text positions, H heads, D head width.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class Recorder:
    """Hand it to the decoder (or a DecoderStep); afterwards `queries(layer, streams)` is all that was asked there."""

    def __init__(self) -> None:
        self._noted: dict[int, list[Tensor]] = defaultdict(list)

    def note(self, layer: int, queries: Tensor) -> None:
        """Called by looking layer number `layer` with its queries [B, H, K*T, D]."""
        self._noted[layer].append(queries.detach())

    @property
    def layers(self) -> list[int]:
        """The looking layers that noted something."""
        return sorted(self._noted)

    def queries(self, layer: int, streams: int) -> Tensor:
        """[B, H, K, T, D] of one layer, the texts of the calls one after the other. K = `streams` of each memory."""
        return torch.cat([noted.unflatten(2, (streams, -1)) for noted in self._noted[layer]], 3)
