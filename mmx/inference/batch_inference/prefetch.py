"""Batches of inputs and what is made of each: beside a GPU in threads and one batch ahead, on a CPU when it is due."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, Protocol, TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


class Prefetcher(Protocol):
    """Each batch with what a function makes of its items."""

    def __call__(
        self, make: Callable[[Item], Made], batches: Iterable[Sequence[Item]]
    ) -> Iterator[tuple[Sequence[Item], list[Made]]]: ...


@contextmanager
def prefetcher(device: torch.device) -> Iterator[Prefetcher]:
    """How files are read beside a device.

    Beside a GPU, those of the next batch are read and decoded in threads while this one is spoken about; on a CPU the
    threads of the model's own operations would wait for them, which costs more (22.6 ms a picture against 13.9, of a
    small model on two cores).
    """
    if device.type == "cpu":
        yield _when_due
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def in_threads(
            make: Callable[[Item], Made], batches: Iterable[Sequence[Item]]
        ) -> Iterator[tuple[Sequence[Item], list[Made]]]:
            return one_ahead((batch, pool.map(make, batch)) for batch in batches)

        yield in_threads


def _when_due(
    make: Callable[[Item], Made], batches: Iterable[Sequence[Item]]
) -> Iterator[tuple[Sequence[Item], list[Made]]]:
    return ((batch, [make(item) for item in batch]) for batch in batches)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Stretches of up to `size` items."""
    following = iter(items)
    while batch := list(islice(following, max(1, size))):
        yield batch


def one_ahead(started: Iterable[tuple[Sequence[Any], Iterator[Any]]]) -> Iterator[tuple[Sequence[Any], list[Any]]]:
    """What was started, in order, each only when the one after it has been started as well."""
    waiting: list[tuple[Sequence[Any], Iterator[Any]]] = []
    for item in chain(started, [None]):
        if waiting:
            batch, found = waiting.pop()
            waiting += [item] if item else []
            yield batch, list(found)
        elif item:
            waiting.append(item)
