"""Boxes: regions of an input that has a grid, such as an image, in relative coordinates.

A box is (x0, y0, x1, y1) in 0..1 from the top left, with x0 < x1 and y0 < y1. B memories, K streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mmx.errors import MmxError

Box: TypeAlias = tuple[float, float, float, float]
# One box, a box for each memory [B][4], or a box or None for each stream [B][K][4].
BoxInput: TypeAlias = Tensor | Sequence[float] | Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float] | None]]
NO_BOX: Box = (float("nan"),) * 4  # stands for None in a tensor of boxes: the stream is not restricted


def validate_boxes(box: BoxInput, batch_size: int) -> Tensor:
    """Return boxes as a tensor [1, 4], [B, 4] or [B, K, 4], with NaN for None. Raises MmxError (memory.box)."""
    try:
        boxes = box if isinstance(box, Tensor) else torch.tensor(_replace_none(box), dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise _box_error(box, batch_size) from error
    boxes = torch.atleast_2d(boxes.float())
    if not (_has_box_shape(boxes, batch_size) and _are_regions(boxes)):
        raise _box_error(box, batch_size)
    return boxes


def check_box(box: object) -> None:
    """Raise MmxError (memory.box) unless this is one box, or None for no restriction."""
    if box is not None and validate_boxes(box, 1).shape != (1, 4):  # type: ignore[arg-type]
        raise _box_error(box, 1)


def cells_in_boxes(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return which cells of a grid (rows, columns) overlap each box [..., 4] by more than an edge.

    Returns:
        bool [..., rows * columns].
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    rows = _cells_in_interval(y0, y1, grid[0])
    columns = _cells_in_interval(x0, x1, grid[1])
    return (rows[..., :, None] & columns[..., None, :]).flatten(-2)


def _has_box_shape(boxes: Tensor, batch_size: int) -> bool:
    if boxes.ndim > 3 or boxes.numel() == 0 or boxes.shape[-1] != 4:
        return False
    return boxes.shape == (1, 4) or len(boxes) == batch_size


def _are_regions(boxes: Tensor) -> bool:
    x0, y0, x1, y1 = boxes.unbind(-1)
    is_region = (x0 >= 0) & (y0 >= 0) & (x1 <= 1) & (y1 <= 1) & (x0 < x1) & (y0 < y1)
    if boxes.ndim == 3:
        is_region |= boxes.isnan().all(-1)  # a stream without a box
    return bool(is_region.all())


def _replace_none(box: object) -> object:
    """Nested lists with NO_BOX in place of None."""
    if not isinstance(box, list | tuple):
        return box
    return [NO_BOX if item is None else _replace_none(item) for item in box]


def _box_error(box: object, batch_size: int) -> MmxError:
    given = box.tolist() if isinstance(box, Tensor) else box
    return MmxError(
        f"the box {given} is not a region; expected x0,y0,x1,y1 in 0..1 with x0 < x1 and y0 < y1, "
        f"once, for each of {batch_size} memories, or for each stream of each.",
        code="memory.box",
        box=given,
    )


def _cells_in_interval(low: Tensor, high: Tensor, count: int) -> Tensor:
    """Which of `count` equal cells of 0..1 overlap each interval [...]: bool [..., count]."""
    edges = torch.arange(count + 1, device=low.device) / count
    return (edges[:-1] < high[..., None]) & (edges[1:] > low[..., None])
