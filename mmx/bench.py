"""Bench: what things cost, as medians and ratios of alternating runs in one process.

Workloads: `questions` (16 questions about one picture beside one), `captions` (a picture in a warm batch).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mmx.data.scenes import draw_scene, picture
from mmx.pipeline import Pipeline

QUESTIONS = [
    f"{start} {shape}?"
    for start in ("is there a", "what color is the", "how many", "where is the")
    for shape in ("circle", "square", "triangle", "star")
]


@dataclass(frozen=True)
class Figure:
    """One line of the table. low and high: the range over the repeats, in `unit`."""

    name: str
    median: float
    low: float
    high: float
    unit: str


def run(pipeline: Pipeline, repeats: int = 9) -> list[Figure]:
    """Measure every workload."""
    return [*questions(pipeline, repeats), *captions(pipeline, repeats)]


def questions(pipeline: Pipeline, repeats: int) -> list[Figure]:
    """Encode and ask: one question, and sixteen over the same encoding."""
    image = picture(draw_scene(0, 0))
    times = alternate(
        {
            "1 question, picture encoded": lambda: pipeline.ask(image, QUESTIONS[:1]),
            "16 questions, picture encoded once": lambda: pipeline.ask(image, QUESTIONS),
        },
        repeats,
    )
    one, sixteen = times.values()
    ratio = [b / a for a, b in zip(one, sixteen, strict=True)]
    return [
        *(_figure(name, [1000 * t for t in found], "ms") for name, found in times.items()),
        _figure("16 questions / 1 question", ratio, "times"),
    ]


def captions(pipeline: Pipeline, repeats: int, batch: int = 16) -> list[Figure]:
    """Caption a warm batch, from PIL pictures to texts."""
    images = [picture(draw_scene(0, i)) for i in range(batch)]
    times = alternate({"a caption, in a batch of 16": lambda: list(pipeline.captions(images, batch))}, repeats)
    return [_figure(name, [1000 * t / batch for t in found], "ms a picture") for name, found in times.items()]


def alternate(workloads: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each workload, run in turn after one warm-up, so that a drift of the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in workloads}
    for number in range(repeats + 1):
        for name, workload in workloads.items():
            started = time.perf_counter()
            workload()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


def _figure(name: str, values: list[float], unit: str) -> Figure:
    return Figure(name, statistics.median(values), min(values), max(values), unit)
