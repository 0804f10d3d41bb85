"""How results leave the command line: lines on stdout, a file that grows by them or appears whole; errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TextIO

from mmx.errors import MmxError
from mmx.io.atomic import atomic_text_writer
from mmx.io.results_file import ResultsFile, SeenIds, number_of, open_results_file, row_line


class Row(NamedTuple):
    """A result: what a person calls the input, and the facts of its JSON line."""

    name: str
    fields: dict[str, Any]


def result_row(facts: dict[str, Any], name: str, kind: str, said: Any) -> Row:
    """What was asked about the input of that name, and the text with its score, or the error. A score that is no finite
    number, which JSON has not, is null."""
    if isinstance(said, MmxError):
        return Row(name, {**facts, "error": one_line(str(said))})
    return Row(name, {**facts, kind: said.text, "score": round(said.score, 4) if isfinite(said.score) else None})


@contextmanager
def open_results(
    out: Path | None,
    made: Mapping[str, Any],
    sources: Collection[str],
    overwrite: bool = False,
    retry_errors: bool = False,
) -> Iterator[ResultsFile | None]:
    """The file of --out, to be gone on with (see `mmx.io.results_file`); None for stdout."""
    if out is None:
        if overwrite or retry_errors:
            flag = "--overwrite" if overwrite else "--retry-errors"
            raise MmxError(f"{flag} was given and no file; type {flag} --out FILE.")
        yield None
        return
    with _told_of(out), open_results_file(out, made, sources, overwrite, retry_errors) as journal:
        if journal.errors:
            rows = f"{journal.errors:,} rows are errors" if journal.errors > 1 else "one row is an error"
            print(f"{out}: {rows} of an earlier run; --retry-errors tries again.", file=sys.stderr)
        yield journal


def write_rows(
    rows: Iterable[Row], bar: Any, journal: ResultsFile | None, as_json: bool, line: Callable[[Row], str]
) -> bool:
    """Print each row, or append it to a file.

    Errors go to stderr, each of a picture once, however many questions it was asked. Returns whether all went well, now
    and in the runs that the file is of.
    """
    told = SeenIds()
    well = journal is None or not journal.errors
    for row in rows:
        bar.update()
        failed = "error" in row.fields
        if failed and (number := number_of(f"{row.name}\0{row.fields['error']}")) not in told:
            told.add(number)
            bar.write(row.fields["error"], file=sys.stderr)
        well = well and not failed
        if journal is not None:
            journal.write(row.fields)
        elif as_json:
            print(row_line(row.fields), end="", flush=True)
        elif not failed:
            print(line(row), flush=True)
    return well


def write_json(out: Path, facts: Any) -> None:
    """One JSON object to the file of --out."""
    with _open_out(out) as file:
        print(json.dumps(facts, ensure_ascii=False, indent=2), file=file)


@contextmanager
def _open_out(out: Path) -> Iterator[TextIO]:
    """The file of --out, which appears once it is whole."""
    with _told_of(out), atomic_text_writer(out) as file:
        yield file


@contextmanager
def _told_of(out: Path) -> Iterator[None]:
    """What the system says against writing, in a sentence."""
    try:
        yield
    except BrokenPipeError:  # whoever reads has seen enough, as with stdout
        raise
    except OSError as error:
        raise MmxError(f"{out} cannot be written: {error.strerror or error}; choose another --out.") from error


def progress_bar(total: int | None, quiet: bool) -> Any:
    """A progress bar on stderr, where that is a terminal: how many, how many a second, and the time left."""
    from tqdm import tqdm

    return tqdm(total=total, unit="", smoothing=0, disable=quiet or not sys.stderr.isatty())


def count_for(bar: Any, count: Callable[[], int | None]) -> None:
    """Tell a bar how many there are in all, once that is counted; nobody waits for it."""

    def work() -> None:
        with suppress(OSError, MmxError):  # whoever reads them in earnest will tell
            bar.total = count()

    if not bar.disable:
        Thread(target=work, daemon=True).start()


def skip_one(bar: Any) -> None:
    """One more that an earlier run has done: it counts, but not for how many are done a second."""
    if not bar.disable:
        bar.initial += 1
        bar.update()


def one_line(text: str) -> str:
    """Without line ends, and without anything else that would move the cursor of a terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text.strip())


def column(text: str) -> str:
    """A name or a question as a part of a line: without tabs and whatever else `one_line` takes out, but with the bytes
    of file names that are no text, which stdout writes escaped."""
    return "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else " " if c.isspace() else "?" for c in text)


def table(metrics: dict[str, float]) -> str:
    """Names and values below each other; what was counted is whole, what was measured has four decimals."""
    width = max(map(len, metrics))
    return "\n".join(_table_line(name, value, width) for name, value in metrics.items())


def _table_line(name: str, value: float, width: int) -> str:
    return f"{name:<{width}}  {value:,d}" if isinstance(value, int) else f"{name:<{width}}  {value:.4f}"
