"""The time that a run still needs, measured over its first steps, and what would shorten it most easily."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from mmx.config.schema import RunConfig
from mmx.training.precision import has_bf16_units

NUM_STEPS = 5
LONG_SECONDS = 3600
LARGE_DATA_FRACTION = 0.3  # of a step: above, faster data helps more than faster arithmetic

T = TypeVar("T")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: waiting for its data, and computing."""

    data: float
    compute: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.data + self.compute


@dataclass
class StepTimer:
    """Measures the first NUM_STEPS steps of a process.

    Args:
        clock: returns seconds.
    """

    clock: Callable[[], float] = time.monotonic
    waits: list[float] = field(default_factory=list)
    computes: list[float] = field(default_factory=list)
    _started: float = 0.0

    def measure_data(self, steps: Iterator[T]) -> Iterator[T]:
        """Yield the data of each step; the caller calls `end_step` when it has computed the step."""
        while True:
            start = self.clock()
            try:
                data = next(steps)
            except StopIteration:
                return
            self._started = self.clock()
            if len(self.waits) < NUM_STEPS:
                self.waits.append(self._started - start)
            yield data

    def end_step(self) -> StepTime | None:
        """Note that a step has ended. Return the typical time of a step when NUM_STEPS have ended, else None.

        It is the median without the first step, which starts workers and prepares kernels.
        """
        if len(self.computes) == NUM_STEPS:
            return None
        self.computes.append(self.clock() - self._started)
        if len(self.computes) < NUM_STEPS:
            return None
        return StepTime(statistics.median(self.waits[1:]), statistics.median(self.computes[1:]))


def time_left_line(config: RunConfig, step: int, step_time: StepTime, device: str) -> str:
    """Return a sentence with the time left after a step; where that is more than an hour, also with a remedy."""
    seconds = (config.training.max_steps - step) * step_time.total
    line = f"step {step}: about {format_duration(seconds)} left at {step_time.total:.2g} s a step, without validation"
    return f"{line}; {nearest_remedy(config, step_time, device)}" if seconds > LONG_SECONDS else line


def nearest_remedy(config: RunConfig, step_time: StepTime, device: str) -> str:
    """Return the easiest change that would shorten a run, given where its time goes.

    Args:
        config: the run, with its precision resolved.
        step_time: time of a step.
        device: type of the device, such as "cpu".
    """
    data_fraction = step_time.data / step_time.total
    if data_fraction > LARGE_DATA_FRACTION:
        return f"{data_fraction:.0%} of it is waiting for data: {_data_remedy(config)}"
    precision = config.training.mixed_precision
    if precision == "no" and has_bf16_units(device):
        return "bf16 is faster on this device: set training.mixed_precision=bf16"
    if precision == "bf16" and device == "cpu" and not has_bf16_units(device):
        return "float32 is faster on this processor: set training.mixed_precision=no"
    if device != "cpu":
        return "lower training.max_steps"
    if config.init is None:
        return "start from a trained model (init: bundled) with a lower training.max_steps, or use a GPU"
    if not any(group.freeze for group in config.training.param_groups.values()):
        return "freeze the encoders (training.param_groups, freeze: true), lower training.max_steps, or use a GPU"
    return "lower training.max_steps, or use a GPU"


def format_duration(seconds: float) -> str:
    """Return a duration such as "2 h 5 min", "5 min" or "40 s"."""
    if seconds < 60:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _data_remedy(config: RunConfig) -> str:
    """Return how to get data faster: in other processes where there are cores for them, else decoded only once."""
    num_cores = os.cpu_count() or 1
    workers = config.training.num_workers
    if workers == 0 and num_cores > 2:
        return f"set training.num_workers={min(4, num_cores - 1)}"
    if any(data.image_cache_size is None and data.path != "scenes" for data in config.train):
        return "set image_cache_size in the train data, such as 192"
    return f"set training.num_workers={workers + 1}"
