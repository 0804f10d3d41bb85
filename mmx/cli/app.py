"""The application: which commands there are, and how each error leaves the house."""

from __future__ import annotations

import os
import sys
import traceback as traces
import warnings
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

from mmx.cli import demo, encoders, hub, look, measure, speak, study
from mmx.errors import ConfigError, MmxError
from mmx.io.console import one_line

app = typer.Typer(
    name="mmx",
    help="Caption pictures and ask them questions; train a decoder that looks at anything an encoder can read.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _common(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """Here for the help; `main` takes the option out wherever it is typed."""


app.command("caption")(speak.caption)
app.command("ask")(speak.ask)
app.command("look")(look.look)
app.command("demo")(demo.demo)
app.command("import")(hub.import_)
app.command("train")(measure.train)
app.command("eval")(measure.evaluate_)
app.command("new-encoder")(encoders.new_encoder)
app.command("scenes")(measure.scenes)
app.command("bench")(measure.bench)
app.command("study")(study.study)
app.add_typer(encoders.app, name="encoders")


def main() -> NoReturn:
    """Run the command line and leave with its exit code; every error made on purpose is one sentence on stderr."""
    typed = [text for text in sys.argv[1:] if text != "--traceback"]
    _make_calm()
    sys.path.append(os.getcwd())  # at the end: an address may lead to a file here, but no file here hides a library
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
