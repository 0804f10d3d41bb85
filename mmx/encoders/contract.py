"""Where a plugin's mistakes are met: whatever an encoder gives is looked at before anybody else has to live with it.

Alphabet: B rows, S slots, F feature width. Masks: True = may be attended.

Each function calls one method of an encoder and returns what it gave, or raises EncoderError with the encoder's name,
what it gave, what the contract is, and so what to mend. Errors made on purpose (MmxError) pass as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from mmx.encoders.base import Encoder
from mmx.errors import EncoderError, MmxError
from mmx.nn.features import Features

PreparedInput = dict[str, Tensor]


class InputPreparer(Protocol):
    """The half of an encoder that data workers see; whatever reads questions has it too."""

    def prepare(self, raw: Any) -> dict[str, Tensor]: ...

    def collate(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]: ...


def prepare(encoder: InputPreparer, source: str, raw: Any) -> PreparedInput:
    """One raw input of a source to named tensors."""
    with _named(encoder, source, f"prepare({_kind(raw)})"):
        prepared = encoder.prepare(raw)
    return _check_tensors(prepared, encoder, source, "prepare")


def accepts(encoder: Encoder, source: str, path: str) -> bool:
    """Whether a file of this name is something for the encoder."""
    with _named(encoder, source, "accepts"):
        return bool(encoder.accepts(path))


def collate(encoder: InputPreparer, source: str, prepared: Sequence[Mapping[str, Tensor]]) -> PreparedInput:
    """Prepared inputs to one batch."""
    with _named(encoder, source, "collate"):
        batch = encoder.collate(prepared)
    return _check_tensors(batch, encoder, source, "collate")


def encode(encoder: Encoder, source: str, batch: Mapping[str, Tensor], device: torch.device) -> Features:
    """A batch to its features, which are expected on `device`."""
    with _named(encoder, source, "forward"):
        features = encoder(batch)
    return check_features(features, encoder, source, device)


def check_features(features: Any, encoder: Encoder, source: str, device: torch.device | None = None) -> Features:
    """Return the features, with the grid as a plain pair, or raise EncoderError.

    Values that are not finite are looked for where no gradient is asked for: in training it is the trainer that finds
    them, on all ranks at once.
    """

    def refuse(given: str, expected: str) -> EncoderError:
        return EncoderError(f"encoder {type(encoder).__name__} of source {source!r} gave {given}; expected {expected}.")

    if not isinstance(features, tuple) or [isinstance(part, Tensor) for part in features[:2]] != [True, True]:
        raise refuse(_kinds(features), "Features(states, mask, grid)")
    states, mask, grid = Features(*features[:3])
    if states.ndim != 3 or states.shape[-1] != encoder.width:
        raise refuse(f"states {list(states.shape)}", f"[B, S, F] with F = its width {encoder.width}")
    if not states.is_floating_point():
        raise refuse(f"states of {states.dtype}", "floating-point ones")
    if states.layout != torch.strided or mask.layout != torch.strided:
        raise refuse("sparse tensors", "dense ones")
    if mask.dtype != torch.bool or mask.shape != states.shape[:2]:
        raise refuse(
            f"a mask {mask.dtype} {list(mask.shape)}", f"bool {list(states.shape[:2])}, True = may be attended"
        )
    if device is not None and states.device != device:
        raise refuse(f"states on {states.device}", f"them on {device}, where its batch was")
    if mask.device != states.device:
        raise refuse(f"a mask on {mask.device}", f"one on {states.device}, where its states are")
    if (encoder.dimensions == 2 or grid is not None) and not _lies_on(grid, states.shape[1]):
        raise refuse(f"grid {grid} for {states.shape[1]} slots", "(rows, columns) covering its last rows*columns slots")
    if not torch.is_grad_enabled():
        _check_values(states, mask, refuse)
    return Features(states, mask, None if grid is None else (grid[0], grid[1]))


def _check_values(states: Tensor, mask: Tensor, refuse: Any) -> None:
    """What can only be seen by reading the numbers, which on a GPU means waiting for them."""
    blind = ~mask.any(-1)
    if blind.any():
        raise refuse(
            f"a mask that hides every slot of row {int(blind.nonzero()[0])}",
            "at least one True, which means may be attended (is it inverted?); an absent input is left out instead",
        )
    broken = ~torch.isfinite(states).all(-1) & mask
    if broken.any():
        row, slot = broken.nonzero()[0].tolist()
        raise refuse(f"NaN or infinite states in row {row}, slot {slot}", "finite numbers wherever the mask is True")


def _named(encoder: InputPreparer, source: str, doing: str) -> AbstractContextManager[None]:
    return encoder_errors(f"encoder {type(encoder).__name__} of source {source!r} failed in {doing} with")


@contextmanager
def encoder_errors(beginning: str) -> Iterator[None]:
    """Whatever a stranger's code raises is told with the stranger's name. Memory that has run out is not its fault."""
    try:
        yield
    except (MmxError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise EncoderError(f"{beginning} {one_line_error(error)} (--traceback shows where).") from error


def one_line_error(error: BaseException) -> str:
    """The kind of an error and what it says, whatever that is, in at most 200 characters."""
    try:
        said = str(error)
    except Exception:
        said = "(it cannot say why)"
    return " ".join(f"{type(error).__name__}: {said}".split())[:200]


def _check_tensors(given: Any, encoder: InputPreparer, source: str, method: str) -> PreparedInput:
    wrong = _kind(given) if not isinstance(given, Mapping) else None
    if wrong is None and not given:
        wrong = "nothing"
    if wrong is None:
        wrong = next((f"{n!r}: {_kind(t)}" for n, t in given.items() if not isinstance(t, Tensor)), None)
    if wrong is None and method == "prepare":  # a gradient cannot leave a data worker, and a GPU is not there
        lively = (n for n, t in given.items() if t.requires_grad or t.device.type != "cpu")
        wrong = next((f"{n!r} with a gradient or on {given[n].device}" for n in lively), None)
    if wrong is not None:
        raise EncoderError(
            f"encoder {type(encoder).__name__} of source {source!r} gave {wrong} in {method}; "
            'expected a dict of plain tensors on the CPU, such as {"pixels": tensor}.'
        )
    return dict(given)


def _kind(given: Any) -> str:
    return "None" if given is None else type(given).__name__


def _kinds(given: Any) -> str:
    kind = type(given).__name__
    return f"{kind} of ({', '.join(type(part).__name__ for part in given)})" if isinstance(given, tuple) else kind


def _lies_on(grid: Any, slots: int) -> bool:
    """Whether a grid is two whole numbers whose cells are some of the slots."""
    whole = isinstance(grid, Sequence) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)
    return whole and grid[0] * grid[1] <= slots
