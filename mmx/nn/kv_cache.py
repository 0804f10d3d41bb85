"""KV cache of self-attention. The caller owns it and passes it to the decoder; modules keep no state.

Axes: L decoder layers, N = B*K streams, H key-value heads, T text positions, D head dimension.

Cross-attention needs no such cache: its keys and values are static, and are the `Memory`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmx.errors import MmxError


class KeysValues(NamedTuple):
    """Keys and values of one layer, [N, H, T, D] each."""

    keys: Tensor
    values: Tensor


@dataclass
class KVCache:
    """Preallocated keys and values with the mask of the tokens that exist.

    Attributes:
        keys: [L, N, H, capacity, D].
        values: [L, N, H, capacity, D].
        mask: bool [N, capacity], False for padding.
        length: number of filled positions.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    length: int = 0

    @staticmethod
    def allocate(num_layers: int, streams: int, num_heads: int, capacity: int, head_dim: int, like: Tensor) -> KVCache:
        """Return an empty cache for `capacity` positions, with the device and dtype of `like`."""
        shape = (num_layers, streams, num_heads, capacity, head_dim)
        mask = torch.zeros(streams, capacity, dtype=torch.bool, device=like.device)
        return KVCache(like.new_empty(shape), like.new_empty(shape), mask)

    def layer(self, index: int) -> LayerKVCache:
        """Return the view of one decoder layer."""
        return LayerKVCache(self, index)

    def extend_mask(self, mask: Tensor) -> Tensor:
        """Write the mask [N, T] of the next tokens; return the mask [N, length + T] of all positions.

        Raises:
            MmxError: code `kv_cache.capacity`, if the tokens do not fit. Without this check the assignment to an
                empty slice would broadcast and drop them silently.
        """
        end = self.length + mask.shape[1]
        capacity = self.mask.shape[1]
        if end > capacity:
            raise MmxError(
                f"the cache has a capacity of {capacity} positions and was given {end}; allocate a larger capacity.",
                code="kv_cache.capacity",
                capacity=capacity,
                needed=end,
            )
        self.mask[:, self.length : end] = mask
        return self.mask[:, :end]

    def advance(self, count: int) -> None:
        """Add `count` positions to `length`, after every layer has appended them."""
        self.length += count

    def reorder(self, index: Tensor) -> None:
        """Let stream i continue from the past of stream index[i]. The number of streams may change.

        Only filled positions are copied, and nothing if the order stays the same. The memory is never reordered.

        Args:
            index: int [M], the streams to continue from.
        """
        unchanged = torch.arange(self.keys.shape[1], device=index.device)
        if index.device.type == "cpu" and torch.equal(index, unchanged):  # on a GPU the comparison would synchronize
            return
        self.keys = self._reordered(self.keys, index)
        self.values = self._reordered(self.values, index)
        self.mask = self.mask.index_select(0, index)

    def _reordered(self, cached: Tensor, index: Tensor) -> Tensor:
        """Copy the filled positions of `cached` in the new order, in place where the number of streams stays."""
        filled = cached[:, :, :, : self.length].index_select(1, index)
        if len(index) != cached.shape[1]:
            cached = cached.new_empty(cached.shape[0], len(index), *cached.shape[2:])
        cached[:, :, :, : self.length] = filled
        return cached

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class LayerKVCache:
    """One layer's view of a KVCache, passed to the self-attention of that layer."""

    cache: KVCache
    index: int

    def append(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Store the keys and values [N, H, T, D] of the next tokens; return all, [N, H, length + T, D]."""
        start = self.cache.length
        end = start + keys.shape[2]
        cached_keys = self.cache.keys[self.index]
        cached_values = self.cache.values[self.index]
        cached_keys[:, :, start:end] = keys
        cached_values[:, :, start:end] = values
        return KeysValues(cached_keys[:, :, :end], cached_values[:, :, :end])
