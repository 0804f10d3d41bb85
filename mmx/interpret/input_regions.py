"""Regions of a source's prepared inputs that correspond to its slots.

Axes: B rows, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor


class InputRegion(NamedTuple):
    """A region of one input tensor. tensor: its name; slices: an index into its axes, rows first."""

    tensor: str
    slices: tuple[slice | EllipsisType, ...]


def input_regions(inputs: Mapping[str, Tensor], slots: int, grid: tuple[int, int] | None) -> list[InputRegion]:
    """Divide the first tensor of a source's inputs that is not a mask into regions; an empty list if there is none.

    Pixels [B, C, height, width] with a grid are divided into the areas of its cells. Other tensors are divided along
    the sequence axis (the axis as long as the mask, else the last) into single elements, or into as many equal parts as
    there are slots if there are more elements than slots.

    Args:
        inputs: tensors by name, as the encoder collates them.
        slots: the number of slots of the source.
        grid: (rows, columns), or None.
    """
    name = next((n for n, tensor in inputs.items() if tensor.dtype != torch.bool and tensor.ndim > 1), None)
    if name is None:
        return []
    tensor = inputs[name]
    if grid is not None and tensor.ndim > 3:
        rows = _divide(tensor.shape[-2], grid[0])
        columns = _divide(tensor.shape[-1], grid[1])
        return [InputRegion(name, (..., row, column)) for row in rows for column in columns]
    mask_lengths = {t.shape[1] for t in inputs.values() if t.dtype == torch.bool and t.ndim == 2}
    axis = 1 if tensor.shape[1] in mask_lengths else tensor.ndim - 1
    leading = (slice(None),) * axis
    length = tensor.shape[axis]
    return [InputRegion(name, (*leading, part)) for part in _divide(length, min(length, slots))]


def _divide(length: int, count: int) -> list[slice]:
    """`count` consecutive slices of nearly equal length."""
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]
