"""Bootstrap intervals of metrics, and the paired bootstrap test of two systems.

Images are drawn with replacement, each with all of its texts (Koehn, "Statistical Significance Tests for Machine
Translation Evaluation", 2004, sections 3 and 4). A metric is computed from the texts of the sample; only the n-gram
weights of CIDEr stay those of all references.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmx.evaluation.scores import MetricStatistics

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """A metric with its 95 % interval, which is (nan, nan) without resamples."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A metric of two systems on the same texts.

    Args:
        difference: second - first.
        low: of its 95 % interval.
        high: of its 95 % interval.
        p_value: two-sided, of the hypothesis that the systems do not differ; at least 2 / (resamples + 1).
    """

    name: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float


def score_intervals(
    metrics: Sequence[MetricStatistics], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[Score]:
    """Return each metric with its interval: the percentiles 2.5 and 97.5 of its values for the samples."""
    samples = resample(metrics, num_resamples, seed)
    scores = []
    for metric, values in zip(metrics, samples, strict=True):
        low, high = _interval(values)
        scores.append(Score(metric.name, metric.value, low, high))
    return scores


def compare_metrics(
    first: Sequence[MetricStatistics],
    second: Sequence[MetricStatistics],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """Return the differences of two systems. Both metrics of a pair are of the same texts, and of the same samples."""
    samples = resample([*first, *second], num_resamples, seed)
    comparisons = []
    for index, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        differences = samples[len(first) + index] - samples[index]
        low, high = _interval(differences)
        comparisons.append(
            Comparison(
                name=ours.name,
                first=ours.value,
                second=theirs.value,
                difference=theirs.value - ours.value,
                low=low,
                high=high,
                p_value=_p_value(differences),
            )
        )
    return comparisons


def resample(metrics: Sequence[MetricStatistics], num_resamples: int, seed: int) -> NDArray[np.float64]:
    """Return the values of metrics for samples of the images, [metrics, resamples]."""
    by_image = _sum_by_image(metrics)
    num_images = len(by_image)
    bounds = np.cumsum([0, *(metric.statistics.shape[1] for metric in metrics)])
    generator = np.random.default_rng(seed)
    values = np.empty((len(metrics), num_resamples))
    for sample in range(num_resamples):
        drawn = generator.integers(num_images, size=num_images)
        counts = np.bincount(drawn, minlength=num_images).astype(np.float64)
        sums = counts @ by_image
        for index, metric in enumerate(metrics):
            values[index, sample] = metric.combine(sums[bounds[index] : bounds[index + 1]].tolist())
    return values


def _sum_by_image(metrics: Sequence[MetricStatistics]) -> NDArray[np.float64]:
    """Return the statistics of all metrics, summed over the texts of each image, [images, statistics]."""
    images = np.unique(np.concatenate([metric.examples for metric in metrics]))
    columns = []
    for metric in metrics:
        sums = np.zeros((len(images), metric.statistics.shape[1]))
        np.add.at(sums, np.searchsorted(images, metric.examples), metric.statistics)
        columns.append(sums)
    return np.concatenate(columns, axis=1)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the percentiles of the finite values: a sample may have none of the texts of a metric."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(finite, [tail, 1 - tail]).tolist()
    return low, high


def _p_value(differences: NDArray[np.float64]) -> float:
    """Return twice the fraction of samples on the other side of zero, with the observed data as one more sample."""
    finite = differences[np.isfinite(differences)]
    if not len(finite):
        return math.nan
    smaller = min((finite <= 0).sum(), (finite >= 0).sum())
    return min(1.0, 2 * (1 + float(smaller)) / (1 + len(finite)))
