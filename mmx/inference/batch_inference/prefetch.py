"""Prefetching: the inputs of the next batch are read and decoded while the current batch is on the GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Prefetcher:
    """Applies a function to the items of each batch; with threads, one batch ahead of its use.

    Threads are used with a GPU only. On a CPU they compete with the threads of the model's operations: 22.6 ms per
    image against 13.9 ms without them, for a small model on two cores.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = None if device.type == "cpu" else ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def map(
        self, function: Callable[[ItemT], ResultT], batches: Iterable[Sequence[ItemT]]
    ) -> Iterator[tuple[Sequence[ItemT], list[ResultT]]]:
        """Yield each batch with the results of its items, in order."""
        if self.pool is None:
            for batch in batches:
                yield batch, [function(item) for item in batch]
            return
        pool = self.pool
        yield from one_ahead((batch, pool.map(function, batch)) for batch in batches)


def batched(items: Iterable[ItemT], size: int) -> Iterator[list[ItemT]]:
    """Yield lists of up to `size` consecutive items."""
    iterator = iter(items)
    while batch := list(islice(iterator, max(1, size))):
        yield batch


def one_ahead(
    started: Iterable[tuple[Sequence[ItemT], Iterator[ResultT]]],
) -> Iterator[tuple[Sequence[ItemT], list[ResultT]]]:
    """Yield started batches in order, each once the following one has been started too."""
    waiting: tuple[Sequence[ItemT], Iterator[ResultT]] | None = None
    for following in started:
        if waiting is not None:
            batch, results = waiting
            waiting = following
            yield batch, list(results)
        else:
            waiting = following
    if waiting is not None:
        yield waiting[0], list(waiting[1])
