"""Evaluation of a model on examples, in one process or several.

Every process evaluates whole batches, and batches hold the same examples for any number of processes. The results are
therefore bitwise equal for any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from mmx.config.schema import GenerationConfig
from mmx.data.examples import Example, TextTask, check_sources
from mmx.encoders.contract import PreparedInput
from mmx.errors import DataError, MmxError
from mmx.evaluation.aggregate import aggregate_metrics
from mmx.evaluation.losses import IMAGE, BatchLoss, add_losses, condition_memories, select_rows, text_losses
from mmx.evaluation.report import CUT_TARGETS, EvaluatedText, EvaluationReport
from mmx.inference.generator import TextGenerator
from mmx.memory import Memory
from mmx.models.source import prepare_inputs

MIN_SKIP_LIMIT = 10  # unreadable examples that are tolerated in a set of 100 or more
MIN_SKIP_FRACTION = 0.1  # and in a smaller set, as a fraction of it
_MAX_NAMED = 3
T = TypeVar("T")


class Gather(Protocol):
    """Collects a list with one element from every process, in all processes: accelerate's `gather_object`."""

    def __call__(self, items: list[T], /) -> list[T]: ...


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share an evaluation: this one is `rank` of `world_size`; `gather` collects their results."""

    rank: int = 0
    world_size: int = 1
    gather: Gather = list


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of `evaluate`.

    Args:
        generation: decoding options; None for those of the pipeline.
        batch_size: examples in a batch.
        max_skip_fraction: the largest fraction of unreadable examples, see `skip_limit`.
        information: whether to measure the bits per word under several conditions, see `mmx.evaluation.losses`. This
            takes three to five more forward passes over the targets, and a second encoding.
        training_captions: captions of the training data; adds the metric `novel`, the number of generated captions
            that are none of them.
    """

    generation: GenerationConfig | None = None
    batch_size: int = 32
    max_skip_fraction: float = 0.001
    information: bool = False
    training_captions: Collection[str] = ()


def skip_limit(num_examples: int, max_skip_fraction: float) -> int:
    """Return how many examples of a set may be unreadable.

    This is the configured fraction, and at least MIN_SKIP_LIMIT examples, or MIN_SKIP_FRACTION of a small set.
    """
    least = min(MIN_SKIP_LIMIT, MIN_SKIP_FRACTION * num_examples)
    return math.floor(max(least, max_skip_fraction * num_examples))


def first_skipped(skipped: Sequence[str]) -> str:
    """Return the first reasons of unreadable examples as the end of a sentence."""
    named = "; ".join(reason.rstrip(".") for reason in skipped[:_MAX_NAMED])
    return f"{named}; and {len(skipped) - _MAX_NAMED} more" if len(skipped) > _MAX_NAMED else named


def evaluate(
    pipeline: TextGenerator,
    examples: Sequence[Example],
    options: EvaluationOptions | None = None,
    processes: ProcessGroup | None = None,
    progress: Callable[[int], object] = lambda done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvaluationReport:
    """Caption all examples, answer all questions, and compare the texts with the references.

    Args:
        pipeline: the model with its default decoding options.
        examples: a data set, see `mmx.data.formats.read_examples`.
        options: see EvaluationOptions.
        processes: see ProcessGroup. Process r evaluates the batches r, r + world_size, ...
        progress: called after each batch with its number of examples.
        should_stop: called before each batch; True ends the evaluation with the batches done so far.

    Raises:
        DataError: more examples than `skip_limit` allows cannot be read, or an example has no input for any source of
            the model.
    """
    options = options or EvaluationOptions()
    processes = processes or ProcessGroup()
    results = _BatchResults([], [], [], [])
    for batch in range(processes.rank, math.ceil(len(examples) / options.batch_size), processes.world_size):
        if should_stop():
            break
        positions = range(len(examples))[batch * options.batch_size :][: options.batch_size]
        _evaluate_batch(pipeline, examples, batch, positions, options, results)
        progress(len(positions))
    merged = _gather_results(results, processes.gather)
    skipped = [reason for _, reason in merged.skipped]
    limit = skip_limit(len(examples), options.max_skip_fraction)
    if len(skipped) > limit:
        raise DataError(
            f"{len(skipped)} of {len(examples)} examples cannot be read, and at most {limit} may be; "
            f"correct or remove them: {first_skipped(skipped)}.",
            code="evaluation.too_many_skipped",
            skipped=len(skipped),
            examples=len(examples),
            limit=limit,
            reasons=skipped,
        )
    metrics = aggregate_metrics(merged.predictions, merged.losses, options.training_captions)
    cut = [origin for _, origin in merged.cut]
    if cut:
        metrics[CUT_TARGETS] = len(cut)
    return EvaluationReport(metrics, merged.predictions, skipped, cut)


class _BatchResults(NamedTuple):
    """Results of some batches. skipped: (position of the example, reason); cut: (position, origin) of each cut text."""

    predictions: list[EvaluatedText]
    losses: list[BatchLoss]
    skipped: list[tuple[int, str]]
    cut: list[tuple[int, str]]


class _PreparedExample(NamedTuple):
    """An example, its position in the data, and the prepared inputs of each source."""

    position: int
    example: Example
    inputs: dict[str, PreparedInput]


def _gather_results(results: _BatchResults, gather: Gather) -> _BatchResults:
    """The results of all processes in the order of the examples."""
    merged = _BatchResults([], [], [], [])
    for part in gather([results]):
        merged.predictions.extend(part.predictions)
        merged.losses.extend(part.losses)
        merged.skipped.extend(part.skipped)
        merged.cut.extend(part.cut)
    merged.predictions.sort(key=lambda text: text.key)
    merged.losses.sort(key=lambda loss: loss.batch)
    merged.skipped.sort()
    merged.cut.sort()
    return merged


def _evaluate_batch(
    pipeline: TextGenerator,
    examples: Sequence[Example],
    batch: int,
    positions: Sequence[int],
    options: EvaluationOptions,
    results: _BatchResults,
) -> None:
    """Add the results of one batch, whose images are encoded once."""
    prepared = []
    for position in positions:
        origin = f"example {position}"
        try:
            example = examples[position]
        except MmxError as error:
            results.skipped.append((position, f"{origin}: {error}"))
            continue
        origin = example.origin or example.id
        check_sources(example, pipeline.model.encoders)
        try:
            prepared.append(_PreparedExample(position, example, _prepare(pipeline, example)))
        except MmxError as error:
            results.skipped.append((position, f"{origin}: {error}"))
    if not prepared:
        return
    inputs = [item.inputs for item in prepared]
    memory = pipeline.encode_prepared(inputs, allow_unconditional=True)  # an example may be built without inputs
    memories: Mapping[str, Memory] = {IMAGE: memory}
    if options.information:
        memories = condition_memories(pipeline, memory, inputs)
    losses = []
    for with_question in (False, True):  # captions and questions differ in length: separate passes need less padding
        tasks = [_numbered_tasks(item.example, with_question) for item in prepared]
        results.predictions.extend(_predict(pipeline, memory, prepared, tasks, options.generation))
        found = text_losses(pipeline, memories, [_without_numbers(row) for row in tasks])
        losses.append(found)
        for row in found.cut:
            example = prepared[row].example
            results.cut.append((prepared[row].position, example.origin or example.id))
    results.losses.append(add_losses(batch, losses))


def _prepare(pipeline: TextGenerator, example: Example) -> dict[str, PreparedInput]:
    """The inputs of the sources that the model has. Raises MmxError, also for a question that is too long."""
    for task in example.tasks:
        pipeline.prompt_tokens(task.question)
    return prepare_inputs(pipeline.model.encoders, example.sources)


def _numbered_tasks(example: Example, with_question: bool) -> list[tuple[int, TextTask]]:
    """The tasks with or without a question, and their indices."""
    return [(i, task) for i, task in enumerate(example.tasks) if (task.question is not None) == with_question]


def _without_numbers(tasks: Sequence[tuple[int, TextTask]]) -> list[TextTask]:
    return [task for _, task in tasks]


def _predict(
    pipeline: TextGenerator,
    memory: Memory,
    prepared: Sequence[_PreparedExample],
    tasks: Sequence[Sequence[tuple[int, TextTask]]],
    generation: GenerationConfig | None,
) -> list[EvaluatedText]:
    """The best generated text for each task of each row."""
    rows = [row for row, numbered in enumerate(tasks) if numbered]
    if not rows:
        return []
    questions = []
    boxes = []
    for row in rows:
        questions.append([task.question for _, task in tasks[row]])
        boxes.append([task.box for _, task in tasks[row]])
    generated = pipeline.generate_batch(select_rows(memory, rows), questions, generation or pipeline.generation, boxes)
    predictions = []
    for row, texts in zip(rows, generated, strict=True):
        item = prepared[row]
        for (number, task), candidates in zip(tasks[row], texts, strict=True):
            best = candidates[0]
            predictions.append(
                EvaluatedText(
                    key=(item.position, number),
                    id=item.example.id,
                    question=task.question,
                    question_type=task.question_type,
                    prediction=best.text,
                    score=best.score,
                    targets=task.targets,
                    logprob=best.logprob,
                    probability=best.probability,
                    box=task.box,
                )
            )
    return predictions
