"""Validation during training: the metrics of one set, and the value that decides which state is the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object

from mmx.data.examples import Example
from mmx.errors import DataError, TrainingError
from mmx.evaluation.evaluate import EvaluationOptions, ProcessGroup, evaluate
from mmx.evaluation.report import EvaluationReport
from mmx.inference.pipeline import Pipeline


def evaluate_on_all_ranks(
    pipeline: Pipeline,
    examples: Sequence[Example],
    accelerator: Accelerator,
    max_skip_fraction: float,
    should_stop: Callable[[], bool],
) -> EvaluationReport:
    """Evaluate examples that all ranks share.

    Raises:
        TrainingError: on all ranks, if too many examples cannot be read.
    """
    gather = gather_object if accelerator.num_processes > 1 else list
    processes = ProcessGroup(accelerator.process_index, accelerator.num_processes, gather)
    options = EvaluationOptions(max_skip_fraction=max_skip_fraction)
    try:
        return evaluate(pipeline, examples, options, processes, should_stop=should_stop)
    except DataError as error:
        raise TrainingError(
            f"the validation failed: {error}", code="training.validation_unreadable", **error.details
        ) from error


def best_metric_value(metric: str, metrics: Mapping[str, float], sets: Collection[str], step: int) -> float:
    """Return the value of `metric_for_best_model`; the largest is the best, so losses are negative.

    Args:
        metric: "loss", the mean over the validation sets, or "SET.METRIC".
        metrics: all metrics of the validation, by "SET.METRIC".
        sets: names of the validation sets.
        step: for the messages.

    Raises:
        TrainingError: the metric is missing, or any metric is not finite.
    """
    names = [f"{name}.loss" for name in sets] if metric == "loss" else [metric]
    missing = [name for name in names if name not in metrics]
    if missing:
        known = sorted(metrics)
        raise TrainingError(
            f"training.metric_for_best_model is {metric!r}, and the validation after step {step} has no "
            f"{', '.join(missing)}; expected 'loss' or one of {', '.join(known)}.",
            code="training.best_metric",
            given=metric,
            known=known,
            missing=missing,
        )
    not_finite = [name for name, value in metrics.items() if not math.isfinite(value)]
    if not_finite:
        raise TrainingError(
            f"{', '.join(not_finite)} is not finite after step {step}; look for values that are not finite in the "
            "validation data, or lower training.learning_rate.",
            code="training.metric_not_finite",
            metrics=not_finite,
            step=step,
        )
    value = sum(metrics[name] for name in names) / len(names)
    return -value if is_loss(metric) else value


def is_loss(metric: str) -> bool:
    """Return whether `metric_for_best_model` is a loss, which is measured on the reference texts."""
    return metric == "loss" or metric.endswith(".loss")
