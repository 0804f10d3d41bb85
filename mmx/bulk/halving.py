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
_TOLD = ("DefaultCPUAllocator", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Halving:
    """Works on rows in stretches that memory has room for; the size that was found is kept for what follows."""

    def __init__(self) -> None:
        self.most, self.well = sys.maxsize, 0

    def run(self, rows: Sequence[Row], work: Callable[[Sequence[Row]], Sequence[Done]]) -> list[Done | MmxError]:
        """What `work` gives for each of the rows, in their order; an error for a row that is too much even alone."""
        found: list[Done | MmxError] = []
        while len(found) < len(rows):
            part = rows[len(found) : len(found) + self.most]
            done = _attempt(work, part)
            if done is not None:
                found += done
                self._went_well()
            elif len(part) > 1:
                self.most, self.well = len(part) // 2, 0
            else:
                found.append(_too_much())
        return found

    def _went_well(self) -> None:
        self.well += 1
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
    return None


def _too_much() -> MmxError:
    return MmxError("memory ran out on this input alone; expected room for it, try fewer --beams, or another --device.")
