"""Memory: the place where encoders and the decoder meet. It *is* the cross-attention cache, as a plain value.

Alphabet: L decoder layers, B memories (images), K streams (texts over one memory), H heads, S source slots, D head
width. Masks: True = may be attended.

Encode once, hold it, join it with others, narrow it to a region, save it, ask it many times.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmx.errors import MmxError

Box = tuple[float, float, float, float]
NO_BOX = (float("nan"),) * 4  # the box of a stream that points at nothing in particular, in a tensor of boxes


@dataclass(frozen=True)
class Segment:
    """Where a stretch of S came from. With a `grid`, its last rows*columns slots are the cells, row by row from the
    top left; slots before them (class tokens, registers) belong to the whole input."""

    source: str
    start: int
    stop: int
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Memory:
    """Keys and values in the decoder's heads, with the mask that says which exist.

    keys, values: [L, B, H, S, D]; L may be 1 and is then shared by all decoder layers. mask: bool [B, S].
    layout: the segments of S in order. shown: bool [B, K, S], what each of K streams may see of it (questions that
    point at different parts, or stand side by side); None where all may see all. Raises MmxError where the parts do
    not fit together.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    layout: tuple[Segment, ...]
    stream_mask: Tensor | None = None

    def __post_init__(self) -> None:
        validate_memory(self)

    @property
    def batch_size(self) -> int:
        """B, the number of memories."""
        return self.mask.shape[0]

    @property
    def num_slots(self) -> int:
        """S, the number of slots."""
        return self.mask.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] of the index-th looking layer (the one shared layer where L is 1)."""
        index = index if len(self.keys) > 1 else 0
        return self.keys[index], self.values[index]

    def select(self, rows: Tensor | Sequence[int]) -> Memory:
        """The memories named by `rows` (places, or one bool for each memory), in that order."""
        index = torch.as_tensor(rows, device=self.mask.device)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
        keys, values = (t.index_select(1, index) for t in (self.keys, self.values))
        shown = None if self.stream_mask is None else self.stream_mask.index_select(0, index)
        return Memory(keys, values, self.mask.index_select(0, index), self.layout, shown)

    def scatter(self, rows: Tensor, batch: int) -> Memory:
        """A memory of `batch` rows in which row i of this one stands at rows[i]; the other rows have nothing to see."""
        shape = list(self.keys.shape)
        shape[1] = batch
        keys, values = (t.new_zeros(shape).index_copy(1, rows, t) for t in (self.keys, self.values))
        mask, shown = self.mask.new_zeros(batch, self.num_slots).index_copy(0, rows, self.mask), self.stream_mask
        if shown is not None:
            shown = shown.new_zeros(batch, *shown.shape[1:]).index_copy(0, rows, shown)
        return Memory(keys, values, mask, self.layout, shown)

    def fold_streams(self, streams: int) -> Memory:
        """B*K rows become B rows of K*S slots, of which stream k may see only the k-th S: K questions, each read by a
        text encoder, side by side over one picture."""
        keys, values = (t.unflatten(1, (-1, streams)).transpose(2, 3).flatten(3, 4) for t in (self.keys, self.values))
        mask = self.mask.unflatten(0, (-1, streams)).flatten(1)
        layout = [
            replace(s, start=s.start + k * self.num_slots, stop=s.stop + k * self.num_slots)
            for k in range(streams)
            for s in self.layout
        ]
        own = torch.eye(streams, dtype=torch.bool, device=mask.device).repeat_interleave(self.num_slots, 1)
        return Memory(keys, values, mask, tuple(layout), own.expand(len(mask), -1, -1))

    def stream_mask_for(self, streams: int) -> Tensor | None:
        """bool [B, K, S]: which slots each of K `streams` may see; None where all may see all.

        Where there are more streams than views (beams of each question), they divide evenly, in order. Raises
        MmxError where they do not: some stream would be blind, or read another's question.
        """
        views = 1 if self.stream_mask is None else self.stream_mask.shape[1]
        if streams % views:
            raise MmxError(f"{streams} streams cannot share a memory of {views} questions; give a multiple of {views}.")
        return None if self.stream_mask is None else self.stream_mask.repeat_interleave(streams // views, 1)

    @cached_property
    def is_fully_visible(self) -> bool:
        """Whether every slot exists and every stream may see it."""
        return self.stream_mask is None and bool(self.mask.all())

    def cross_attention_mask(self, streams: int, length: int, visibility: Tensor | None = None) -> Tensor | None:
        """bool [B, 1, 1 or K*T, S]: which slots exist, less those another stream owns, less what `visibility` (bool
        [T, S]) withholds; K = `streams`, T = `length`, as cross-attention folds them. None where that is every slot."""
        if self.is_fully_visible and visibility is None:
            return None
        mask, shown = self.mask[:, None, None], self.stream_mask_for(streams)
        if visibility is None and shown is None:
            return mask
        seen = mask if shown is None else mask & shown[:, :, None]
        seen = seen if visibility is None else seen & visibility
        return seen.expand(-1, streams, length, -1).flatten(1, 2)[:, None]

    def mask_out(self, hidden: Tensor) -> Memory:
        """The same memory with the slots where `hidden` (bool, broadcastable to [B, S]) is True masked out."""
        return replace(self, mask=self.mask & ~hidden)

    def focus(self, box: Box | Sequence[Any] | Tensor) -> Memory:
        """Keep, of every source with a grid, the cells that touch `box` (x0, y0, x1, y1 in 0..1 from the top left).

        One box for all memories, one for each [B][4], or one for each of K streams [B][K][4], where None (in a tensor:
        NaN) points at nothing and sees all. Sources without a grid stay; slots of the whole input (class tokens) go,
        for they have seen what lies outside. Nothing is encoded again.
        """
        boxes = _as_boxes(box, self.batch_size).to(self.mask.device)
        inside = boxes.new_ones(*boxes.shape[:-1], self.num_slots, dtype=torch.bool)
        for segment in self.layout:
            if segment.grid:
                inside[..., segment.start : segment.stop] = False
                cells = _cells_in_boxes(boxes, segment.grid)
                inside[..., segment.stop - cells.shape[-1] : segment.stop] = cells
        inside |= boxes.isnan().any(-1, keepdim=True)
        if boxes.ndim < 3:
            return self.mask_out(~inside)
        shown = self.stream_mask_for(boxes.shape[1])
        return replace(self, stream_mask=inside if shown is None else shown & inside)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Memory:
        """The same memory on another device, or with keys and values of another floating type."""
        shown = None if self.stream_mask is None else self.stream_mask.to(device)
        keys, values = (t.to(device, dtype) for t in (self.keys, self.values))
        return Memory(keys, values, self.mask.to(device), self.layout, shown)

    def save(self, path: str | Path) -> None:
        """Write the memory as one safetensors file."""
        from safetensors.torch import save_file

        layout = [[s.source, s.start, s.stop, s.grid] for s in self.layout]
        tensors = {"keys": self.keys, "values": self.values, "mask": self.mask}
        if self.stream_mask is not None:
            tensors["stream_mask"] = self.stream_mask
        save_file({k: t.contiguous() for k, t in tensors.items()}, str(path), metadata={"layout": json.dumps(layout)})

    @staticmethod
    def load(path: str | Path) -> Memory:
        """Read a memory written by `save`. Raises MmxError where the file is not one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                layout = json.loads((file.metadata() or {})["layout"])
                keys, values, mask = (file.get_tensor(name) for name in ("keys", "values", "mask"))
                shown = file.get_tensor("stream_mask") if "stream_mask" in file.keys() else None  # noqa: SIM118 (not a dict)
            segments = [Segment(n, start, stop, tuple(grid) if grid else None) for n, start, stop, grid in layout]
        except (SafetensorError, KeyError, OSError, ValueError, TypeError) as error:
            raise MmxError(f"{path} is not a saved memory; expected a file written by Memory.save.") from error
        return Memory(keys, values, mask, tuple(segments), shown)

    @staticmethod
    def empty(layers: int, batch: int, heads: int, width: int, **kind: object) -> Memory:
        """A memory with nothing to see: S = 0. The same decoder over it says what it would say without looking."""
        nothing = torch.zeros(layers, batch, heads, 0, width, **kind)  # type: ignore[call-overload]
        return Memory(nothing, nothing, torch.zeros(batch, 0, dtype=torch.bool, device=nothing.device), ())


def cat(*memories: Memory) -> Memory:
    """One memory of all the slots, side by side along S. The order of the joined changes no output.

    Raises MmxError where batch, layers, heads or widths differ. Memories of one shared layer join only with their like.
    """
    if not memories:
        raise MmxError("join was given no memory; pass at least one, such as model.encode(image=...).")
    first = memories[0]
    if len(memories) == 1:
        return first
    for other in memories[1:]:
        if _shape_without_slots(other.keys) != _shape_without_slots(first.keys):
            raise MmxError(
                f"memories of [L, B, H, D] {_shape_without_slots(first.keys)} and {_shape_without_slots(other.keys)} cannot be "
                "joined; encode the sources with the same model and for the same number of rows."
            )
    keys, values = (torch.cat([getattr(m, part) for m in memories], 3) for part in ("keys", "values"))
    layout, start = [], 0
    for memory in memories:
        layout += [replace(s, start=s.start + start, stop=s.stop + start) for s in memory.layout]
        start += memory.num_slots
    mask = torch.cat([m.mask for m in memories], 1)
    return Memory(keys, values, mask, tuple(layout), _cat_stream_masks(memories))


def validate_memory(memory: Memory) -> None:
    """Raise MmxError unless the parts of a memory fit together."""
    keys, values, mask = memory.keys, memory.values, memory.mask
    if keys.ndim != 5 or keys.shape != values.shape:
        raise MmxError(
            f"keys {list(keys.shape)} and values {list(values.shape)} are no memory; both must be [L, B, H, S, D]."
        )
    if mask.dtype != torch.bool or mask.shape != (keys.shape[1], keys.shape[3]):
        raise MmxError(
            f"the mask is {mask.dtype} {list(mask.shape)}; expected bool [B, S] = "
            f"{[keys.shape[1], keys.shape[3]]}, True = may be attended."
        )
    shown = memory.stream_mask
    if shown is not None and (shown.ndim != 3 or shown.dtype != torch.bool or shown[:, 0].shape != mask.shape):
        raise MmxError(
            f"what is shown is {shown.dtype} {list(shown.shape)}; expected bool [B, K, S] with [B, S] = "
            f"{list(mask.shape)}, True = stream k may see it."
        )
    end = 0
    for segment in memory.layout:
        cells = segment.grid[0] * segment.grid[1] if segment.grid else 0
        if segment.start != end or segment.stop - segment.start < cells:
            raise MmxError(f"segment {segment} does not continue at slot {end} or is shorter than its grid.")
        end = segment.stop
    if end != memory.num_slots:
        raise MmxError(f"the layout covers {end} of {memory.num_slots} slots; every slot belongs to one source.")


def _shape_without_slots(keys: Tensor) -> list[int]:
    layers, batch, heads, _, width = keys.shape
    return [layers, batch, heads, width]


def _cat_stream_masks(memories: Sequence[Memory]) -> Tensor | None:
    """bool [B, K, S] of joined memories; one that shows everything to everybody follows the others."""
    views = max((m.stream_mask.shape[1] for m in memories if m.stream_mask is not None), default=0)
    if not views:
        return None
    parts = [(m.stream_mask_for(views), m.mask.new_ones(m.batch_size, views, m.num_slots)) for m in memories]
    return torch.cat([everything if shown is None else shown for shown, everything in parts], -1)


def _as_boxes(box: Any, batch: int) -> Tensor:
    """[1 or B, 4] or [B, K, 4]. Raises MmxError for what is no region."""
    try:
        given = box if isinstance(box, Tensor) else torch.tensor(_boxes_without_none(box), dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise MmxError(_box_error(box, batch)) from error
    boxes = torch.atleast_2d(given.float())
    good = (
        boxes.ndim < 4 and boxes.numel() > 0 and boxes.shape[-1] == 4 and (boxes.shape == (1, 4) or len(boxes) == batch)
    )
    if good:
        x0, y0, x1, y1 = boxes.unbind(-1)
        regions = (x0 >= 0) & (y0 >= 0) & (x1 <= 1) & (y1 <= 1) & (x0 < x1) & (y0 < y1)
        good = bool((regions | (boxes.isnan().all(-1) & (boxes.ndim == 3))).all())
    if not good:
        raise MmxError(_box_error(box, batch))
    return boxes


def check_box(box: Any) -> None:
    """Raise MmxError for what is no region of one picture; None is everywhere."""
    if box is not None and _as_boxes(box, 1).shape != (1, 4):
        raise MmxError(_box_error(box, 1))


def _boxes_without_none(box: Any) -> Any:
    """Streams that point at nothing, None, get the box that says so."""
    return (
        [NO_BOX if part is None else _boxes_without_none(part) for part in box]
        if isinstance(box, list | tuple)
        else box
    )


def _box_error(box: Any, batch: int) -> str:
    shown = box.tolist() if isinstance(box, Tensor) else box
    return (
        f"the box {shown} is no region; expected x0,y0,x1,y1 in 0..1 with x0 < x1 and y0 < y1, "
        f"once, for each of {batch} memories, or for each stream of each."
    )


def _cells_in_boxes(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool [..., rows*columns]: which cells of the grid overlap each box [..., 4] by more than an edge."""

    def touched(low: Tensor, high: Tensor, count: int) -> Tensor:
        edges = torch.arange(count + 1, device=boxes.device) / count
        return (edges[:-1] < high[..., None]) & (edges[1:] > low[..., None])

    x0, y0, x1, y1 = boxes.unbind(-1)
    rows, columns = touched(y0, y1, grid[0]), touched(x0, x1, grid[1])
    return (rows[..., :, None] & columns[..., None, :]).flatten(-2)
