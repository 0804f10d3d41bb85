"""Memory that runs out is no end: the batch is halved until it fits, down to one row, which then is an error."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from mmx.errors import MmxError

Row = TypeVar("Row")
Done = TypeVar("Done")
PATIENCE = 32  # stretches that went well before a larger one is tried: one huge picture shall not slow all that follow
_TOLD = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "backend out of memory",  # Apple's
)


class AdaptiveBatchSize:
    """Works on rows in stretches that memory has room for; the size that was found is kept for what follows."""

    def __init__(self) -> None:
        self.most, self.well, self.ever = sys.maxsize, 0, False

    def run(self, rows: Sequence[Row], work: Callable[[Sequence[Row]], Sequence[Done]]) -> list[Done | MmxError]:
        """What `work` gives for each of the rows, in their order; an error for a row that is too much even alone, and
        for one that cannot be worked on. Raises the error where no row ever could: then it is not the row's."""
        found: list[Done | MmxError] = []
        while len(found) < len(rows):
            part = rows[len(found) : len(found) + self.most]
            try:
                done = _attempt(work, part)
            except MmxError as error:
                found += self._singly(part, work, error)
                continue
            if done is not None:
                found += done
                self._went_well()
            elif len(part) > 1:
                self.most, self.well = len(part) // 2, 0
            else:
                found.append(_too_much())
        return found

    def _singly(
        self, rows: Sequence[Row], work: Callable[[Sequence[Row]], Sequence[Done]], error: MmxError
    ) -> list[Done | MmxError]:
        """Rows of which one at least cannot be worked on, each alone."""
        found: list[Done | MmxError] = [error] if len(rows) == 1 else [_alone(work, row) for row in rows]
        self.ever = self.ever or not all(isinstance(done, MmxError) for done in found)
        if not self.ever:
            raise error
        return found

    def _went_well(self) -> None:
        self.well, self.ever = self.well + 1, True
        if self.well >= PATIENCE:
            self.most, self.well = min(2 * self.most, sys.maxsize), 0


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, or that is what an error was raised from: a CPU's allocator has no error of its own."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _TOLD):
            return True
        error = error.__cause__
    return False


def _attempt(work: Callable[[Sequence[Row]], Sequence[Done]], part: Sequence[Row]) -> Sequence[Done] | None:
    """None where memory ran out."""
    try:
        return work(part)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()  # out here, where the error no longer holds the tensors of the frames it passed
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    return None


def _alone(work: Callable[[Sequence[Row]], Sequence[Done]], row: Row) -> Done | MmxError:
    try:
        done = _attempt(work, [row])
    except MmxError as error:
        return error
    return _too_much() if done is None else done[0]


def _too_much() -> MmxError:
    return MmxError("memory ran out on this input alone; expected room for it, try fewer --beams, or another --device.")
