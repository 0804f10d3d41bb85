"""How results leave the command line: lines on stdout, or a file that appears once it is whole; errors on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mmx.errors import MmxError


class Row(NamedTuple):
    """A result: what a person calls the input, and the facts of its JSON line."""

    name: str
    facts: dict[str, Any]


def result_row(facts: dict[str, Any], name: str, kind: str, said: Any) -> Row:
    """What was asked about the input of that name, and the text with its score, or the error."""
    if isinstance(said, MmxError):
        return Row(name, {**facts, "error": one_line(str(said))})
    return Row(name, {**facts, kind: said.text, "score": round(said.score, 4)})


def deliver(
    rows: Iterable[Row],
    total: int,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    line: Callable[[Row], str],
) -> bool:
    """Print each row, or write all to a file that appears once it is whole.

    Errors go to stderr, each picture's once, however many questions it was asked. Returns whether all went well.
    """
    told: set[str] = set()
    with progress_bar(total, quiet or (out is None and sys.stdout.isatty())) as bar, _open_out(out) as file:
        for row in rows:
            bar.update()
            failed = "error" in row.facts
            if failed and row.name not in told:
                told.add(row.name)
                bar.write(row.facts["error"], file=sys.stderr)
            if out is not None or as_json:
                print(json.dumps(row.facts, ensure_ascii=False), file=file, flush=out is None)
            elif not failed:
                print(line(row), file=file, flush=True)
    return not told


def write_json(out: Path, facts: Any) -> None:
    """One JSON object to the file of --out."""
    with _open_out(out) as file:
        print(json.dumps(facts, ensure_ascii=False, indent=2), file=file)


@contextmanager
def _open_out(out: Path | None) -> Iterator[TextIO]:
    """stdout, or the file of --out."""
    if out is None:
        yield sys.stdout
        return
    try:
        with _replacing(out) as file:
            yield file
    except OSError as error:
        raise MmxError(f"{out} cannot be written: {error.strerror or error}; choose another --out.") from error


@contextmanager
def _replacing(out: Path) -> Iterator[TextIO]:
    """A temporary file beside `out` that takes its place at the end; nothing half-written is left behind."""
    if out.exists() and not out.is_file():  # a device or a pipe cannot be replaced, only written to
        with out.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        return
    place = out.resolve()  # through a link: what it points at is replaced, not the link
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        os.replace(temporary, place)
    finally:
        with suppress(OSError):
            temporary.unlink()


def progress_bar(total: int, quiet: bool) -> Any:
    """A progress bar on stderr, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit="", disable=quiet or not sys.stderr.isatty())


def one_line(text: str) -> str:
    """Without line ends, and without anything else that would move the cursor of a terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text.strip())


def table(metrics: dict[str, float]) -> str:
    """Names and values below each other; what was counted is whole, what was measured has four decimals."""
    """Names and values below each other; what was counted is whole, what was measured has four decimals."""
    width = max(map(len, metrics))
    return "\n".join(_table_line(name, value, width) for name, value in metrics.items())


def _table_line(name: str, value: float, width: int) -> str:
    return f"{name:<{width}}  {value:,d}" if isinstance(value, int) else f"{name:<{width}}  {value:.4f}"
