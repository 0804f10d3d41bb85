"""KeyValueCache: what self-attention has already said, growing by one position a step. A value that its owner holds.

Alphabet: L decoder layers, N = B*K streams, H heads, T text positions, D head width.

Cross-attention needs none of this: its keys and values are static, and are `Memory`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmx.errors import MmxError


@dataclass
class KVCache:
    """Preallocated keys and values [L, N, H, capacity, D], the mask [N, capacity] of real tokens; `length` are held."""

    keys: Tensor
    values: Tensor
    mask: Tensor
    length: int = 0

    @staticmethod
    def allocate(layers: int, streams: int, heads: int, capacity: int, width: int, like: Tensor) -> KVCache:
        """An empty cache for `capacity` positions, of the device and type of `like`."""
        keys, values = (like.new_empty(layers, streams, heads, capacity, width) for _ in range(2))
        return KVCache(keys, values, torch.zeros(streams, capacity, dtype=torch.bool, device=like.device))

    def layer(self, index: int) -> LayerKVCache:
        """The view of one decoder layer."""
        return LayerKVCache(self, index)

    def extend_mask(self, mask: Tensor) -> Tensor:
        """Note which of the coming tokens [N, T] exist; return the mask [N, length + T] of all that exist then.

        Raises MmxError where they do not fit: one column written past the end would be dropped without a word.
        """
        end, capacity = self.length + mask.shape[1], self.mask.shape[1]
        if end > capacity:
            raise MmxError(f"the cache has room for {capacity} positions, not for {end}; allocate a larger capacity.")
        self.mask[:, self.length : end] = mask
        return self.mask[:, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions as held, once every layer has appended them."""
        self.length += tokens

    def reorder(self, index: Tensor) -> None:
        """Let stream i continue from what stream index[i] held. `index`: [M]: streams may also leave or multiply.

        Only the filled part moves, and where nobody changes place nothing; Memory is not touched by this, however many
        beams there are.
        """
        stays = torch.arange(self.keys.shape[1], device=index.device)
        if index.device.type == "cpu" and torch.equal(index, stays):  # to ask a GPU would cost more than it saves
            return
        for name in ("keys", "values"):
            held = getattr(self, name)
            moved = held[:, :, :, : self.length].index_select(1, index)
            if len(index) != held.shape[1]:
                held = held.new_empty(held.shape[0], len(index), *held.shape[2:])
                setattr(self, name, held)
            held[:, :, :, : self.length] = moved
        self.mask = self.mask.index_select(0, index)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class LayerKVCache:
    """One layer's view of a KeyValueCache, handed to that layer's self-attention."""

    cache: KVCache
    index: int

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Hold keys, values [N, H, T, D] of the coming tokens; return all that is held, [N, H, length + T, D]."""
        start, end = self.cache.length, self.cache.length + keys.shape[2]
        held_keys, held_values = self.cache.keys[self.index], self.cache.values[self.index]
        held_keys[:, :, start:end], held_values[:, :, start:end] = keys, values
        return held_keys[:, :, :end], held_values[:, :, :end]
