"""The command `mmx compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from mmx.cli.options import BatchSizeOption, DeviceOption, JsonOption, QuietOption, exit_with_status
from mmx.cli.score import (
    ClipOption,
    DataOption,
    InstancesOption,
    MetricsOption,
    ObjectsOption,
    OverridesArgument,
    ScoringOptions,
    ScoringRun,
    SeedOption,
    count_texts,
    finite,
    parse_metrics,
)
from mmx.errors import MmxError

if TYPE_CHECKING:
    from mmx.evaluation.bootstrap import Comparison
    from mmx.evaluation.joining import JoinedPredictions

_RESAMPLES_HELP = "Bootstrap samples of the test."


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Generated texts, as for `mmx score`.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Other texts for the same references.")],
    overrides: OverridesArgument = None,
    data: DataOption = None,
    metrics: MetricsOption = None,
    resamples: Annotated[int, typer.Option("--resamples", metavar="N", min=1, help=_RESAMPLES_HELP)] = 1000,
    seed: SeedOption = 0,
    clip: ClipOption = None,
    objects: ObjectsOption = None,
    instances: InstancesOption = None,
    device: DeviceOption = "cpu",
    batch_size: BatchSizeOption = 32,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare the texts of two programs by a paired bootstrap test.

    For each metric: A, B, B - A with its 95 % interval, and the two-sided p-value.
    Both are scored on the references that both have texts for; the others are named
    on stderr, and the exit code is 1.
    """
    from mmx.evaluation.bootstrap import compare_metrics

    options = ScoringOptions(parse_metrics(metrics), clip, objects, instances, device, batch_size, quiet)
    run = ScoringRun(data, overrides or [], options)
    ours = run.join(first)
    theirs = run.join(second)
    ours, theirs = _common(ours, theirs, run)
    comparisons = compare_metrics(run.statistics(ours.texts), run.statistics(theirs.texts), resamples, seed)
    document = {
        "metrics": {comparison.name: _fields(comparison) for comparison in comparisons},
        "texts": len(ours.texts),
        "a": count_texts(ours),
        "b": count_texts(theirs),
        "resamples": resamples,
        "seed": seed,
    }
    print(json.dumps(document) if as_json else f"{_table(comparisons)}\ntexts  {len(ours.texts):,}")
    exit_with_status(run.succeeded)


def _common(
    ours: JoinedPredictions, theirs: JoinedPredictions, run: ScoringRun
) -> tuple[JoinedPredictions, JoinedPredictions]:
    """Return both without the texts whose references the other has no text for. Raises MmxError if none is left."""
    common = {text.reference for text in ours.texts} & {text.reference for text in theirs.texts}
    if not common:
        message = "A and B have no references in common; expected two results of the same data."
        raise MmxError(message, code="compare.nothing_common")
    others = len(ours.texts) + len(theirs.texts) - 2 * len(common)
    if others and not run.has_references:  # with references, those without a text were reported when they were joined
        run.report(f"{others:,} captions are not compared, because the other file has no caption of their image.")
    return _restrict(ours, common), _restrict(theirs, common)


def _restrict(joined: JoinedPredictions, references: set[int]) -> JoinedPredictions:
    return replace(joined, texts=[text for text in joined.texts if text.reference in references])


def _fields(comparison: Comparison) -> dict[str, float | None]:
    fields = asdict(comparison)
    del fields["name"]
    return {name: finite(value) for name, value in fields.items()}


def _table(comparisons: Sequence[Comparison]) -> str:
    width = max(len(comparison.name) for comparison in comparisons)
    lines = [f"{'':<{width}}       A       B     B - A  95 % interval        p"]
    for row in comparisons:
        interval = f"[{row.low:+.4f}, {row.high:+.4f}]"
        numbers = f"{row.first:>6.4f}  {row.second:>6.4f}  {row.difference:>+8.4f}  {interval}"
        lines.append(f"{row.name:<{width}}  {numbers}  {row.p_value:.4f}")
    return "\n".join(lines)
