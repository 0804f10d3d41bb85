"""Timing: functions are run in turn, so that a drift of the machine affects all of them alike.

A result has medians and ranges. Its ratio is reference / mmx in time, of each pair of consecutive runs: above 1, mmx is
faster. Memory is measured in a separate run that is not timed.
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
from typing import Generic, TypeVar

import torch

STATM = Path("/proc/self/statm")  # exists on Linux; elsewhere memory is not measured
PAGE_BYTES = 4096
MEGABYTE = 1e6
POLL_SECONDS = 0.001

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """Median and range of some values."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Measurement:
        """Return the median and range of `values`."""
        return Measurement(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class TimedRuns(Generic[T]):
    """Runs of one function.

    Attributes:
        seconds: of each timed run.
        output: of the run before the timed ones.
        peak_mb: peak memory of a run above the level before it, in megabytes; None if it cannot be measured.
    """

    seconds: Sequence[float]
    output: T
    peak_mb: float | None = None


@dataclass(frozen=True)
class Quantity:
    """What a result reports: `convert` maps the seconds of a run to a number in `unit`."""

    name: str
    unit: str
    convert: Callable[[float], float]

    def measure(self, seconds: Sequence[float]) -> Measurement:
        """Return the median and range of runs of these durations."""
        return Measurement.of([self.convert(duration) for duration in seconds])


@dataclass(frozen=True)
class BenchResult:
    """One row of the table.

    Attributes:
        name: workload and variant.
        unit: unit of `mmx` and `reference`.
        mmx: measurement of mmx.
        reference: measurement of the reference, transformers if not named otherwise; None without a reference.
        ratio: time of the reference / time of mmx.
        same: whether both generated the same tokens (in training: had the same loss); None if not comparable.
        mmx_peak_mb: peak memory of mmx.
        reference_peak_mb: peak memory of the reference.
        note: printed below the table.
    """

    name: str
    unit: str
    mmx: Measurement
    reference: Measurement | None = None
    ratio: Measurement | None = None
    same: bool | None = None
    mmx_peak_mb: float | None = None
    reference_peak_mb: float | None = None
    note: str = ""


def compare(
    quantity: Quantity,
    mmx: TimedRuns[T],
    reference: TimedRuns[T] | None = None,
    same: bool | None = None,
    note: str = "",
) -> BenchResult:
    """Return the result of two functions that ran in turn, or of one alone."""
    measured = quantity.measure(mmx.seconds)
    if reference is None:
        return BenchResult(quantity.name, quantity.unit, measured, mmx_peak_mb=mmx.peak_mb, same=same, note=note)
    ratios = [other / own for other, own in zip(reference.seconds, mmx.seconds, strict=True)]
    return BenchResult(
        quantity.name,
        quantity.unit,
        measured,
        quantity.measure(reference.seconds),
        Measurement.of(ratios),
        same,
        mmx.peak_mb,
        reference.peak_mb,
        note,
    )


def alternate(
    functions: Mapping[str, Callable[[], T]],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, TimedRuns[T]]:
    """Run each function once untimed, then all in turn `repeats` times, then each once while its memory is measured."""
    outputs = {name: function() for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            _synchronize(device)
            start = clock()
            function()
            _synchronize(device)
            seconds[name].append(clock() - start)
    runs = {}
    for name, function in functions.items():
        runs[name] = TimedRuns(seconds[name], outputs[name], measure_peak_mb(function, device))
    return runs


def measure_peak_mb(function: Callable[[], object], device: str = "cpu") -> float | None:
    """Return the peak memory of a run above the level before it, in megabytes; None if it cannot be measured."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE
    with ResidentMemory() as memory:
        function()
    return memory.peak_mb


class ResidentMemory:
    """Context manager that polls the resident memory of this process in a thread."""

    def __init__(self) -> None:
        self.before = 0.0
        self.highest = 0.0
        self._stop = Event()

    def __enter__(self) -> ResidentMemory:
        _release_freed_memory()
        self.before = resident_mb()
        self.highest = self.before
        self._thread = Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.highest = max(self.highest, resident_mb())

    @property
    def peak_mb(self) -> float | None:
        """Peak above the level before, in megabytes; None where there is no /proc."""
        return self.highest - self.before if STATM.exists() else None

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.highest = max(self.highest, resident_mb())


def resident_mb() -> float:
    """Return the resident memory of this process in megabytes; 0 where there is no /proc."""
    try:
        return int(STATM.read_text().split()[1]) * PAGE_BYTES / MEGABYTE
    except OSError:
        return 0.0


def _release_freed_memory() -> None:
    """Return freed memory to the system; else memory that the allocator kept would count as the level before a run."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _synchronize(device: str) -> None:
    """Wait for kernels that were launched asynchronously."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
