"""The command line: parse, one call, print. Heavy imports stand inside the commands, so that help is instant.

Exit codes: 0 all well; 1 some items failed, named one a line on stderr; 2 wrong usage or configuration, one sentence.
"""

from __future__ import annotations

import json
import os
import sys
import traceback as traces
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mmx.errors import ConfigError, MmxError
from mmx.output import deliver, one_line, progress_bar, result_row, table

if TYPE_CHECKING:
    from mmx.pipeline import Pipeline

app = typer.Typer(
    name="mmx",
    help="Caption pictures and ask them questions; train a decoder that looks at anything an encoder can read.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_MODEL_HELP, _BEAMS_HELP = "A checkpoint folder; else the bundled model.", "Beams; else the model's own number."
ModelOption = Annotated[str | None, typer.Option("--model", metavar="FOLDER", help=_MODEL_HELP)]
DeviceOption = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")]
BatchOption = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Pictures handled at a time.")]
BeamsOption = Annotated[int | None, typer.Option("--beams", metavar="N", min=1, help=_BEAMS_HELP)]
TokensOption = Annotated[int | None, typer.Option("--max-tokens", metavar="N", min=1, help="Most tokens of a text.")]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write JSON lines to this file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


@app.callback()
def _common(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """Here for the help; `main` takes the option out wherever it is typed."""


@app.command()
def caption(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO", help="Pictures, or folders to be walked.")],
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    batch_size: BatchOption = 16,
    beams: BeamsOption = None,
    max_tokens: TokensOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what is in each picture: path, tab, caption."""
    paths, refused = _find_pictures(photos)
    pipeline = _load(model, device, source="image")
    said = pipeline.captions(paths, batch_size, num_beams=beams, max_new_tokens=max_tokens)
    rows = (result_row({"image": path}, "caption", text) for path, text in chain(refused, said))
    total = len(refused) + len(paths)
    _leave(deliver(rows, total, out, as_json, quiet, lambda row: f"{row['image']}\t{one_line(row['caption'])}"))


@app.command()
def ask(
    photo: Annotated[Path | None, typer.Argument(metavar="PHOTO", help="The picture.")] = None,
    questions: Annotated[list[str] | None, typer.Argument(metavar="QUESTION", help="What to ask about it.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="JSON lines with image and question, instead.")
    ] = None,
    box: Annotated[
        str | None, typer.Option("--box", metavar="X0,Y0,X1,Y1", help="Look only there; 0..1 from the top left.")
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    batch_size: BatchOption = 16,
    beams: BeamsOption = None,
    max_tokens: TokensOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer questions about a picture, or those of a file.

    Every picture is encoded once for all of its questions; the answers come in the order asked.
    """
    asked, region = _questions(photo, questions or [], data), _parse_box(box)
    pipeline = _load(model, device, source="image")
    changes = {"num_beams": beams, "max_new_tokens": max_tokens}
    found = pipeline.answers([(path, question) for _, path, question in asked], batch_size, region, **changes)
    rows = (
        result_row({"image": name, "question": question}, "answer", said)
        for (name, _, question), said in zip(asked, found, strict=True)
    )
    many = len({name for name, _, _ in asked}) > 1
    _leave(deliver(rows, len(asked), out, as_json, quiet, lambda row: _answer_line(row, len(asked) > 1, many)))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as those in configs/.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, such as training.steps=100.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in `out` stopped.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Train a model from a YAML file.

    On several GPUs: accelerate launch -m mmx train CONFIG [KEY=VALUE...]
    """
    from mmx.config import Config
    from mmx.settings import read_settings

    settings = read_settings(config, Config, changes or [])
    from mmx.training.loop import train as run  # only now: a mistake in the file is told before torch is imported

    best = run(settings, resume=resume, quiet=quiet)
    if os.environ.get("RANK", "0") == "0":
        print(best)


@app.command("eval")
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
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a model on data.

    BLEU, ROUGE-L and CIDEr of captions, exact match and VQA accuracy of answers.
    """
    from mmx.config import DataConfig
    from mmx.settings import override_settings

    config = override_settings(DataConfig(path=data), changes or [])
    from mmx.data.formats import read_examples
    from mmx.evaluation import evaluate

    examples = read_examples(config)
    out.mkdir(parents=True, exist_ok=True)  # before the work, for it may be refused
    pipeline = _load(model, device)
    options = pipeline.options({"num_beams": beams, "max_new_tokens": max_tokens})
    with progress_bar(len(examples), quiet) as bar:
        report = evaluate(pipeline, examples, options, batch_size, progress=bar.update)
    for sentence in report.bad:
        print(one_line(sentence), file=sys.stderr)
    report.save(out)
    print(json.dumps(report.metrics) if as_json else table(report.metrics))
    _leave(not report.bad)


@app.command()
def encoders(as_json: JsonOption = False) -> None:
    """List the encoders installed, and what is broken and why."""
    from mmx.encoders.registry import describe

    for found in describe():
        entry = found.entry
        if as_json:
            facts: dict[str, Any] = {**asdict(entry), "modality": found.modality, "options": found.options}
            facts["problem"] = found.problem
            print(json.dumps(facts, default=str))
            continue
        state = found.problem or ", ".join(f"{key}={value}" for key, value in (found.options or {}).items())
        kind = "BROKEN" if found.problem else found.modality
        print(f"{entry.name}\t{kind}\t{entry.package} {entry.version}\t{entry.address}\n    {state}")


@app.command()
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


@app.command()
def bench(
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Counted runs of each.")] = 9,
    as_json: JsonOption = False,
) -> None:
    """Measure what questions and captions cost here.

    Medians, ranges and ratios of alternating runs in one process.
    """
    pipeline = _load(model, device, "image")
    from mmx.bench import run

    for figure in run(pipeline, repeats):
        line = f"{figure.name:<36} {figure.median:9.2f} {figure.unit} ({figure.low:.2f} to {figure.high:.2f})"
        print(json.dumps(asdict(figure)) if as_json else line)


# ---- pieces ----------------------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Run the command line and leave with its exit code; every error made on purpose is one sentence on stderr."""
    typed = [text for text in sys.argv[1:] if text != "--traceback"]
    _make_calm()
    try:
        code = app(typed or ["--help"], prog_name="mmx", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        if len(typed) < len(sys.argv[1:]):
            traces.print_exc()
        print(f"mmx: {sentence}", file=sys.stderr)
        _give_up_stdout()
        code = 2
    sys.exit(code)


def _make_calm() -> None:
    """What libraries warn of is for programmers (who have python -W); what cannot be printed is printed escaped."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _sentence(error: Exception) -> str | None:
    """What a person is told about an error; None for one that nobody foresaw. Only configurations take more lines."""
    if isinstance(error, MmxError):
        return str(error) if isinstance(error, ConfigError) else one_line(str(error))
    if hasattr(error, "format_message"):  # wrong usage; the home of its class moves from one typer to the next
        context = getattr(error, "ctx", None)
        asked = context.command_path if context else "mmx"
        return f"{one_line(error.format_message()).rstrip('.')} (see {asked} --help)"
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{one_line(name + error.strerror)}; check the path, its permissions and the room on the disk."
    return None


def _give_up_stdout() -> None:
    """Where the rest cannot be written, on a full disk for one, Python shall not try again and complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(all_well: bool) -> None:
    if not all_well:
        raise typer.Exit(1)


def _load(model: str | None, device: str, source: str | None = None) -> Pipeline:
    """The model on its device; one without the source that the command is about is refused."""
    import torch

    from mmx.pipeline import load

    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise MmxError(f"device {device!r} is not available here; try --device cpu.") from error
    pipeline = load(None if model == "bundled" else model, device)
    if source:
        pipeline.model.encoder(source)
    return pipeline


def _find_pictures(photos: Sequence[Path]) -> tuple[list[str], list[tuple[str, MmxError]]]:
    """The pictures among files and folders; and the folders that give none, each with the reason."""
    from mmx.images import find_images

    kept, refused = [], []
    for photo in photos:
        try:
            if find_images([photo]):
                kept.append(photo)
            else:
                refused.append(
                    (str(photo), MmxError(f"{str(photo)!r}: no pictures are in this folder; check the path."))
                )
        except MmxError as error:
            refused.append((str(photo), error))
    if not kept:
        raise refused[0][1]
    return [str(path) for path in find_images(kept)], refused  # together, for a picture found twice counts once


def _questions(photo: Path | None, questions: Sequence[str], data: Path | None) -> list[tuple[str, str, str]]:
    """What is asked: (picture as written, its path, question)."""
    if (data is None) == (photo is None):
        raise MmxError('ask needs a picture and a question, or --data FILE; type: mmx ask photo.jpg "what is this?"')
    if data is not None:
        return _read_questions(data)
    if not questions:
        raise MmxError(f'ask was given {photo} and no question; type: mmx ask {photo} "what is this?"')
    return [(str(photo), str(photo), question) for question in questions]


def _read_questions(path: Path) -> list[tuple[str, str, str]]:
    from mmx.data.formats import read_lines

    rows = []
    for number, line in read_lines(path):
        for field in ("image", "question"):
            if not isinstance(line.get(field), str):
                raise MmxError(f'{path}:{number} has no {field!r}; expected {{"image": "a.jpg", "question": "…"}}.')
        rows.append((line["image"], str(path.parent / line["image"]), line["question"]))
    if not rows:
        raise MmxError(f'{path} holds no questions; expected lines such as {{"image": "a.jpg", "question": "…"}}.')
    return rows


def _parse_box(text: str | None) -> tuple[float, float, float, float] | None:
    if text is None:
        return None
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError as error:
        raise MmxError(f"--box was given {text!r}; expected four numbers in 0..1, such as 0.1,0.2,0.5,0.6.") from error
    return x0, y0, x1, y1


def _answer_line(row: dict[str, Any], several: bool, many: bool) -> str:
    parts = [row["image"]] * many + [row["question"]] * several + [one_line(row["answer"])]
    return "\t".join(parts)
