"""Relative positions between text positions and slots, and the learned bias that depends on them.

Axes: B memories, K streams, N = B*K, T text positions, S slots, H heads.

Only slots of a source without a grid, such as a text or audio, have a distance to a text position. No bias is added to
the slots of a grid. Text positions include the tokens of the prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmx.memory import Memory


class RelativeDistances(NamedTuple):
    """Distances between slots and text positions.

    Attributes:
        offset: int [B, K*T, S], position of the slot in its source minus the text position.
        ordered: bool [S], False for the slots of a grid, whose offset has no meaning.
    """

    offset: Tensor
    ordered: Tensor


def relative_distances(positions: Tensor, memory: Memory) -> RelativeDistances:
    """Return the distance of every slot of a memory of B rows from text positions, int [N, T]."""
    indices = [torch.zeros(0, dtype=torch.long)]
    ordered = [torch.zeros(0, dtype=torch.bool)]
    for segment in memory.layout:
        count = segment.stop - segment.start
        indices.append(torch.arange(count))
        ordered.append(torch.full((count,), segment.grid is None))
    slot_positions = torch.cat(indices).to(positions.device)
    text_positions = positions.reshape(memory.batch_size, -1, 1)
    return RelativeDistances(slot_positions - text_positions, torch.cat(ordered).to(positions.device))


class RelativePositionBias(nn.Module):
    """A learned bias per head and distance, shared by all layers (Raffel et al. 2020, "T5", section 2.1).

    It is used between a text and a source, without buckets: distances are clipped to `max_distance`.
    """

    def __init__(self, num_heads: int, max_distance: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.zeros(num_heads, 2 * max_distance + 1))

    def forward(self, distances: RelativeDistances) -> Tensor:
        """Return the bias that is added to the attention scores, [B, H, K*T, S]."""
        index = distances.offset.clamp(-self.max_distance, self.max_distance) + self.max_distance
        return (self.weight[:, index] * distances.ordered).transpose(0, 1)
