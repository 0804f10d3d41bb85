"""The command `mmx score`, and what it has in common with `mmx compare`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmx.cli.evaluate import parse_out_dir, print_written
from mmx.cli.options import BatchSizeOption, DeviceOption, JsonOption, QuietOption, check_device, exit_with_status
from mmx.errors import MmxError, one_line
from mmx.io.console import progress_bar, write_json

if TYPE_CHECKING:
    from mmx.evaluation.bootstrap import Score
    from mmx.evaluation.joining import CaptionedImages, JoinedPredictions, References, ScoredText
    from mmx.evaluation.scores import MetricStatistics

SCORES_FILE = "scores.json"

_PREDICTIONS_HELP = "Generated texts: rows of mmx (.jsonl), COCO or VQA results (.json), or a table (.csv, .tsv)."
_DATA_HELP = "A data file or folder with reference texts."
_METRICS_HELP = "Only these metrics, such as CIDEr,BLEU-4. Default: all that the texts allow."
_RESAMPLES_HELP = "Bootstrap samples for intervals; 0 for none."
_CLIP_HELP = "Also CLIPScore and RefCLIPScore with this CLIP: a folder, or a public name."
_OBJECTS_HELP = "Also CHAIR: a file with one object a line, its name and other words for it, with commas."
_INSTANCES_HELP = "For CHAIR: COCO instances, whose objects are in the images too."
_OUT_DIR_HELP = "Write scores.json here. Default: nothing is written."

DataOption = Annotated[str | None, typer.Option("--data", metavar="PATH", help=_DATA_HELP)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of the data, such as split=val.")
]
MetricsOption = Annotated[str | None, typer.Option("--metrics", metavar="NAME,...", help=_METRICS_HELP)]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the bootstrap samples.")]
ClipOption = Annotated[str | None, typer.Option("--clip", metavar="NAME", help=_CLIP_HELP)]
ObjectsOption = Annotated[Path | None, typer.Option("--objects", metavar="FILE", help=_OBJECTS_HELP)]
InstancesOption = Annotated[Path | None, typer.Option("--instances", metavar="FILE", help=_INSTANCES_HELP)]
OutDirOption = Annotated[str | None, typer.Option("--out-dir", metavar="FOLDER", help=_OUT_DIR_HELP)]


def score(
    predictions: Annotated[str, typer.Argument(metavar="PREDICTIONS", help=_PREDICTIONS_HELP)],
    overrides: OverridesArgument = None,
    data: DataOption = None,
    metrics: MetricsOption = None,
    resamples: Annotated[int, typer.Option("--resamples", metavar="N", min=0, help=_RESAMPLES_HELP)] = 1000,
    seed: SeedOption = 0,
    clip: ClipOption = None,
    objects: ObjectsOption = None,
    instances: InstancesOption = None,
    device: DeviceOption = "cpu",
    batch_size: BatchSizeOption = 32,
    out_dir: OutDirOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score the texts of any program.

    Captions: BLEU, ROUGE-L and CIDEr, and error rates of words and characters (WER,
    CER) if each has one reference. Answers: exact match, VQA accuracy and ANLS. Each
    with a 95 % bootstrap interval over images.

    Predictions join references by id (id, image_id, question_id) or by the path of
    the image, and answers also by the question. What does not join is named on
    stderr, is not scored, and makes the exit code 1.

    --clip NAME: also CLIPScore, and RefCLIPScore with --data. Without --data, only
    CLIPScore of captions.

    --objects FILE: also CHAIR, the fraction of mentioned objects that neither the
    references nor --instances have, and that of captions with one.
    """
    from mmx.evaluation.bootstrap import score_intervals

    out = parse_out_dir(out_dir)
    options = ScoringOptions(parse_metrics(metrics), clip, objects, instances, device, batch_size, quiet)
    run = ScoringRun(data, overrides or [], options)
    joined = run.join(predictions)
    scores = score_intervals(run.statistics(joined.texts), resamples, seed)
    document = _document(scores, joined, resamples, seed)
    if out is not None:
        write_json(out / SCORES_FILE, document)
        print_written(out / SCORES_FILE)
    print(json.dumps(document) if as_json else _table(scores, joined))
    exit_with_status(run.succeeded)


@dataclass(frozen=True)
class ScoringOptions:
    """Which metrics are computed, and how. metrics: names; all that the texts allow if there are none."""

    metrics: Sequence[str]
    clip: str | None
    objects: Path | None
    instances: Path | None
    device: str
    batch_size: int
    quiet: bool

    def check(self, overrides: Sequence[str], has_references: bool) -> None:
        """Raise MmxError for a device that is not available, and for options without the one that they need."""
        check_device(self.device)
        if self.instances is not None and self.objects is None:
            message = "--instances was given without the words of its objects; type --objects FILE, or leave it out."
            raise MmxError(message, code="option.unused", option="--instances")
        if has_references:
            return
        if self.clip is None:
            message = "no references were given; type --data PATH, or --clip NAME for CLIPScore, which needs none."
            raise MmxError(message, code="score.no_data")
        given = [*overrides, *(["--metrics"] if self.metrics else []), *(["--objects"] if self.objects else [])]
        if given:
            message = f"{given[0]} was given without references; type --data PATH, or leave it out."
            raise MmxError(message, code="option.unused", option=given[0])


class ScoringRun:
    """The references and metrics of a command.

    Attributes:
        succeeded: whether everything was read, joined and scored so far.
        has_references: whether there are texts to compare with.
    """

    def __init__(self, data: str | None, overrides: Sequence[str], options: ScoringOptions) -> None:
        """Read the references. Raises MmxError if there is nothing to score with."""
        options.check(overrides, data is not None)
        self.succeeded = True
        self.has_references = data is not None
        self._reported: set[str] = set()
        self._options = options
        self._references = self._read_references(data, overrides)

    def join(self, path: str) -> JoinedPredictions:
        """Read the predictions of a file and join them to the references. Problems are printed on stderr."""
        from mmx.evaluation.predictions import read_predictions

        predictions = read_predictions(Path(path))
        joined = self._references.join(predictions)
        for problem in joined.problems:
            self.report(problem)
        if joined.num_by_name:
            count = f"{joined.num_by_name:,} of {len(predictions):,} predictions"
            message = f"{path}: {count} were joined by the names of their files, because their paths are other ones."
            print(one_line(message), file=sys.stderr)
        return joined

    def statistics(self, texts: Sequence[ScoredText]) -> list[MetricStatistics]:
        """Return all metrics of texts."""
        from mmx.evaluation.scores import score_texts

        options = self._options
        metrics = score_texts(texts, options.metrics) if self.has_references else []
        if options.clip is not None:
            metrics += self._clip_statistics(texts, options.clip)
        if options.objects is not None:
            metrics += self._chair_statistics(texts, options.objects)
        return metrics

    def _chair_statistics(self, texts: Sequence[ScoredText], objects: Path) -> list[MetricStatistics]:
        from mmx.evaluation.chair import chair, read_instances, read_objects

        words = read_objects(objects)
        path = self._options.instances
        result = chair(texts, words, None if path is None else read_instances(path, words))
        for problem in result.problems:
            self.report(problem)
        return result.metrics

    def _clip_statistics(self, texts: Sequence[ScoredText], clip: str) -> list[MetricStatistics]:
        from mmx.evaluation.clip_score import clip_score
        from mmx.hub.clip import load_clip

        model = load_clip(clip, self._options.device)
        with progress_bar(len(texts), self._options.quiet) as bar:
            result = clip_score(texts, model, self._options.batch_size, bar.update)
        for problem in result.problems:
            self.report(problem)
        return result.metrics

    def _read_references(self, data: str | None, overrides: Sequence[str]) -> References | CaptionedImages:
        from mmx.config.loader import override_config
        from mmx.config.schema import DataConfig
        from mmx.data.formats import read_examples
        from mmx.evaluation.joining import CaptionedImages, References

        if data is None:
            return CaptionedImages()
        config = override_config(DataConfig(path=data), list(overrides))
        return References(data, read_examples(config, on_skipped=self.report))

    def report(self, problem: str) -> None:
        """Print a problem once: `mmx compare` may meet that of an image twice."""
        if problem not in self._reported:
            print(one_line(problem), file=sys.stderr)
        self._reported.add(problem)
        self.succeeded = False


def parse_metrics(text: str | None) -> list[str]:
    """Parse --metrics; [] for all. Raises MmxError for an empty name."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if not all(names):
        message = f"--metrics was given {text!r}; expected names with commas between them, such as CIDEr,BLEU-4."
        raise MmxError(message, code="option.metrics", given=text)
    return names


def finite(value: float) -> float | None:
    """Return a number for JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def _document(scores: Sequence[Score], joined: JoinedPredictions, resamples: int, seed: int) -> dict[str, object]:
    metrics = {}
    for score in scores:
        metrics[score.name] = {"value": finite(score.value), "low": finite(score.low), "high": finite(score.high)}
    return {"metrics": metrics, **count_texts(joined), "resamples": resamples, "seed": seed}


def count_texts(joined: JoinedPredictions) -> dict[str, int]:
    """Return the numbers of texts that were scored, and of those that were not."""
    captions = sum(text.question is None for text in joined.texts)
    return {
        "captions": captions,
        "answers": len(joined.texts) - captions,
        "predictions_not_scored": joined.num_predictions,
        "references_not_scored": joined.num_references,
    }


def _table(scores: Sequence[Score], joined: JoinedPredictions) -> str:
    counts = {name.replace("_", " "): count for name, count in count_texts(joined).items() if count}
    width = max(map(len, [*counts, *(score.name for score in scores)]))
    lines = []
    for score in scores:
        interval = f"  [{score.low:.4f}, {score.high:.4f}]" if math.isfinite(score.low) else ""
        lines.append(f"{score.name:<{width}}  {score.value:.4f}{interval}")
    lines += [f"{name:<{width}}  {count:,}" for name, count in counts.items()]
    return "\n".join(lines)
