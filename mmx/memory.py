"""Memory: the place where encoders and the decoder meet. It *is* the cross-attention cache, as a plain value.

Alphabet: L decoder layers, B memories (images), H heads, S source slots, D head width. Masks: True = may be attended.

Encode once, hold it, join it with others, narrow it to a region, save it, ask it many times.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmx.errors import MmxError

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Segment:
    """Where a stretch of S came from. With a `grid`, its last rows*columns slots are the cells, row by row from the
    top left; slots before them (class tokens, registers) belong to the whole input. With a `stream`, only that one of
    the K streams may look here: K questions, each read by a text encoder, stand side by side over one picture."""

    source: str
    start: int
    stop: int
    grid: tuple[int, int] | None = None
    stream: int | None = None


@dataclass(frozen=True)
class Memory:
    """Keys and values in the decoder's heads, with the mask that says which exist.

    keys, values: [L, B, H, S, D]; L may be 1 and is then shared by all decoder layers. mask: bool [B, S].
    layout: the segments of S in order. Raises MmxError where the parts do not fit together.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    layout: tuple[Segment, ...]

    def __post_init__(self) -> None:
        check(self)

    @property
    def batch(self) -> int:
        """B, the number of memories."""
        return self.mask.shape[0]

    @property
    def slots(self) -> int:
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
        return Memory(keys, values, self.mask.index_select(0, index), self.layout)

    def spread(self, rows: Tensor, batch: int) -> Memory:
        """A memory of `batch` rows in which row i of this one stands at rows[i]; the other rows have nothing to see."""
        shape = list(self.keys.shape)
        shape[1] = batch
        keys, values = (t.new_zeros(shape).index_copy(1, rows, t) for t in (self.keys, self.values))
        return Memory(keys, values, self.mask.new_zeros(batch, self.slots).index_copy(0, rows, self.mask), self.layout)

    def by_stream(self, streams: int) -> Memory:
        """B*K rows become B rows of K*S slots, of which stream k may see only the k-th S."""
        keys, values = (t.unflatten(1, (-1, streams)).transpose(2, 3).flatten(3, 4) for t in (self.keys, self.values))
        layout = [
            replace(s, start=s.start + k * self.slots, stop=s.stop + k * self.slots, stream=k)
            for k in range(streams)
            for s in self.layout
        ]
        return Memory(keys, values, self.mask.unflatten(0, (-1, streams)).flatten(1), tuple(layout))

    def visible(self, streams: int) -> Tensor | None:
        """bool [K, S]: which slots each of K `streams` may see; None where all may see all.

        Where there are more streams than owners (beams of each question), they divide evenly, in order. Raises
        MmxError where they do not: some stream would be blind, or read another's question.
        """
        owners = max((s.stream for s in self.layout if s.stream is not None), default=-1) + 1
        if not owners:
            return None
        if streams % owners:
            raise MmxError(
                f"{streams} streams cannot share a memory of {owners} questions; give a multiple of {owners}."
            )
        facts = [(-1 if s.stream is None else s.stream, s.stop - s.start) for s in self.layout]
        owner, lengths = torch.tensor(facts, device=self.mask.device).unbind(-1)
        of_slot = owner.repeat_interleave(lengths)
        of_stream = torch.arange(streams, device=self.mask.device) // (streams // owners)
        return (of_slot == -1) | (of_slot == of_stream[:, None])

    def attendable(self, streams: int, length: int, visibility: Tensor | None = None) -> Tensor:
        """bool [B, 1, 1 or K*T, S]: which slots exist, less those another stream owns, less what `visibility` (bool
        [T, S]) withholds; K = `streams`, T = `length`, as cross-attention folds them."""
        mask, owned = self.mask[:, None, None], self.visible(streams)
        if visibility is None and owned is None:
            return mask
        seen = torch.ones_like(self.mask[:1]) if visibility is None else visibility
        if owned is not None:
            seen = seen & owned[:, None]
        return mask & seen.expand(streams, length, self.slots).flatten(0, 1)

    def hide(self, hidden: Tensor) -> Memory:
        """The same memory with the slots where `hidden` (bool, broadcastable to [B, S]) is True masked out."""
        return replace(self, mask=self.mask & ~hidden)

    def focus(self, box: Box | Sequence[Box]) -> Memory:
        """Keep, of every source with a grid, the cells that touch `box` (x0, y0, x1, y1 in 0..1 from the top left).

        One box for all memories or one for each. Sources without a grid stay; slots of the whole input (class tokens)
        go, for they have seen what lies outside. Nothing is encoded again.
        """
        boxes = torch.atleast_2d(torch.as_tensor(box, dtype=torch.float32, device=self.mask.device))
        _check_boxes(boxes, self.batch)
        inside = torch.ones(len(boxes), self.slots, dtype=torch.bool, device=self.mask.device)
        for segment in self.layout:
            if segment.grid:
                inside[:, segment.start : segment.stop] = False
                cells = _cells_touched(boxes, segment.grid)
                inside[:, segment.stop - cells.shape[1] : segment.stop] = cells
        return self.hide(~inside)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Memory:
        """The same memory on another device, or with keys and values of another floating type."""
        return Memory(self.keys.to(device, dtype), self.values.to(device, dtype), self.mask.to(device), self.layout)

    def save(self, path: str | Path) -> None:
        """Write the memory as one safetensors file."""
        from safetensors.torch import save_file

        layout = [[s.source, s.start, s.stop, s.grid, s.stream] for s in self.layout]
        tensors = {"keys": self.keys, "values": self.values, "mask": self.mask}
        save_file({k: t.contiguous() for k, t in tensors.items()}, str(path), metadata={"layout": json.dumps(layout)})

    @staticmethod
    def load(path: str | Path) -> Memory:
        """Read a memory written by `save`. Raises MmxError where the file is not one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                layout = json.loads((file.metadata() or {})["layout"])
                keys, values, mask = (file.get_tensor(name) for name in ("keys", "values", "mask"))
            segments = [Segment(n, start, stop, tuple(grid) if grid else None, k) for n, start, stop, grid, k in layout]
        except (SafetensorError, KeyError, OSError, ValueError, TypeError) as error:
            raise MmxError(f"{path} is not a saved memory; expected a file written by Memory.save.") from error
        return Memory(keys, values, mask, tuple(segments))

    @staticmethod
    def empty(layers: int, batch: int, heads: int, width: int, **kind: object) -> Memory:
        """A memory with nothing to see: S = 0. The same decoder over it says what it would say without looking."""
        nothing = torch.zeros(layers, batch, heads, 0, width, **kind)  # type: ignore[call-overload]
        return Memory(nothing, nothing, torch.zeros(batch, 0, dtype=torch.bool, device=nothing.device), ())


def join(*memories: Memory) -> Memory:
    """One memory of all the slots, side by side along S. The order of the joined changes no output.

    Raises MmxError where batch, layers, heads or widths differ. Memories of one shared layer join only with their like.
    """
    if not memories:
        raise MmxError("join was given no memory; pass at least one, such as model.encode(image=...).")
    first = memories[0]
    for other in memories[1:]:
        if _without_slots(other.keys) != _without_slots(first.keys):
            raise MmxError(
                f"memories of [L, B, H, D] {_without_slots(first.keys)} and {_without_slots(other.keys)} cannot be "
                "joined; encode the sources with the same model and for the same number of rows."
            )
    keys, values = (torch.cat([getattr(m, part) for m in memories], 3) for part in ("keys", "values"))
    layout, start = [], 0
    for memory in memories:
        layout += [replace(s, start=s.start + start, stop=s.stop + start) for s in memory.layout]
        start += memory.slots
    return Memory(keys, values, torch.cat([m.mask for m in memories], 1), tuple(layout))


def check(memory: Memory) -> None:
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
    end = 0
    for segment in memory.layout:
        cells = segment.grid[0] * segment.grid[1] if segment.grid else 0
        if segment.start != end or segment.stop - segment.start < cells:
            raise MmxError(f"segment {segment} does not continue at slot {end} or is shorter than its grid.")
        end = segment.stop
    if end != memory.slots:
        raise MmxError(f"the layout covers {end} of {memory.slots} slots; every slot belongs to one source.")


def _without_slots(keys: Tensor) -> list[int]:
    layers, batch, heads, _, width = keys.shape
    return [layers, batch, heads, width]


def _check_boxes(boxes: Tensor, batch: int) -> None:
    good = boxes.shape in ((1, 4), (batch, 4))
    if good:
        x0, y0, x1, y1 = boxes.unbind(-1)
        good = bool(((x0 >= 0) & (y0 >= 0) & (x1 <= 1) & (y1 <= 1) & (x0 < x1) & (y0 < y1)).all())
    if not good:
        raise MmxError(
            f"the box {boxes.tolist()} is no region; expected x0,y0,x1,y1 in 0..1 with x0 < x1 and y0 < y1, "
            f"once or for each of {batch} memories."
        )


def _cells_touched(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool [boxes, rows*columns]: which cells of the grid overlap the box by more than an edge."""

    def touched(low: Tensor, high: Tensor, count: int) -> Tensor:
        edges = torch.arange(count + 1, device=boxes.device) / count
        return (edges[:-1] < high[:, None]) & (edges[1:] > low[:, None])

    x0, y0, x1, y1 = boxes.unbind(-1)
    rows, columns = touched(y0, y1, grid[0]), touched(x0, x1, grid[1])
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)
