"""Rows of memories: the indices of a selection, tensors with slices at some rows, and shapes to compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmx.errors import MmxError


def shape_without_slots(keys: Tensor) -> list[int]:
    """[L, B, H, D] of keys [L, B, H, S, D]."""
    layers, batch_size, heads, _, head_dim = keys.shape
    return [layers, batch_size, heads, head_dim]


def scatter_rows(tensor: Tensor, rows: Tensor, size: int, dim: int) -> Tensor:
    """Zeros of `size` along `dim`, with the slices of a tensor at `rows`."""
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.new_zeros(shape).index_copy(dim, rows, tensor)


def row_index(rows: Tensor | Sequence[int] | Sequence[bool], batch_size: int) -> Tensor:
    """The indices of `Memory.select`, int64. Raises MmxError (memory.rows)."""
    try:
        index = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        raise _rows_error(rows, batch_size) from None
    if index.numel() == 0:
        return index.new_zeros(0, dtype=torch.long)
    is_mask = index.dtype == torch.bool
    if index.ndim != 1 or index.is_floating_point() or index.is_complex() or (is_mask and len(index) != batch_size):
        raise _rows_error(rows, batch_size)
    if is_mask:
        return index.nonzero()[:, 0]
    if index.device.type == "cpu" and bool(((index < 0) | (index >= batch_size)).any()):
        raise _rows_error(rows, batch_size)
    return index.long()


def _rows_error(rows: object, batch_size: int) -> MmxError:
    given = " ".join(repr(rows).split())
    return MmxError(
        f"select was given {given[:60]}; expected a list of indices from 0 to {batch_size - 1}, or {batch_size} of "
        "True and False.",
        code="memory.rows",
        batch_size=batch_size,
    )
