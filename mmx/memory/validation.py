"""Segments of a memory, and the checks that its parts fit together.

L layers, B memories, K streams (texts over one memory), H heads, S slots, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmx.errors import MmxError
from mmx.memory.rows import shape_without_slots


@dataclass(frozen=True)
class Segment:
    """The slots `start:stop` of one source.

    With a `grid` (rows, columns), the last rows * columns slots are its cells, row by row from the top left; slots
    before them, such as class tokens, describe the whole input.
    """

    source: str
    start: int
    stop: int
    grid: tuple[int, int] | None = None

    def shift(self, offset: int) -> Segment:
        """Return the segment moved by `offset` slots."""
        return replace(self, start=self.start + offset, stop=self.stop + offset)


def validate_tensors(keys: Tensor, values: Tensor, mask: Tensor, stream_mask: Tensor | None) -> None:
    """Raise MmxError unless the shapes of keys, values and masks fit together."""
    if keys.ndim != 5 or keys.shape != values.shape:
        raise MmxError(
            f"keys are {list(keys.shape)} and values {list(values.shape)}; expected both to be [L, B, H, S, D].",
            code="memory.shape",
            keys=list(keys.shape),
            values=list(values.shape),
        )
    expected = [keys.shape[1], keys.shape[3]]
    if mask.dtype != torch.bool or list(mask.shape) != expected:
        raise MmxError(
            f"the mask is {mask.dtype} {list(mask.shape)}; expected bool [B, S] = {expected}, True = may be attended.",
            code="memory.mask",
            shape=list(mask.shape),
            expected=expected,
        )
    if stream_mask is not None and not _fits_mask(stream_mask, mask):
        raise MmxError(
            f"the stream mask is {stream_mask.dtype} {list(stream_mask.shape)}; expected bool [B, K, S] with [B, S] = "
            f"{expected}, True = may be attended by stream k.",
            code="memory.stream_mask",
            shape=list(stream_mask.shape),
            expected=expected,
        )


def validate_windows(windows: Tensor | None, mask: Tensor) -> None:
    """Raise MmxError unless windows are floats [B, S, 4], or None."""
    expected = [*mask.shape, 4]
    if windows is not None and (list(windows.shape) != expected or not windows.is_floating_point()):
        raise MmxError(
            f"the windows are {windows.dtype} {list(windows.shape)}; expected floats [B, S, 4] = {expected}.",
            code="memory.windows",
            shape=list(windows.shape),
            expected=expected,
        )


def _fits_mask(stream_mask: Tensor, mask: Tensor) -> bool:
    return stream_mask.ndim == 3 and stream_mask.dtype == torch.bool and stream_mask[:, 0].shape == mask.shape


def validate_layout(layout: Sequence[Segment], num_slots: int) -> None:
    """Raise MmxError unless the segments cover all slots, in order and without gaps."""
    stop = 0
    for segment in layout:
        num_cells = segment.grid[0] * segment.grid[1] if segment.grid else 0
        if segment.start != stop or segment.stop - segment.start < num_cells:
            raise MmxError(
                f"{segment} does not start at slot {stop}, where the one before it stops, or is shorter than its grid.",
                code="memory.layout",
                segment=segment,
                expected=stop,
            )
        stop = segment.stop
    if stop != num_slots:
        raise MmxError(
            f"the layout covers {stop} of {num_slots} slots; every slot must belong to one source.",
            code="memory.layout",
            covered=stop,
            expected=num_slots,
        )


def check_same_shape(first: Tensor, other: Tensor) -> None:
    """Raise MmxError (memory.cat) unless the keys of two memories differ in the number of slots only."""
    first_shape = shape_without_slots(first)
    other_shape = shape_without_slots(other)
    if first_shape != other_shape:
        raise MmxError(
            f"memories of [L, B, H, D] = {first_shape} and {other_shape} cannot be concatenated; "
            "encode the sources with the same model and for the same number of rows.",
            code="memory.cat",
            shape=other_shape,
            expected=first_shape,
        )


def common_fingerprint(given: Sequence[str | None]) -> str | None:
    """Return the fingerprint of all memories that have one. Raises MmxError (memory.other_model) if they differ."""
    fingerprints = list(dict.fromkeys(fingerprint for fingerprint in given if fingerprint is not None))
    if len(fingerprints) > 1:
        raise MmxError(
            f"memories of different models ({fingerprints[0]} and {fingerprints[1]}) cannot be concatenated; encode "
            "all sources with the same model.",
            code="memory.other_model",
            fingerprint=fingerprints[1],
            expected=fingerprints[0],
        )
    return fingerprints[0] if fingerprints else None
