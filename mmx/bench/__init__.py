"""Benchmarks: decoding and training compared with transformers, in one process with the same weights and inputs."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import get_args

import torch

from mmx.bench import attention_maps, cache, constraints, decoding, formats, images, training
from mmx.bench.hf_references import SHAPES, BenchSetting
from mmx.bench.timing import BenchResult
from mmx.config.schema import Precision
from mmx.encoders.pretrained.hf_models import suppress_hf_output
from mmx.errors import MmxError, suggest

__all__ = ["SIZES", "WORKLOADS", "BenchResult", "machine", "run"]

WORKLOADS: dict[str, Callable[[BenchSetting], Iterator[BenchResult]]] = {
    "greedy": decoding.greedy,
    "beams": decoding.beams,
    "questions": decoding.questions,
    "cache": cache.cache,
    "attention-maps": attention_maps.attention_maps,
    "training": training.training,
    "images": images.images,
    "constraints": constraints.constraints,
    "formats": formats.formats,
    "startup": images.startup,
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
    """Run workloads and yield each result as soon as it is known.

    Args:
        names: names of WORKLOADS; all if empty.
        size: one of SIZES.
        repeats: number of timed runs.
        dtype: of the decoder's weights in mmx.
        device: such as "cpu" or "cuda".
        progress: called with the name of each workload before it runs.

    Raises:
        MmxError: code `bench.workload`, `bench.size` or `bench.dtype`, for an unknown name, before anything runs.
    """
    for name in names:
        _check_name("workload", name, list(WORKLOADS))
    if size not in SHAPES:
        _check_name("size", size, list(SIZES))
    _check_name("dtype", dtype, list(get_args(Precision)))
    setting = BenchSetting(size, repeats, dtype, device)
    return _results(list(dict.fromkeys(names)) or list(WORKLOADS), setting, progress)


def machine(device: str = "cpu") -> dict[str, str | int]:
    """Return the processor, the number of threads and the versions that timings depend on."""
    on_cpu = torch.device(device).type == "cpu"
    return {
        "processor": _processor() if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _check_name(kind: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise MmxError(
            f"there is no {kind} {name!r}; {suggest(name, known)}", code=f"bench.{kind}", given=name, expected=known
        )


def _results(names: Sequence[str], setting: BenchSetting, progress: Callable[[str], object]) -> Iterator[BenchResult]:
    for name in names:
        progress(name)
        with suppress_hf_output():
            yield from WORKLOADS[name](setting)


def _processor() -> str:
    """Return the name of the processor; from /proc/cpuinfo where there is one."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for row in file:
                if row.startswith("model name"):
                    return row.split(":")[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
