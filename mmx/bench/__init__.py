"""Bench: our decoding and training beside transformers, same machine, same weights, same inputs, in one process."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, get_args

import torch

from mmx.bench.attention_maps import attention_maps
from mmx.bench.cache import cache
from mmx.bench.decoding import beams, greedy, questions
from mmx.bench.hf_references import SHAPES, BenchSetting
from mmx.bench.images import images, startup
from mmx.bench.timing import BenchResult
from mmx.bench.training import training
from mmx.config.schema import Precision
from mmx.encoders.pretrained.hf_models import suppress_hf_output
from mmx.errors import MmxError, suggest

__all__ = ["SIZES", "WORKLOADS", "BenchResult", "machine", "run"]

WORKLOADS: dict[str, Callable[[BenchSetting], Iterator[BenchResult]]] = {
    "greedy": greedy,
    "beams": beams,
    "questions": questions,
    "cache": cache,
    "looking": attention_maps,
    "training": training,
    "pictures": images,
    "start": startup,
}
SIZES = ("tiny", "base")


def run(
    names: Sequence[str] = (),
    size: str = "tiny",
    repeats: int = 5,
    dtype: Precision = "float32",
    device: str = "cpu",
    progress: Callable[[str], object] = lambda name: None,
) -> Iterator[BenchResult]:
    """Measure some workloads, or all; yield each figure once it is known. `progress` is told what begins.

    Raises MmxError, before anything is measured, for a name, size or type that does not exist.
    """
    for name in names:
        if name not in WORKLOADS:
            raise MmxError(f"there is no workload {name!r}; {suggest(name, list(WORKLOADS))}")
    if size not in SHAPES:
        raise MmxError(f"there is no size {size!r}; {suggest(size, list(SIZES))}")
    if dtype not in (known := get_args(Precision)):
        raise MmxError(f"there is no dtype {dtype!r}; {suggest(dtype, list(known))}")
    return _figures(list(dict.fromkeys(names)) or list(WORKLOADS), BenchSetting(size, repeats, dtype, device), progress)


def _figures(names: Sequence[str], setting: BenchSetting, progress: Callable[[str], object]) -> Iterator[BenchResult]:
    for name in names:
        progress(name)
        with suppress_hf_output():
            yield from WORKLOADS[name](setting)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What has to be known beside a time: the processor, torch's threads, the versions."""
    return {
        "processor": _processor() if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _processor() -> str:
    """Its name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
