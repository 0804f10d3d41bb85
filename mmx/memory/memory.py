"""Memory: keys, values and mask of everything that was encoded. It is the cross-attention cache, as a plain value.

Encode once; then concatenate, select, restrict to a region, save, and decode over it any number of times.

L layers, B memories, K streams (texts over one memory), H heads, S slots, D head dimension.
Masks are bool, True = may be attended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mmx.boxes import BoxInput, cells_in_boxes, validate_boxes
from mmx.errors import MmxError
from mmx.memory.rows import row_index, scatter_rows
from mmx.memory.validation import (
    Segment,
    check_same_shape,
    common_fingerprint,
    validate_layout,
    validate_tensors,
    validate_windows,
)


@dataclass(frozen=True, repr=False)
class Memory:
    """Keys and values in the decoder's heads, and the mask of the slots that exist.

    Attributes:
        keys: [L, B, H, S, D]. L may be 1: all layers of the decoder then share one layer of keys and values.
        values: [L, B, H, S, D].
        mask: bool [B, S].
        layout: the segments of S, in order and without gaps.
        stream_mask: bool [B, K, S], the slots that each of K streams may attend to, or None if all may attend to all.
        fingerprint: of the model that made the memory and can decode over it (`mmx.models.fingerprint`), or None for
            a memory that was made by hand.
        windows: [B, S, 4], for each slot the region of the input that the grid of its source covers, see
            `Encoder.window`; None if every grid covers its whole input.

    Raises:
        MmxError: memory.shape, memory.mask, memory.stream_mask, memory.windows or memory.layout, if these do not fit
            together.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    layout: tuple[Segment, ...]
    stream_mask: Tensor | None = None
    fingerprint: str | None = None
    windows: Tensor | None = None

    def __post_init__(self) -> None:
        validate_tensors(self.keys, self.values, self.mask, self.stream_mask)
        validate_windows(self.windows, self.mask)
        validate_layout(self.layout, self.num_slots)

    def __repr__(self) -> str:
        layers, batch_size, heads, _, head_dim = self.keys.shape
        slots: dict[str, int] = {}
        for segment in self.layout:
            slots[segment.source] = slots.get(segment.source, 0) + segment.stop - segment.start
        facts = [f"{source}: {count} slots" for source, count in slots.items()] or ["no slots"]
        facts += [f"batch {batch_size}", f"{layers} layers", f"{heads} heads x {head_dim}"]
        if self.stream_mask is not None:
            facts.append(f"{self.stream_mask.shape[1]} streams")
        facts.append(str(self.keys.dtype).removeprefix("torch."))
        if self.keys.device.type != "cpu":
            facts.append(str(self.keys.device))
        return f"Memory({', '.join(facts)}, {_format_bytes(self.nbytes)})"

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
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @cached_property
    def is_fully_visible(self) -> bool:
        """Whether every slot exists and every stream may attend to it."""
        return self.stream_mask is None and bool(self.mask.all())

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H, S, D] of the `index`-th layer with cross-attention."""
        if len(self.keys) == 1:
            index = 0
        return self.keys[index], self.values[index]

    # ---- rows --------------------------------------------------------------------------------------------------

    def select(self, rows: Tensor | Sequence[int] | Sequence[bool]) -> Memory:
        """Return the memories at `rows`: indices in any order, or one bool for each memory.

        Raises MmxError (memory.rows) for anything else. Indices that are on a GPU already are not checked.
        """
        index = row_index(rows, self.batch_size).to(self.mask.device)
        return self._map_rows(lambda tensor, dim: tensor.index_select(dim, index))

    def scatter(self, rows: Tensor, batch_size: int) -> Memory:
        """Return `batch_size` memories in which memory i is at rows[i] (int [B]); all other rows are masked out."""
        return self._map_rows(lambda tensor, dim: scatter_rows(tensor, rows, batch_size, dim))

    def _map_rows(self, apply: Callable[[Tensor, int], Tensor]) -> Memory:
        """Apply a function of a tensor and its batch dimension to all tensors."""
        stream_mask = None if self.stream_mask is None else apply(self.stream_mask, 0)
        return replace(
            self,
            keys=apply(self.keys, 1),
            values=apply(self.values, 1),
            mask=apply(self.mask, 0),
            stream_mask=stream_mask,
            windows=None if self.windows is None else apply(self.windows, 0),
        )

    # ---- streams -----------------------------------------------------------------------------------------------

    def fold_streams(self, streams: int) -> Memory:
        """Fold B*K memories of S slots into B memories of K*S slots, of which stream k attends to the k-th S only.

        K questions about one image, each encoded by a text encoder, become the memory of K streams this way.
        """
        keys = self.keys.unflatten(1, (-1, streams)).transpose(2, 3).flatten(3, 4)
        values = self.values.unflatten(1, (-1, streams)).transpose(2, 3).flatten(3, 4)
        mask = self.mask.unflatten(0, (-1, streams)).flatten(1)
        layout: list[Segment] = []
        for k in range(streams):
            layout += [segment.shift(k * self.num_slots) for segment in self.layout]
        own_slots = torch.eye(streams, dtype=torch.bool, device=mask.device).repeat_interleave(self.num_slots, 1)
        stream_mask = own_slots.expand(len(mask), -1, -1)
        windows = None if self.windows is None else self.windows.unflatten(0, (-1, streams)).flatten(1, 2)
        return Memory(keys, values, mask, tuple(layout), stream_mask, self.fingerprint, windows)

    def stream_mask_for(self, streams: int) -> Tensor | None:
        """Return the slots that each of K `streams` may attend to, bool [B, K, S]; None if all may attend to all.

        If there are more streams than `stream_mask` has, they divide evenly and in order, as the beams of each question
        do. Raises MmxError (memory.streams) if they do not divide evenly.
        """
        if self.stream_mask is None:
            return None
        own = self.stream_mask.shape[1]
        if streams % own:
            raise MmxError(
                f"{streams} streams cannot attend to a memory of {own} streams; give a multiple of {own}.",
                code="memory.streams",
                streams=streams,
                expected=own,
            )
        return self.stream_mask.repeat_interleave(streams // own, 1)

    def cross_attention_mask(self, streams: int, length: int, visibility: Tensor | None = None) -> Tensor | None:
        """Return the mask of cross-attention whose K streams of T = `length` positions are folded into the query axis.

        Args:
            visibility: bool [T, S], further restricts what each text position may attend to.

        Returns:
            bool [B, 1, 1 or K*T, S], or None if every query may attend to every slot.
        """
        if self.is_fully_visible and visibility is None:
            return None
        stream_mask = self.stream_mask_for(streams)
        visible = self.mask[:, None, None]  # [B, 1, 1, S]
        if visibility is None and stream_mask is None:
            return visible
        if stream_mask is not None:
            visible = visible & stream_mask[:, :, None]
        if visibility is not None:
            visible = visible & visibility
        return visible.expand(-1, streams, length, -1).flatten(1, 2)[:, None]

    # ---- regions -----------------------------------------------------------------------------------------------

    def mask_out(self, slots: Tensor) -> Memory:
        """Return the memory without the slots where `slots` (bool, broadcastable to [B, S]) is True."""
        return replace(self, mask=self.mask & ~slots)

    def focus(self, box: BoxInput) -> Memory:
        """Restrict every source that has a grid to the cells that overlap a box of the input.

        Where a grid covers a part of the input only, or padding around it, the box is moved to the window of the grid.
        No cell is left of a source whose window lies outside of the box.

        Slots of such a source that describe the whole input (class tokens) are masked out too, because they depend on
        what is outside the box. Sources without a grid are kept. Nothing is encoded again.

        Args:
            box: (x0, y0, x1, y1) in 0..1 from the top left for all memories; or one box for each memory, [B][4]; or
                one for each stream, [B][K][4], where None (in a tensor: NaN) does not restrict the stream.

        Raises:
            MmxError: memory.box.
        """
        boxes = validate_boxes(box, self.batch_size).to(self.mask.device)
        if boxes.ndim == 2:
            boxes = boxes.expand(self.batch_size, -1)
        inside = boxes.new_ones(*boxes.shape[:-1], self.num_slots, dtype=torch.bool)
        for segment in self.layout:
            if segment.grid is not None:
                cells = cells_in_boxes(self._boxes_on_grid(boxes, segment), segment.grid)
                inside[..., segment.start : segment.stop] = False
                inside[..., segment.stop - cells.shape[-1] : segment.stop] = cells
        inside |= boxes.isnan().any(-1, keepdim=True)
        if boxes.ndim < 3:
            return self.mask_out(~inside)
        stream_mask = self.stream_mask_for(boxes.shape[1])
        return replace(self, stream_mask=inside if stream_mask is None else stream_mask & inside)

    def _boxes_on_grid(self, boxes: Tensor, segment: Segment) -> Tensor:
        """Return boxes of the input, [B, 4] or [B, K, 4], in coordinates 0..1 of the grid of a segment."""
        if self.windows is None:
            return boxes
        window = self.windows[:, segment.stop - 1].to(boxes)  # [B, 4], equal for all slots of the segment
        if boxes.ndim == 3:
            window = window[:, None]
        start = window[..., [0, 1, 0, 1]]
        size = (window[..., 2:] - window[..., :2]).clamp(min=1e-6)  # zero in a row without the source
        return (boxes - start) / torch.cat([size, size], -1)

    # ---- device, files -----------------------------------------------------------------------------------------

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Memory:
        """Return the memory on another device, or with keys and values of another floating-point type."""
        keys = self.keys.to(device, dtype)
        values = self.values.to(device, dtype)
        stream_mask = None if self.stream_mask is None else self.stream_mask.to(device)
        windows = None if self.windows is None else self.windows.to(device)
        mask = self.mask.to(device)
        return replace(self, keys=keys, values=values, mask=mask, stream_mask=stream_mask, windows=windows)

    def save(self, path: str | Path) -> None:
        """Write the memory to a safetensors file.

        Raises:
            MmxError: code `memory.save`, if the file cannot be written; code `memory.no_fingerprint`, for a memory that
                does not know its model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self.fingerprint is None:
            raise MmxError(
                "this memory has no fingerprint of the model that made it, so a file of it could be read with another "
                "model; save what Pipeline.encode returns.",
                code="memory.no_fingerprint",
            )
        layout = [[segment.source, segment.start, segment.stop, segment.grid] for segment in self.layout]
        tensors = {"keys": self.keys, "values": self.values, "mask": self.mask}
        if self.stream_mask is not None:
            tensors["stream_mask"] = self.stream_mask
        if self.windows is not None:
            tensors["windows"] = self.windows
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"layout": json.dumps(layout), "fingerprint": self.fingerprint}
        try:
            save_file(contiguous, str(path), metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise MmxError(
                f"the memory cannot be written to {path}; check that its folder exists and has space.",
                code="memory.save",
                path=str(path),
            ) from error

    @staticmethod
    def load(path: str | Path) -> Memory:
        """Read a memory that `save` wrote.

        Raises MmxError for any other file (memory.file), and for one without a fingerprint, as older versions wrote it
        (memory.no_fingerprint).
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                layout = json.loads(metadata["layout"])
                keys = file.get_tensor("keys")
                values = file.get_tensor("values")
                mask = file.get_tensor("mask")
                names = file.keys()
                stream_mask = file.get_tensor("stream_mask") if "stream_mask" in names else None
                windows = file.get_tensor("windows") if "windows" in names else None
            segments = [
                Segment(source, start, stop, tuple(grid) if grid else None) for source, start, stop, grid in layout
            ]
        except (SafetensorError, KeyError, OSError, ValueError, TypeError) as error:
            raise MmxError(
                f"{path} is not a saved memory; expected a file written by Memory.save.",
                code="memory.file",
                path=str(path),
            ) from error
        if not metadata.get("fingerprint"):
            raise MmxError(
                f"{path} does not name the model that made it, because an older version of mmx wrote it; encode the "
                "inputs again and save the memory with this version.",
                code="memory.no_fingerprint",
                path=str(path),
            )
        return Memory(keys, values, mask, tuple(segments), stream_mask, metadata["fingerprint"], windows)

    @staticmethod
    def empty(
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Memory:
        """Return a memory without slots (S = 0). Over it, the decoder is a language model without any source."""
        keys = torch.zeros(num_layers, batch_size, num_heads, 0, head_dim, dtype=dtype, device=device)
        mask = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)
        return Memory(keys, keys, mask, ())


def cat(*memories: Memory) -> Memory:
    """Concatenate memories along S. The order changes no output of the decoder.

    Memories without a fingerprint, made by hand, may be concatenated to those of a model.

    Raises MmxError if there is none, or if L, B, H or D differ (memory.cat), or for memories of different models
    (memory.other_model).
    """
    if not memories:
        raise MmxError(
            "cat was given no memory; pass at least one, such as model.encode(image=...).", code="memory.cat"
        )
    first = memories[0]
    if len(memories) == 1:
        return first
    for other in memories[1:]:
        check_same_shape(first.keys, other.keys)
    fingerprint = common_fingerprint([memory.fingerprint for memory in memories])
    layout: list[Segment] = []
    num_slots = 0
    for memory in memories:
        layout += [segment.shift(num_slots) for segment in memory.layout]
        num_slots += memory.num_slots
    return Memory(
        torch.cat([memory.keys for memory in memories], 3),
        torch.cat([memory.values for memory in memories], 3),
        torch.cat([memory.mask for memory in memories], 1),
        tuple(layout),
        _cat_stream_masks(memories),
        fingerprint,
        _cat_windows(memories),
    )


def _cat_windows(memories: Sequence[Memory]) -> Tensor | None:
    """The windows [B, S, 4] of concatenated memories; a memory without them covers whole inputs."""
    if all(memory.windows is None for memory in memories):
        return None
    windows = []
    for memory in memories:
        whole = memory.mask.new_tensor([0, 0, 1, 1], dtype=torch.float32).expand(*memory.mask.shape, 4)
        windows.append(whole if memory.windows is None else memory.windows)
    return torch.cat(windows, 1)


def _cat_stream_masks(memories: Sequence[Memory]) -> Tensor | None:
    """The stream masks [B, K, S] of concatenated memories; a memory without one is visible to all streams."""
    streams = max((memory.stream_mask.shape[1] for memory in memories if memory.stream_mask is not None), default=0)
    if streams == 0:
        return None
    masks = []
    for memory in memories:
        mask = memory.stream_mask_for(streams)
        masks.append(memory.mask.new_ones(memory.batch_size, streams, memory.num_slots) if mask is None else mask)
    return torch.cat(masks, -1)


def _format_bytes(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    if count < 1_000_000:
        return f"{count / 1000:.0f} kB"
    return f"{count / 1_000_000:.1f} MB"
