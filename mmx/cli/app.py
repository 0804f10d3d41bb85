"""The application: its commands, and how errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
import traceback as tracebacks
import warnings
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

from mmx import __version__
from mmx.cli import demo, encoders, hub, look, scenes, study
from mmx.cli.ask import ask
from mmx.cli.bench import bench
from mmx.cli.caption import caption
from mmx.cli.compare import compare
from mmx.cli.evaluate import evaluate_model
from mmx.cli.score import score
from mmx.cli.train import train
from mmx.errors import ConfigError, InputError, MmxError, one_line

app = typer.Typer(
    name="mmx",
    help="Caption images and ask questions about them; train a decoder over any encoder.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"mmx {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Document the options of all commands. `main` handles --traceback, which may be typed anywhere."""


app.command("caption")(caption)
app.command("ask")(ask)
app.command("look")(look.look)
app.command("demo")(demo.demo)
app.command("import")(hub.import_model)
app.command("push")(hub.push)
app.command("train")(train)
app.command("eval")(evaluate_model)
app.command("score")(score)
app.command("compare")(compare)
app.command("new-encoder")(encoders.new_encoder)
app.command("scenes")(scenes.scenes)
app.command("bench")(bench)
app.command("study")(study.study)
app.add_typer(encoders.app, name="encoders")


def main() -> NoReturn:
    """Run the command line and exit with its code. Expected errors are one sentence on stderr."""
    words = [word for word in sys.argv[1:] if word != "--traceback"]
    with_traceback = len(words) < len(sys.argv[1:])
    _configure_output()
    sys.path.append(os.getcwd())  # at the end: an encoder address may name a file here, which must not hide a library
    try:
        code = app(words or ["--help"], prog_name="mmx", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        message = _error_message(error)
        if message is None:
            raise
        if with_traceback:
            tracebacks.print_exc()
        print(f"mmx: {message}", file=sys.stderr)
        _discard_stdout()
        code = 1 if isinstance(error, InputError) else 2
    sys.exit(code)


def _configure_output() -> None:
    """Hide warnings of libraries (python -W shows them); escape characters that stdout cannot encode."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _error_message(error: Exception) -> str | None:
    """Return the message of an expected error, None for an unexpected one. Only ConfigError may have several lines."""
    if isinstance(error, MmxError):
        return str(error) if isinstance(error, ConfigError) else one_line(str(error))
    if hasattr(error, "format_message"):  # wrong usage; the module of its class differs between versions of typer
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "mmx"
        return f"{one_line(error.format_message()).rstrip('.')} (see {command} --help)"
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{one_line(name + error.strerror)}; check the path, its permissions and the free space on the disk."
    return None


def _discard_stdout() -> None:
    """Prevent Python from writing the rest of stdout again at exit, and failing again, for example on a full disk."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
