"""Rows of results: which inputs are left to process, and where rows and errors are written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from mmx.cli.output_target import OutputTarget
from mmx.errors import MmxError, one_line
from mmx.io.console import progress_bar, set_total_in_background, skip_one, write_errors
from mmx.io.pending_row import PendingRow
from mmx.io.results_file import RESULT_FIELDS, ResultsFile, hash_id, is_stream, open_results_file, row_line
from mmx.io.tables import TABLE_FORMATS, write_table

if TYPE_CHECKING:
    from tqdm import tqdm

    from mmx.inference.outputs import GeneratedText


class Row(NamedTuple):
    """A result: what messages call its input, and the fields of its JSON line."""

    name: str
    fields: dict[str, object]


class _HasFields(Protocol):
    @property
    def fields(self) -> dict[str, object]: ...


Item = TypeVar("Item", bound=_HasFields)


class RowFiles(Protocol):
    """Files that a run writes besides its rows: sidecars of images, or captions in a tar archive."""

    def are_done(self, fields: Mapping[str, object]) -> bool:
        """Return whether nothing has to be written for an item, so that it need not be processed."""
        ...

    def write(self, rows: Iterable[Row], pending: PendingRow | None) -> Iterator[Row]:
        """Yield the same rows, each after its files were written; with an error if they cannot be."""
        ...

    def finish(self, results: Path, export: Path) -> bool:
        """Write the file of --out for which all rows are needed. Returns whether there is no error."""
        ...


@dataclass(frozen=True)
class OutputOptions:
    """Where rows go.

    Attributes:
        path: the results file; None for stdout.
        target: the values of --out and --format.
        as_json: print JSON lines.
        overwrite: start the results file again.
        retry_errors: process the inputs of error rows again.
        quiet: show no progress bar.
        shard: (index, count).
    """

    path: Path | None
    target: OutputTarget
    as_json: bool
    overwrite: bool
    retry_errors: bool
    quiet: bool
    shard: tuple[int, int]

    @classmethod
    def parse(
        cls,
        target: OutputTarget,
        as_json: bool,
        overwrite: bool,
        retry_errors: bool,
        quiet: bool,
        shard: tuple[int, int],
    ) -> OutputOptions:
        """Check the options. `--out -` prints JSON lines. Raises MmxError."""
        out = target.results
        if out == Path("-"):
            out = None
            as_json = True
        if out is None and (overwrite or retry_errors):
            flag = "--overwrite" if overwrite else "--retry-errors"
            message = f"{flag} was given without a file; type {flag} --out FILE."
            raise MmxError(message, code="option.needs_out", option=flag)
        hide_bar = quiet or (out is None and sys.stdout.isatty())  # rows and a bar on one terminal would mix
        return cls(out, target, as_json, overwrite, retry_errors, hide_bar, shard)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that --out and --format stand for."""
        return tuple(path for path in (self.path, self.target.export) if path is not None)


@dataclass(frozen=True)
class BatchRun(Generic[Item]):
    """A command over many items.

    Attributes:
        items: with the fields that their rows start with.
        sources: the names of the model's sources.
        config: what all runs that write the same file have in common.
        shard_key: items with equal keys are in the same shard.
        process: yields the row of each item, in order.
        format_line: a row as a line of text.
        count: how many items there are; None if unknown.
        result_fields: the fields of a row that are results.
        files: what is written besides the rows.
    """

    items: Iterable[Item]
    sources: Collection[str]
    config: Mapping[str, object]
    shard_key: Callable[[Item], str]
    process: Callable[[Iterable[Item]], Iterable[Row]]
    format_line: Callable[[Row], str]
    count: Callable[[], int | None]
    result_fields: Collection[str] = RESULT_FIELDS
    files: RowFiles | None = None

    def write(self, output: OutputOptions) -> bool:
        """Process the items and write their rows. Returns whether there is no error, now or in the file."""
        if not output.overwrite:
            output.target.check_not_replaced()
        with _open_results(output, self) as results, progress_bar(None, output.quiet) as bar:
            set_total_in_background(bar, self.count)
            pending = None
            if results is not None and self.files is not None:
                pending = _complete_pending(results, output)
            items = remaining_items(self.items, output.shard, self.shard_key, results, bar, self.files)
            rows = self.process(items)
            if self.files is not None or output.target.export is not None:
                rows = _storable_rows(rows, self.result_fields)
            if self.files is not None:
                rows = self.files.write(rows, pending)
            succeeded = self._write_rows(rows, results, output, bar)
            if pending is not None:
                pending.discard()
            return self._finish(output) and succeeded

    def _write_rows(
        self, rows: Iterable[Row], results: ResultsFile | None, output: OutputOptions, bar: tqdm[object]
    ) -> bool:
        if results is not None:
            return _write_rows(rows, bar, lambda row: results.write(row.fields)) and not results.num_errors
        if output.as_json:
            return _write_rows(rows, bar, lambda row: print(row_line(row.fields), end="", flush=True))
        return _write_rows(rows, bar, lambda row: _print_text(row, self.format_line))

    def _finish(self, output: OutputOptions) -> bool:
        """Make the file of another format from the results file. Returns whether there is no error."""
        target = output.target
        if target.export is None or output.path is None:
            return True
        with write_errors(target.export):
            if target.format in TABLE_FORMATS:
                write_table(target.export, target.format, output.path, self.sources)
                return True
            return self.files is None or self.files.finish(output.path, target.export)


def result_row(fields: Mapping[str, object], name: str, key: str, result: GeneratedText | MmxError) -> Row:
    """Return the row of an item: its fields, then the text under `key` with its score and language, or the error.

    An answer also has its probability. If there are several texts, all are under the plural of `key`, with `scores`. A
    number that is not finite is null, because JSON has no such number.
    """
    if isinstance(result, MmxError):
        return Row(name, {**fields, "error": one_line(str(result))})
    row = {**fields, key: result.text, "score": _rounded(result.score)}
    if key == "answer":
        row["probability"] = _rounded(result.probability)
    if result.unmet:
        row["unmet"] = list(result.unmet)
    if result.alternatives:
        texts = [result, *result.alternatives]
        row[f"{key}s"] = [text.text for text in texts]
        row["scores"] = [_rounded(text.score) for text in texts]
    return Row(name, {**row, **result.speech_fields()})


def _rounded(value: float) -> float | None:
    return round(value, 4) if isfinite(value) else None


def remaining_items(
    items: Iterable[Item],
    shard: tuple[int, int],
    shard_key: Callable[[Item], str],
    results: ResultsFile | None,
    bar: tqdm[object],
    files: RowFiles | None = None,
) -> Iterator[Item]:
    """Yield the items of a shard, chosen by the hash of their keys, that are not done yet.

    Those are neither in the results file nor have all their files. How many have files only is reported on stderr.
    """
    index, count = shard
    num_with_files = 0
    for item in items:
        if count > 1 and hash_id(shard_key(item)) % count != index:
            continue
        is_new = results is None or results.add_id(item.fields)
        if is_new and files is not None and files.are_done(item.fields):
            num_with_files += 1
            is_new = False
        if is_new:
            yield item
        else:
            skip_one(bar)
    if num_with_files:
        bar.write(f"{num_with_files:,} skipped: captions exist; see --existing.", file=sys.stderr)


def _complete_pending(results: ResultsFile, output: OutputOptions) -> PendingRow | None:
    """Return the redo log of a results file after what a killed process had begun was completed; None for a stream."""
    if output.path is None or is_stream(output.path):
        return None
    pending = PendingRow(results, output.path)
    if output.overwrite:
        pending.discard()
    else:
        pending.complete()
    return pending


def _storable_rows(rows: Iterable[Row], result_fields: Collection[str]) -> Iterator[Row]:
    """Yield the same rows; one whose text has NUL bytes, which text files do not hold, with an error."""
    for row in rows:
        if any("\0" in text for text in row.fields.values() if isinstance(text, str)):
            message = f"{row.name!r}: the text has a NUL byte, which only JSON lines can hold; use --format jsonl."
            yield error_row(row, MmxError(message, code="output.nul"), result_fields)
        else:
            yield row


def error_row(row: Row, error: MmxError, result_fields: Collection[str]) -> Row:
    """Return a row with an error in the place of its results."""
    fields = {name: value for name, value in row.fields.items() if name not in result_fields}
    return Row(row.name, {**fields, "error": one_line(str(error))})


@contextmanager
def _open_results(output: OutputOptions, run: BatchRun[Item]) -> Iterator[ResultsFile | None]:
    """Open the file of --out; None for stdout. Raises MmxError."""
    out = output.path
    if out is None:
        yield None
        return
    with (
        write_errors(out),
        open_results_file(
            out, run.config, run.sources, output.overwrite, output.retry_errors, run.result_fields
        ) as results,
    ):
        if results.num_errors:
            rows = "one row is an error" if results.num_errors == 1 else f"{results.num_errors:,} rows are errors"
            print(f"{out}: {rows} of an earlier run; --retry-errors processes them again.", file=sys.stderr)
        yield results


def _write_rows(rows: Iterable[Row], bar: tqdm[object], write: Callable[[Row], None]) -> bool:
    """Write rows, and errors to stderr: one that several questions about an input share only once."""
    printed: set[tuple[str, str]] = set()
    succeeded = True
    for row in rows:
        bar.update()
        if "error" in row.fields:
            succeeded = False
            error = str(row.fields["error"])
            if (row.name, error) not in printed:
                printed.add((row.name, error))
                bar.write(error, file=sys.stderr)
        write(row)
    return succeeded


def _print_text(row: Row, format_line: Callable[[Row], str]) -> None:
    """Print a line for each text of a row; nothing for an error."""
    if "error" in row.fields:
        return
    key = "answer" if "answer" in row.fields else "caption"
    texts = row.fields.get(f"{key}s")
    for text in texts if isinstance(texts, list) else [row.fields[key]]:
        print(format_line(Row(row.name, {**row.fields, key: text})), flush=True)
