"""The command `mmx eval`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmx.cli.options import (
    BatchSizeOption,
    DeviceOption,
    JsonOption,
    MaxNewTokensOption,
    NumBeamsOption,
    QuietOption,
    exit_with_status,
    load_pipeline,
)
from mmx.errors import MmxError, one_line
from mmx.io.console import format_metrics, progress_bar, write_json

if TYPE_CHECKING:
    from mmx.config.schema import DataConfig
    from mmx.data.examples import Example

MAPS_FILE = "maps.json"

_OUT_DIR_HELP = "Write metrics.json and predictions.jsonl (or maps.json) here. Default: nothing is written."
_NOVELTY_HELP = "Count captions that are not in this data, such as split=train."
_INFORMATION_HELP = "Bits per word with and without image and question. Needs more passes."
_MAPS_HELP = "For scenes: measure how well the maps of words point at what they are about."


def evaluate_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a public name, or `bundled`.")],
    data: Annotated[str, typer.Option("--data", metavar="PATH", help="A data file or folder, or `scenes`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of the data, such as split=val.")
    ] = None,
    device: DeviceOption = "cpu",
    batch_size: BatchSizeOption = 32,
    num_beams: NumBeamsOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    out_dir: Annotated[str | None, typer.Option("--out-dir", metavar="FOLDER", help=_OUT_DIR_HELP)] = None,
    information: Annotated[bool, typer.Option("--information", help=_INFORMATION_HELP)] = False,
    novelty_against: Annotated[
        list[str] | None, typer.Option("--novelty-against", metavar="KEY=VALUE", help=_NOVELTY_HELP)
    ] = None,
    maps: Annotated[bool, typer.Option("--maps", help=_MAPS_HELP)] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Evaluate a model on data.

    Captions: BLEU, ROUGE-L and CIDEr. Answers: exact match and VQA accuracy, with
    the exact match of a baseline that gives each question its most frequent answer.

    --information: how many bits per word the image and the question save, also
    with the image of another example and with a blank one.

    --novelty-against split=train: how many captions are not in that split; of
    another file: --novelty-against path=FILE.

    --maps, for scenes, whose boxes are known: the pointing game and the deletion
    test for each kind of map. The best layer and heads are chosen on the scenes
    of the next seed.

    --out-dir: the files that are written are named on stderr. Files of an earlier
    evaluation in the same folder are replaced.
    """
    from mmx.config.loader import override_config
    from mmx.config.schema import DataConfig

    out = parse_out_dir(out_dir)
    config = override_config(DataConfig(path=data), overrides or [])
    if maps:
        given = {
            "--novelty-against": bool(novelty_against),
            "--information": information,
            "--num-beams": num_beams is not None,
            "--max-new-tokens": max_new_tokens is not None,
        }
        for option, is_given in given.items():
            if is_given:
                raise _unused_option(option, "--maps generates no text")
        _evaluate_maps(model, config, device, out, as_json)
        return
    from mmx.data.formats import read_examples
    from mmx.evaluation.evaluate import EvaluationOptions, evaluate
    from mmx.evaluation.report import METRICS_FILE, PREDICTIONS_FILE

    pipeline = load_pipeline(model, device)
    unused: list[str] = []
    examples = read_examples(config, sources=pipeline.model.encoders, on_skipped=unused.append)
    if novelty_against and not _has_captions(config, examples):
        raise _unused_option("--novelty-against", f"{data} has questions only, and nothing is captioned")
    training_captions = _read_captions(config, novelty_against, unused) if novelty_against else frozenset()
    for message in dict.fromkeys(unused):
        print(one_line(message), file=sys.stderr)
    _create(out)  # before the evaluation, because it may fail
    options = EvaluationOptions(
        generation=pipeline.generation_config({"num_beams": num_beams, "max_new_tokens": max_new_tokens}),
        batch_size=batch_size,
        information=information,
        training_captions=training_captions,
    )
    with progress_bar(len(examples), quiet) as bar:
        report = evaluate(pipeline, examples, options, progress=bar.update)
    for message in report.skipped:
        print(one_line(message), file=sys.stderr)
    if report.cut:
        print(one_line(report.cut_sentence()), file=sys.stderr)
    if out is not None:
        report.save(out)
        print_written(out / METRICS_FILE, out / PREDICTIONS_FILE)
    print(json.dumps(report.metrics) if as_json else format_metrics(report.metrics))
    exit_with_status(not report.skipped and not unused)


def parse_out_dir(text: str | None) -> Path | None:
    """Check --out-dir. Raises MmxError for an empty one: an unset shell variable must not stand for this folder."""
    if text == "":
        message = "--out-dir was given as '', which is not a folder; type . for the current folder."
        raise MmxError(message, code="option.out_dir")
    return None if text is None else Path(text)


def _create(folder: Path | None) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)


def print_written(*paths: Path) -> None:
    """Name the files on stderr, because stdout has the metrics."""
    for path in paths:
        print(f"{path} was written.", file=sys.stderr)


def _has_captions(config: DataConfig, examples: Sequence[Example]) -> bool:
    """Return whether the model captions any of the examples."""
    if "caption" not in config.tasks:
        return False
    return any(task.question is None for example in examples for task in example.tasks)


def _unused_option(option: str, reason: str) -> MmxError:
    return MmxError(f"{option} was given, but {reason}; leave it out.", code="option.unused", option=option)


def _read_captions(config: DataConfig, overrides: list[str], unused: list[str]) -> frozenset[str]:
    """Return all reference captions of the data with these overrides, without the limit on examples.

    unused: messages about records that are not used are appended to it.
    """
    from mmx.config.loader import override_config
    from mmx.data.examples import captions_of
    from mmx.data.formats import read_examples

    unlimited = ["max_examples=null", "derive_questions=false", "tasks=[caption]"]
    examples = read_examples(override_config(config, unlimited + overrides), on_skipped=unused.append)
    return frozenset(caption for captions in captions_of(examples) for caption in captions)


def _evaluate_maps(model: str, config: DataConfig, device: str, out: Path | None, as_json: bool) -> None:
    from mmx.data.scenes import generate_scene
    from mmx.evaluation.deletion import deletion_test
    from mmx.evaluation.pointing_game import pointing_game

    if config.path != "scenes":
        message = f"--maps was given with --data {config.path}; only scenes have known boxes, type --data scenes."
        raise MmxError(message, code="eval.maps_data", path=config.path)
    _create(out)
    pipeline = load_pipeline(model, device)
    scenes = [generate_scene(config.seed, index) for index in range(config.num_examples)]
    selection = [generate_scene(config.seed + 1, index) for index in range(config.num_examples)]
    pointing = pointing_game(pipeline, scenes, selection)
    deletion = deletion_test(pipeline, scenes, pointing.selected)
    report = {"pointing": asdict(pointing), "deletion": asdict(deletion)}
    if out is not None:
        write_json(out / MAPS_FILE, report)
        print_written(out / MAPS_FILE)
    print(json.dumps(report) if as_json else f"{pointing.table(pointing.main_methods)}\n\n{deletion.table()}")
