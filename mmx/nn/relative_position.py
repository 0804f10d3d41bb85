"""How far a slot stands from the word in hand: a bias on the scores, and a view that opens word by word.

Alphabet: B memories, K streams, N = B*K, T text positions, S slots, H heads. Masks: True = may be attended.

Only a source whose slots follow each other (a text, a sound) has distances to a text; slots of a grid have none: no
bias is added to them, and they are in view from the start. Text positions count the prompt's tokens too.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmx.memory import Memory


class RelativeDistances(NamedTuple):
    """offset: int [B, K*T, S], the slot's place in its source less the text position; ordered: bool [S], where that
    means something."""

    offset: Tensor
    ordered: Tensor


class Recorder(Protocol):
    """Anything that wants to know what was asked: it is handed every looking layer's queries [B, H, K*T, D], and the
    sight they were asked in."""

    def record(self, layer: int, queries: Tensor, sight: CrossAttentionInputs) -> None: ...


class CrossAttentionInputs(NamedTuple):
    """What a text looks at: the memory, the slots it may see (bool, broadcastable to [B, 1, K*T, S]; None: all), what
    is added to its scores ([B, H, K*T, S] or None), and who takes notes."""

    memory: Memory
    mask: Tensor | None
    bias: Tensor | None = None
    recorder: Recorder | None = None


def relative_distances(positions: Tensor, memory: Memory) -> RelativeDistances:
    """positions: int [N, T] of the texts, streams of the memory's B rows -> the distance of every slot."""
    places, ordered = [], []
    for segment in memory.layout:
        count = segment.stop - segment.start
        places.append(torch.arange(count))
        ordered.append(torch.full((count,), segment.grid is None))
    empty = torch.zeros(0)
    place = torch.cat([empty.long(), *places]).to(positions.device)
    position = positions.reshape(memory.batch_size, -1, 1)
    return RelativeDistances(place - position, torch.cat([empty.bool(), *ordered]).to(positions.device))


class RelativePositionBias(nn.Module):
    """One trained number a head for every distance, the same in all layers (Raffel et al. 2020, "T5", section 2.1;
    here between a text and a source, and without buckets): distances beyond `reach` count as `reach`."""

    def __init__(self, heads: int, reach: int) -> None:
        super().__init__()
        self.max_distance = reach
        self.weight = nn.Parameter(torch.zeros(heads, 2 * reach + 1))

    def forward(self, given: RelativeDistances) -> Tensor:
        """What is added to the scores, [B, H, K*T, S]."""
        index = given.offset.clamp(-self.max_distance, self.max_distance) + self.max_distance
        return (self.weight[:, index] * given.ordered).transpose(0, 1)


def wait_k_mask(given: RelativeDistances, k: int) -> Tensor:
    """bool [B, 1, K*T, S]: of an ordered source, text position t sees the first t + k slots, and no more."""
    return ((given.offset < k) | ~given.ordered)[:, None]


def wait_k_visibility(length: int, slots: int, k: int) -> Tensor:
    """bool [T, S], a `visibility`: step t sees the first t + k slots (Ma et al. 2019, "STACL", section 3.2).

    With k = 1 it is the monotonic view: at each step one slot more.
    """
    return torch.arange(slots) < torch.arange(length)[:, None] + k
