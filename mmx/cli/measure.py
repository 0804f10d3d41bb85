"""The commands that make models and measure them: train, eval, scenes, bench."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmx.cli.options import (
    BatchOption,
    BeamsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    QuietOption,
    TokensOption,
    check_device,
    exit_with_status,
    load_pipeline,
)
from mmx.errors import MmxError
from mmx.io.console import one_line, progress_bar, table, write_json

if TYPE_CHECKING:
    from mmx.bench import BenchResult
    from mmx.config.schema import DataConfig


WORKLOADS = ("greedy", "beams", "questions", "cache", "looking", "training", "pictures", "start")  # of mmx.bench


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as those in configs/.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, such as training.max_steps=100.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in `out` stopped.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Train a model from a YAML file.

    On several GPUs: accelerate launch -m mmx train CONFIG [KEY=VALUE...]
    """
    from mmx.config.loader import load_config
    from mmx.config.schema import RunConfig

    settings = load_config(config, RunConfig, changes or [])
    from mmx.training.loop import train as run  # only now: a mistake in the file is told before torch is imported

    best = run(settings, resume=resume, quiet=quiet)
    if os.environ.get("RANK", "0") == "0":
        print(best)


def evaluate_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or `bundled`.")],
    data: Annotated[str, typer.Option("--data", metavar="PATH", help="A data file or folder, or `scenes`.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Facts of the data, such as split=val.")
    ] = None,
    device: DeviceOption = "cpu",
    batch_size: BatchOption = 32,
    beams: BeamsOption = None,
    max_tokens: TokensOption = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where to write metrics.json and texts.jsonl.")
    ] = Path(),
    information: Annotated[
        bool, typer.Option("--information", help="Bits a word with and without picture and question; more work.")
    ] = False,
    known: Annotated[
        list[str] | None,
        typer.Option(
            "--known", metavar="KEY=VALUE", help="Count novel captions: none of this split, such as split=train."
        ),
    ] = None,
    maps: Annotated[
        bool, typer.Option("--maps", help="Of scenes: do the words' maps lie on what they speak of?")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a model on data.

    BLEU, ROUGE-L and CIDEr of captions, exact match and VQA accuracy of answers,
    beside the exact match of one who does not look and gives each question its
    most frequent answer; with --information also how many bits a word the
    picture and the question save, beside the picture of another example and a
    blank one. With --known split=train, how many captions are novel, which is no
    caption of that split (of another file: --known path=FILE). With --maps, of
    scenes, whose boxes are known, how well each kind of map points at what a word
    is about, and what it costs to hide that; the best layer and heads are chosen
    on the scenes of the next seed. Written to maps.json.
    """
    from mmx.config.loader import override_config
    from mmx.config.schema import DataConfig

    config = override_config(DataConfig(path=data), changes or [])
    if maps:
        if config.path != "scenes":
            raise MmxError(f"--maps was given with --data {data}; boxes are known of generated scenes: --data scenes.")
        _measure_maps(model, config, device, out, as_json)
        return
    from mmx.data.formats import read_examples
    from mmx.evaluation.evaluate import evaluate

    examples = read_examples(config)
    heard = _heard(config, known) if known else frozenset()
    out.mkdir(parents=True, exist_ok=True)  # before the work, for it may be refused
    pipeline = load_pipeline(model, device)
    options = pipeline.generation_config({"num_beams": beams, "max_new_tokens": max_tokens})
    with progress_bar(len(examples), quiet) as bar:
        report = evaluate(
            pipeline,
            examples,
            options,
            batch_size,
            progress=bar.update,
            information=information,
            training_captions=heard,
        )
    for sentence in report.skipped:
        print(one_line(sentence), file=sys.stderr)
    report.save(out)
    print(json.dumps(report.metrics) if as_json else table(report.metrics))
    exit_with_status(not report.skipped)


def _heard(config: DataConfig, changes: list[str]) -> frozenset[str]:
    """Every caption of the data with these changes, all of it, however little of it is measured."""
    from mmx.config.loader import override_config
    from mmx.data.examples import captions_of
    from mmx.data.formats import read_examples

    whole = ["limit=null", "derive_questions=false", "tasks=[caption]"]
    known = captions_of(read_examples(override_config(config, whole + changes)))
    return frozenset(caption for captions in known for caption in captions)


def _measure_maps(model: str, config: DataConfig, device: str, out: Path, as_json: bool) -> None:
    from mmx.data.scenes import generate_scene
    from mmx.evaluation.deletion import deletion_test
    from mmx.evaluation.pointing_game import pointing_game

    out.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(model, device)
    shown, choosing = ([generate_scene(config.seed + n, i) for i in range(config.num_examples)] for n in (0, 1))
    pointed = pointing_game(pipeline, shown, choosing)
    hidden = deletion_test(pipeline, shown, pointed.chosen)
    facts = {"pointing": asdict(pointed), "hiding": asdict(hidden)}
    write_json(out / "maps.json", facts)
    print(json.dumps(facts) if as_json else f"{pointed.table(pointed.main_methods)}\n\n{hidden.table()}")


def scenes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to be written.")],
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", min=1, help="How many.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Another seed, other scenes.")] = 0,
    size: Annotated[int, typer.Option("--size", metavar="N", min=32, max=2048, help="Pixels a side.")] = 128,
) -> None:
    """Write synthetic pictures with captions and questions.

    Everything in them is known: each object's shape, colour, size and box.
    """
    from mmx.data.scene_texts import write_scenes

    print(write_scenes(out, count, seed, size))


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME", help="greedy, beams, questions, cache, looking, training, pictures, start; else all."
        ),
    ] = None,
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="tiny (about as bundled), or base.")] = "tiny",
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Counted runs of each.")] = 5,
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write one JSON object, notes too.")] = None,
    as_json: JsonOption = False,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Measure speed and memory beside transformers.

    Same machine, same random weights, same inputs, alternating runs in one
    process: medians, ranges, ratios, and whether the tokens are the same.
    """
    check_device(device)
    from mmx.bench import machine, run
    from mmx.bench.table import HEADER, line, notes

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)  # before the work, for it may be refused
    figures: list[BenchResult] = []
    with progress_bar(0, quiet) as bar:
        for figure in run(names or (), size, repeats, dtype, device, bar.set_description):  # type: ignore[arg-type]
            if not as_json and not figures:
                bar.write(HEADER)
            figures.append(figure)
            bar.write(json.dumps(asdict(figure)) if as_json else line(figure))
    if not as_json:
        print(notes(figures))
    if out is not None:
        facts = {"machine": machine(device), "size": size, "repeats": repeats, "dtype": dtype, "device": device}
        write_json(out, {**facts, "figures": [asdict(figure) for figure in figures]})
