"""Timing: contenders run in turn, so that a drift of the machine meets all alike; what they took, as figures.

A figure has medians and ranges. Its ratio is theirs / ours in time, of each pair of runs side by side: above 1, ours is
faster. Memory is read in a run of its own, which is not timed.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

import torch

STATM = Path("/proc/self/statm")  # Linux alone has it; elsewhere no memory is told
PAGE, MEGABYTE = 4096, 1e6
EVERY = 0.001  # seconds between two looks at the memory


@dataclass(frozen=True)
class Spread:
    """The median over the counted runs, and their range."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """That of some values."""
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class TimedRuns:
    """What one contender took. first: what its warm-up gave; peak_mb: most memory above the level before a run."""

    seconds: list[float]
    first: Any = None
    peak_mb: float | None = None


@dataclass(frozen=True)
class BenchResult:
    """One line of the table: `ours` and `theirs` in `unit`, the ratio of the times theirs / ours.

    same: whether both said the same tokens (in training: had the same loss); None where nothing can be compared.
    """

    name: str
    unit: str
    ours: Spread
    theirs: Spread | None = None
    ratio: Spread | None = None
    same: bool | None = None
    ours_peak_mb: float | None = None
    theirs_peak_mb: float | None = None
    note: str = ""


def compare(
    name: str,
    unit: str,
    value: Callable[[float], float],
    ours: TimedRuns,
    theirs: TimedRuns | None = None,
    same: bool | None = None,
    note: str = "",
) -> BenchResult:
    """The figure of two contenders that ran in turn; `value`: seconds of a run -> a number in `unit`."""
    told = Spread.of([value(seconds) for seconds in ours.seconds])
    if theirs is None:
        return BenchResult(name, unit, told, ours_peak_mb=ours.peak_mb, same=same, note=note)
    pairs = zip(theirs.seconds, ours.seconds, strict=True)
    return BenchResult(
        name,
        unit,
        told,
        Spread.of([value(seconds) for seconds in theirs.seconds]),
        Spread.of([other / own for other, own in pairs]),
        same,
        ours.peak_mb,
        theirs.peak_mb,
        note,
    )


def alternate(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, TimedRuns]:
    """Run each once uncounted, then all in turn `repeats` times, then each once more while its memory is watched."""
    first = {name: run() for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            _settle(device)
            started = clock()
            run()
            _settle(device)
            seconds[name].append(clock() - started)
    return {name: TimedRuns(seconds[name], first[name], peak_of(run, device)) for name, run in contenders.items()}


def peak_of(run: Callable[[], Any], device: str = "cpu") -> float | None:
    """Most megabytes that were held during a run above what was held before; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE
    with ResidentMemory() as memory:
        run()
    return memory.peak_mb


class ResidentMemory:
    """Watches this process's resident memory in a thread while a block runs."""

    def __init__(self) -> None:
        self.before = self.most = 0.0
        self._over = Event()

    def __enter__(self) -> ResidentMemory:
        _give_back()
        self.before = self.most = resident_mb()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self.most = max(self.most, resident_mb())

    @property
    def peak_mb(self) -> float | None:
        """Most above the level before; None where there is no /proc."""
        return self.most - self.before if STATM.exists() else None

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            self.most = max(self.most, resident_mb())


def resident_mb() -> float:
    """Megabytes of this process that are in memory; 0 where there is no /proc."""
    try:
        return int(STATM.read_text().split()[1]) * PAGE / MEGABYTE
    except OSError:
        return 0.0


def _give_back() -> None:
    """Return freed memory to the system, or what an earlier run left to the allocator would pass for held before."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _settle(device: str) -> None:
    """Wait for what was only started: a GPU works on while Python measures."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
