"""Checks of arguments that hold many things: a text in place of a list of texts would be taken letter by letter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mmx.errors import MmxError
from mmx.inference.outputs import Question

ItemT = TypeVar("ItemT")


def check_inputs(inputs: Iterable[ItemT], batch_size: int) -> Iterable[ItemT]:
    """Return the inputs of `captions`. Raises MmxError if they are one input, or the batch size is not positive."""
    check_batch_size(batch_size)
    if _is_single(inputs):
        raise MmxError(
            f"captions was given {_type_name(inputs)}; expected a list of inputs, use caption(...) for one input.",
            code="captions.type",
        )
    return inputs


def check_questions(questions: Iterable[object], batch_size: int) -> list[Question]:
    """Return the questions of `answers`. Raises MmxError if they are one question, or one has another form."""
    check_batch_size(batch_size)
    if _is_single(questions):
        raise MmxError(
            f"answers was given {_type_name(questions)}; expected a list of (input, question), use ask(...) for one.",
            code="answers.type",
        )
    return [_question(item, index) for index, item in enumerate(questions)]


def with_starts(inputs: Iterable[ItemT], starts: Iterable[str] | None) -> Iterator[tuple[ItemT, str | None]]:
    """Yield each input with the start of its text. Raises MmxError (captions.starts) if not each has one."""
    if starts is None:
        yield from ((item, None) for item in inputs)
        return
    remaining = iter(() if isinstance(starts, str) else starts)
    count = 0
    for item in inputs:
        start = next(remaining, None)
        if not isinstance(start, str):
            given = _type_name(starts) if isinstance(starts, str) else f"{_type_name(start)} for input {count}"
            message = f"starts has {given}; expected a list with one text for each input."
            raise MmxError(message, code="captions.starts", index=count)
        yield item, start
        count += 1
    if next(remaining, None) is not None:
        message = f"starts has more texts than the {count} inputs; expected a list with one text for each input."
        raise MmxError(message, code="captions.starts", index=count)


def check_candidates(candidates: Iterable[str]) -> list[str]:
    """Return the candidates of `rank`. Raises MmxError if they are not a list of texts, or there are none."""
    if _is_single(candidates):
        raise MmxError(
            f"the candidates are {_type_name(candidates)}; expected a list of texts, such as ['yes', 'no'].",
            code="rank.candidates",
        )
    texts = list(candidates)
    if not texts:
        raise MmxError("rank was given no candidates; expected at least one text.", code="rank.no_candidates")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise MmxError(
                f"candidate {index} is {_type_name(text)}; expected a text, such as 'yes'.",
                code="rank.candidates",
                index=index,
            )
    return texts


def check_batch_size(batch_size: object) -> None:
    """Raise MmxError (inference.batch_size) if it is not a whole number of at least 1."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise MmxError(
            f"batch_size is {batch_size!r}; expected a whole number of at least 1.", code="inference.batch_size"
        )


def check_device(device: object) -> None:
    """Raise MmxError (load.device) if a device does not exist or is not available."""
    if not is_available(device):
        raise MmxError(
            f"device {str(device)!r} is not available here; expected one of this machine, such as 'cpu' or 'cuda:0'.",
            code="load.device",
            given=str(device),
        )


def is_available(device: object) -> bool:
    """Return whether tensors can be made on a device."""
    try:
        torch.zeros(1, device=device).cpu()  # type: ignore[call-overload]  # any value may be given
    except (RuntimeError, AssertionError, ImportError, TypeError):
        return False
    return True


def _question(item: object, index: int) -> Question:
    if isinstance(item, Question):
        return item
    if not isinstance(item, tuple | list) or not 2 <= len(item) <= 3:
        raise MmxError(
            f"question {index} is {_type_name(item)}; expected (input, question) or (input, question, box).",
            code="answers.item",
            index=index,
        )
    return Question(*item)


def _is_single(value: object) -> bool:
    """Whether a value is one input or text, or not iterable.

    An open file would be taken line by line, and numbers row by row; those of four dimensions are a list of images.
    """
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping) or not isinstance(value, Iterable):
        return True
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc"):
        return value.ndim < 4
    return hasattr(value, "read")


def _type_name(value: object) -> str:
    return f"a value of type {type(value).__name__[:60]}"
