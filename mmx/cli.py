"""The command line: parse, one call, print. Heavy imports stand inside the commands, so that help is instant.

Exit codes: 0 all well; 1 some items failed, named one a line on stderr; 2 wrong usage or configuration, one sentence.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmx.errors import MmxError

if TYPE_CHECKING:
    from mmx.pipeline import Pipeline

app = typer.Typer(
    name="mmx",
    help="Caption pictures and ask them questions; train a decoder that looks at anything an encoder can read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelOption = Annotated[str | None, typer.Option("--model", help="A checkpoint folder; the bundled model if left out.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps, ...")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Pictures encoded and decoded at a time.")]
BeamsOption = Annotated[int | None, typer.Option("--beams", min=1, help="Beams; the model's own number if left out.")]
TokensOption = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Most tokens of a text.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write JSON lines to this file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


@app.callback()
def _common(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    if traceback:
        os.environ["MMX_TRACEBACK"] = "1"


@app.command()
def caption(
    photos: Annotated[list[Path], typer.Argument(help="Pictures, or folders to be walked.")],
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
    from mmx.images import find_images

    paths = [str(path) for path in find_images(photos)]
    if not paths:
        raise MmxError(f"no pictures were found in {', '.join(map(str, photos))}; give picture files or their folder.")
    pipeline = _load(model, device)
    results = pipeline.captions(paths, batch_size, num_beams=beams, max_new_tokens=max_tokens)
    rows = (_row({"image": path}, "caption", said) for path, said in results)
    _deliver(rows, len(paths), out, as_json, quiet, lambda row: f"{row['image']}\t{row['caption']}")


@app.command()
def ask(
    photo: Annotated[Path | None, typer.Argument(help="The picture.")] = None,
    questions: Annotated[list[str] | None, typer.Argument(help="One or more questions about it.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="JSON lines with image and question.")] = None,
    box: Annotated[str | None, typer.Option("--box", help="x0,y0,x1,y1 in 0..1: look only there.")] = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    batch_size: BatchOption = 16,
    beams: BeamsOption = None,
    max_tokens: TokensOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer questions about a picture, or all of a file; every picture is encoded once for all of its questions."""
    if (data is None) == (photo is None):
        raise MmxError('ask needs a picture and a question, or --data FILE; type: mmx ask photo.jpg "what is this?"')
    if photo is not None and not questions:
        raise MmxError(f'ask was given {photo} and no question; type: mmx ask {photo} "what is this?"')
    pipeline = _load(model, device)
    asked = _read_questions(data) if data else [(str(photo), str(photo), question) for question in questions or []]
    region = _parse_box(box)
    changes = {"num_beams": beams, "max_new_tokens": max_tokens}
    found = pipeline.answers([(path, question) for _, path, question in asked], batch_size, region, **changes)
    rows = (
        _row({"image": name, "question": question}, "answer", said)
        for (name, _, question), said in zip(asked, found, strict=True)
    )
    many = len({name for name, _, _ in asked}) > 1
    _deliver(rows, len(asked), out, as_json, quiet, lambda row: _answer_line(row, len(asked) > 1, many))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as those in configs/.")],
    changes: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. training.steps=100.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in `out` stopped.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Train a model from a YAML file. Several GPUs: accelerate launch -m mmx train CONFIG [key=value ...]."""
    from mmx.config import Config
    from mmx.settings import read_settings

    settings = read_settings(config, Config, changes or [])
    from mmx.training.loop import train as run

    best = run(settings, resume=resume, quiet=quiet)
    if os.environ.get("RANK", "0") == "0":
        print(best)


@app.command("eval")
def evaluate_(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, or `bundled`.")],
    data: Annotated[str, typer.Option("--data", help="A data file or folder, or `scenes`.")],
    changes: Annotated[list[str] | None, typer.Argument(help="key=value of the data, e.g. split=val.")] = None,
    device: DeviceOption = "cpu",
    batch_size: BatchOption = 32,
    beams: BeamsOption = None,
    max_tokens: TokensOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for metrics.json and texts.jsonl.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a model on data: BLEU, ROUGE-L and CIDEr of captions, exact match and VQA accuracy of answers."""
    from mmx.config import DataConfig
    from mmx.settings import override_settings

    config = override_settings(DataConfig(path=data), changes or [])
    from mmx.data.formats import read_examples
    from mmx.evaluation import evaluate

    examples = read_examples(config)
    pipeline = _load(None if model == "bundled" else model, device)
    options = pipeline.options({"num_beams": beams, "max_new_tokens": max_tokens})
    with _bar(len(examples), quiet) as bar:
        report = evaluate(pipeline, examples, options, batch_size, progress=bar.update)
    for sentence in report.bad:
        print(sentence, file=sys.stderr)
    report.save(out or Path("."))
    print(json.dumps(report.metrics) if as_json else _table(report.metrics))
    if report.bad:
        raise typer.Exit(1)


@app.command()
def encoders(as_json: JsonOption = False) -> None:
    """List the encoders installed, where they come from, and what is broken and why."""
    from mmx.encoders.registry import describe

    for found in describe():
        entry = found.entry
        if as_json:
            facts = {"name": entry.name, "address": entry.address, "package": entry.package, "version": entry.version}
            facts |= {"modality": found.modality, "options": found.options, "problem": found.problem}
            print(json.dumps(facts, default=str))
            continue
        state = found.problem or ", ".join(f"{key}={value}" for key, value in (found.options or {}).items())
        kind = "BROKEN" if found.problem else found.modality
        print(f"{entry.name}\t{kind}\t{entry.package} {entry.version}\t{entry.address}\n    {state}")


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="The folder to be written.")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many scenes.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Which scenes.")] = 0,
    size: Annotated[int, typer.Option("--size", min=32, max=2048, help="Side of the pictures in pixels.")] = 128,
) -> None:
    """Write synthetic pictures with captions, questions and the boxes of everything in them."""
    from mmx.data.scene_texts import write_scenes

    print(write_scenes(out, count, seed, size))


# ---- pieces ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line. A MmxError becomes one sentence on stderr and exit code 2."""
    try:
        app()
    except MmxError as error:
        if os.environ.get("MMX_TRACEBACK"):
            raise
        print(f"mmx: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _load(model: str | None, device: str) -> Pipeline:
    import torch

    from mmx.pipeline import load

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MmxError(f"device {device!r} is not available here; try --device cpu.") from error
    return load(model, device)


def _row(facts: dict[str, Any], kind: str, said: Any) -> dict[str, Any]:
    """A result line: what was asked, and the text with its score, or the error."""
    if isinstance(said, MmxError):
        return {**facts, "error": str(said)}
    return {**facts, kind: said.text, "score": round(said.score, 4)}


def _deliver(
    rows: Iterable[dict[str, Any]],
    total: int,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    line: Callable[[dict[str, Any]], str],
) -> None:
    """Print each row, or write all to a file that appears once it is whole; errors go to stderr; exit 1 if any."""
    failed = 0
    with _bar(total, quiet or out is None) as bar, _writer(out) as write:
        for row in rows:
            bar.update()
            if "error" in row:
                failed += 1
                print(row["error"], file=sys.stderr)
            if out is not None:
                write(json.dumps(row, ensure_ascii=False))
            elif as_json:
                print(json.dumps(row, ensure_ascii=False), flush=True)
            elif "error" not in row:
                print(line(row), flush=True)
    if failed:
        raise typer.Exit(1)


class _writer:
    """Lines to a temporary file beside `out`, renamed to it at the end; nothing half-written is left behind."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.temporary = None if out is None else out.with_name(f".{out.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Callable[[str], None]:
        if self.temporary is None:
            return print
        try:
            self.temporary.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.temporary.open("w", encoding="utf-8")
        except OSError as error:
            raise MmxError(f"{self.out} cannot be written: {error.strerror}; choose another --out.") from error
        return lambda line: print(line, file=self.file)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.temporary is None or self.out is None:
            return
        try:
            self.file.close()
            if error is None:
                os.replace(self.temporary, self.out)
        except OSError as problem:
            raise MmxError(f"{self.out} cannot be written: {problem.strerror}; choose another --out.") from problem
        finally:
            self.temporary.unlink(missing_ok=True)


def _bar(total: int, quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="", disable=quiet or not sys.stderr.isatty())


def _read_questions(path: Path) -> list[tuple[str, str, str]]:
    """(image as written, its path, question) of each line."""
    from mmx.data.formats import read_lines

    rows = []
    for number, line in read_lines(path):
        for field in ("image", "question"):
            if not isinstance(line.get(field), str):
                raise MmxError(f'{path}:{number} has no {field!r}; expected {{"image": "a.jpg", "question": "…"}}.')
        rows.append((line["image"], str(path.parent / line["image"]), line["question"]))
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
    parts = [row["image"]] * many + [row["question"]] * several + [row["answer"]]
    return "\t".join(parts)


def _table(metrics: dict[str, float]) -> str:
    width = max(map(len, metrics))
    return "\n".join(_table_line(name, value, width) for name, value in metrics.items())


def _table_line(name: str, value: float, width: int) -> str:
    return f"{name:<{width}}  {value:,d}" if isinstance(value, int) else f"{name:<{width}}  {value:.4f}"

