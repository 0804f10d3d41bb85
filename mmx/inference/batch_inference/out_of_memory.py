"""Out-of-memory handling: a batch that does not fit is halved, down to one row, whose error is then returned.

The same idea as accelerate's `find_executable_batch_size`, for inference over a stream of rows whose sizes differ.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from mmx.errors import MmxError

RowT = TypeVar("RowT")
ResultT = TypeVar("ResultT")

RETRY_LARGER_AFTER = 32  # successful batches before a larger size is tried again
_MESSAGES = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "backend out of memory",  # MPS
)


class AdaptiveBatchSize:
    """Runs a function on rows in batches that fit into memory. The size that was found is kept for later calls."""

    def __init__(self) -> None:
        self.max_size = sys.maxsize
        self.successes = 0  # since the size last changed
        self.ever_succeeded = False

    def run(
        self, rows: Sequence[RowT], function: Callable[[Sequence[RowT]], Sequence[ResultT]]
    ) -> list[ResultT | MmxError]:
        """Return the result of each row in order.

        A row that does not fit alone, or for which `function` raises an MmxError alone, has that error as its result.

        Raises:
            MmxError: the error of the function, if no row has ever succeeded; the cause is then not the row.
        """
        results: list[ResultT | MmxError] = []
        while len(results) < len(rows):
            batch = rows[len(results) : len(results) + self.max_size]
            try:
                outputs = _run_unless_out_of_memory(function, batch)
            except MmxError as error:
                results += self._run_one_by_one(batch, function, error)
                continue
            if outputs is not None:
                results += outputs
                self._record_success()
            elif len(batch) > 1:
                self.max_size = len(batch) // 2
                self.successes = 0
            else:
                results.append(_out_of_memory_error())
        return results

    def _run_one_by_one(
        self, rows: Sequence[RowT], function: Callable[[Sequence[RowT]], Sequence[ResultT]], error: MmxError
    ) -> list[ResultT | MmxError]:
        """Run each row of a failed batch alone. `error` is the one that the batch raised."""
        results: list[ResultT | MmxError] = [error]
        if len(rows) > 1:
            results = [_run_alone(function, row) for row in rows]
        self.ever_succeeded = self.ever_succeeded or not all(isinstance(result, MmxError) for result in results)
        if not self.ever_succeeded:
            raise error
        return results

    def _record_success(self) -> None:
        self.ever_succeeded = True
        self.successes += 1
        if self.successes >= RETRY_LARGER_AFTER:
            self.max_size = min(2 * self.max_size, sys.maxsize)
            self.successes = 0


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception, or one that caused it, means that memory ran out.

    The CPU allocator raises a plain RuntimeError, which only its message identifies.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES):
            return True
        error = error.__cause__
    return False


def _run_unless_out_of_memory(
    function: Callable[[Sequence[RowT]], Sequence[ResultT]], rows: Sequence[RowT]
) -> Sequence[ResultT] | None:
    """Return the results, or None if memory ran out."""
    try:
        return function(rows)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Outside the except block the error no longer holds the tensors of the frames that it passed.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    return None


def _run_alone(function: Callable[[Sequence[RowT]], Sequence[ResultT]], row: RowT) -> ResultT | MmxError:
    try:
        results = _run_unless_out_of_memory(function, [row])
    except MmxError as error:
        return error
    return _out_of_memory_error() if results is None else results[0]


def _out_of_memory_error() -> MmxError:
    return MmxError(
        "memory ran out on this input alone; expected enough for one input, use fewer beams (--num-beams) or another "
        "--device.",
        code="inference.out_of_memory",
    )
