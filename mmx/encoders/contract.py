"""Checked calls of encoder methods: each returns what the encoder returned, or raises an EncoderError.

The error names the encoder, what it returned and what the contract expects. An MmxError that the encoder raises on
purpose is passed on unchanged.

Axes: B rows, S slots, F feature size. Masks are bool, True = may be attended.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmx.encoders.base import Encoder
from mmx.errors import EncoderError, MmxError, convert_errors, one_line_error
from mmx.io.files import StoredBytes, read_stored
from mmx.io.images import load_image
from mmx.nn.features import Features

PreparedInput = dict[str, Tensor]
MAX_STORED_BYTES = 512 * 2**20  # of an input inside of a larger file; encoders have limits of their own
PASSING = (MmxError, torch.OutOfMemoryError)  # exceptions that are not errors in an encoder's code


class InputPreparer(Protocol):
    """The methods of an encoder that run in data workers. The question encoder has them too."""

    def prepare(self, raw: object) -> dict[str, Tensor]: ...

    def collate(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]: ...


def prepare(encoder: InputPreparer, source: str, raw: object) -> PreparedInput:
    """Convert one raw input of a source to named tensors.

    The encoder receives only the types that `Encoder.prepare` states for its modality.
    """
    raw = to_stated_type(encoder, raw)
    with _call_errors(encoder, source, f"prepare({_type_name(raw)})"):
        prepared = encoder.prepare(raw)
    return _check_tensors(prepared, encoder, source, "prepare")


def accepts(encoder: Encoder, source: str, path: str) -> bool:
    """Return whether the encoder reads files of this name."""
    with _call_errors(encoder, source, "accepts"):
        return bool(encoder.accepts(path))


def collate(encoder: InputPreparer, source: str, prepared: Sequence[Mapping[str, Tensor]]) -> PreparedInput:
    """Combine prepared inputs to one batch."""
    with _call_errors(encoder, source, "collate"):
        batch = encoder.collate(prepared)
    return _check_tensors(batch, encoder, source, "collate")


def encode(encoder: Encoder, source: str, batch: Mapping[str, Tensor], device: torch.device) -> Features:
    """Encode a batch; the features must be on `device`."""
    with _call_errors(encoder, source, "forward"):
        features = encoder(batch)
    return check_features(features, encoder, source, device)


def check_features(features: object, encoder: Encoder, source: str, device: torch.device | None = None) -> Features:
    """Return the features, with the grid as a tuple, or raise EncoderError if they break the contract.

    Values are checked only without gradients: in training the trainer checks the loss, on all ranks at once.
    """
    checker = _FeatureChecker(encoder, source)
    return checker.check(features, device)


def encoder_errors(message: str, code: str = "encoder.failed", **details: object) -> AbstractContextManager[None]:
    """Convert exceptions of an encoder's own code to EncoderError. The message is followed by the exception.

    MmxError and CUDA out of memory are passed on unchanged.
    """

    def describe(error: BaseException) -> str:
        return f"{message} {one_line_error(error)} (--traceback shows where)."

    return convert_errors(EncoderError, describe, code=code, passing=PASSING, **details)


def to_stated_type(encoder: InputPreparer, raw: object) -> object:
    """Convert an input that a caller may give in more types than `Encoder.prepare` states for the modality.

    Paths become str, for images and audio other buffers become bytes, and image arrays and open image files become PIL
    images. Of an input inside of a larger file, an image becomes a PIL image, and anything else bytes. Everything else
    is returned as it is. Raises ImageError, or DataError for bytes that cannot be read.
    """
    if isinstance(raw, os.PathLike):
        return os.fsdecode(raw)
    modality = encoder.modality if isinstance(encoder, Encoder) else None
    if isinstance(raw, StoredBytes):
        return load_image(raw) if modality == "image" else read_stored(raw, MAX_STORED_BYTES)
    if modality in ("image", "audio") and isinstance(raw, bytearray | memoryview):
        return bytes(raw)
    is_open_file = callable(getattr(raw, "read", None))
    if modality == "image" and (is_open_file or isinstance(raw, np.ndarray | Tensor)):
        return load_image(raw)  # type: ignore[arg-type]  # checked above
    return raw


class _FeatureChecker:
    """Compares the output of an encoder with the contract."""

    def __init__(self, encoder: Encoder, source: str) -> None:
        self.encoder = encoder
        self.source = source

    def check(self, features: object, device: torch.device | None) -> Features:
        if not _is_features(features):
            raise self._error(_element_types(features), "Features(states, mask, grid)")
        states, mask, grid, window = Features(*features[:4])  # type: ignore[index]  # checked above
        self._check_states(states, device)
        self._check_mask(mask, states)
        if self.encoder.dimensions == 2 or grid is not None:
            self._check_grid(grid, states.shape[1])
        if not torch.is_grad_enabled():
            self._check_values(states, mask)
        if window is not None:
            self._check_window(window, states)
        return Features(states, mask, None if grid is None else (grid[0], grid[1]), window)

    def _check_states(self, states: Tensor, device: torch.device | None) -> None:
        width = self.encoder.width
        if states.ndim != 3 or states.shape[-1] != width:
            raise self._error(f"states {list(states.shape)}", f"[B, S, F] with F = its width {width}")
        if not states.is_floating_point():
            raise self._error(f"states of {states.dtype}", "floating-point states")
        if states.layout != torch.strided:
            raise self._error("sparse states", "dense tensors")
        if device is not None and states.device != device:
            raise self._error(f"states on {states.device}", f"states on {device}, the device of the batch")

    def _check_mask(self, mask: Tensor, states: Tensor) -> None:
        if mask.layout != torch.strided:
            raise self._error("a sparse mask", "dense tensors")
        if mask.dtype != torch.bool or mask.shape != states.shape[:2]:
            expected = f"bool {list(states.shape[:2])}, True = may be attended"
            raise self._error(f"a mask {mask.dtype} {list(mask.shape)}", expected)
        if mask.device != states.device:
            raise self._error(f"a mask on {mask.device}", f"a mask on {states.device}, the device of its states")

    def _check_grid(self, grid: object, num_slots: int) -> None:
        if not _is_grid(grid, num_slots):
            expected = "(rows, columns) covering its last rows*columns slots"
            raise self._error(f"grid {grid} for {num_slots} slots", expected)

    def _check_window(self, window: Tensor, states: Tensor) -> None:
        if not isinstance(window, Tensor) or window.shape != (len(states), 4) or not window.is_floating_point():
            given = f"a window {list(window.shape)}" if isinstance(window, Tensor) else f"a window {_type_name(window)}"
            raise self._error(given, f"floating-point {[len(states), 4]}, x0, y0, x1, y1 of each input, or None")

    def _check_values(self, states: Tensor, mask: Tensor) -> None:
        """Check the values themselves, which on a GPU waits for the computation."""
        is_empty = ~mask.any(-1)
        if is_empty.any():
            row = int(is_empty.nonzero()[0])
            expected = "at least one True, which means may be attended (is it inverted?); an absent input is left out"
            raise self._error(f"a mask that hides every slot of row {row}", expected)
        is_invalid = ~torch.isfinite(states).all(-1) & mask
        if is_invalid.any():
            row, slot = is_invalid.nonzero()[0].tolist()
            given = f"NaN or infinite states in row {row}, slot {slot}"
            raise self._error(given, "finite numbers wherever the mask is True")

    def _error(self, given: str, expected: str) -> EncoderError:
        name = type(self.encoder).__name__
        return EncoderError(
            f"encoder {name} of source {self.source!r} returned {given}; expected {expected}.",
            code="encoder.features",
            encoder=name,
            source=self.source,
            given=given,
            expected=expected,
        )


def _call_errors(encoder: InputPreparer, source: str, call: str) -> AbstractContextManager[None]:
    name = type(encoder).__name__
    message = f"encoder {name} of source {source!r} failed in {call} with"
    return encoder_errors(message, encoder=name, source=source, method=call.partition("(")[0])


def _check_tensors(given: object, encoder: InputPreparer, source: str, method: str) -> PreparedInput:
    problem = _tensor_problem(given, method)
    if problem is None and isinstance(given, Mapping):
        return dict(given)
    name = type(encoder).__name__
    raise EncoderError(
        f"encoder {name} of source {source!r} returned {problem} in {method}; "
        'expected a dict of plain tensors on the CPU, such as {"pixels": tensor}.',
        code="encoder.tensors",
        encoder=name,
        source=source,
        method=method,
        given=problem,
    )


def _tensor_problem(given: object, method: str) -> str | None:
    """Describe what is wrong with the dict of tensors that `method` returned, if anything."""
    if not isinstance(given, Mapping):
        return _type_name(given)
    if not given:
        return "an empty dict"
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            return f"{name!r}: {_type_name(tensor)}"
        # A gradient cannot leave a data worker, and a worker has no GPU.
        if method == "prepare" and (tensor.requires_grad or tensor.device.type != "cpu"):
            return f"{name!r} with a gradient or on {tensor.device}"
    return None


def _is_features(given: object) -> bool:
    """Return whether the first two elements of a tuple are tensors."""
    return isinstance(given, tuple) and [isinstance(element, Tensor) for element in given[:2]] == [True, True]


def _is_grid(grid: object, num_slots: int) -> bool:
    """Return whether a grid is two positive integers with at most as many cells as there are slots."""
    if not isinstance(grid, Sequence) or len(grid) != 2:
        return False
    if not all(isinstance(side, int) and side > 0 for side in grid):
        return False
    return bool(grid[0] * grid[1] <= num_slots)


def _type_name(given: object) -> str:
    return "None" if given is None else type(given).__name__


def _element_types(given: object) -> str:
    name = type(given).__name__
    if not isinstance(given, tuple):
        return name
    elements = ", ".join(type(element).__name__ for element in given)
    return f"{name} of ({elements})"
