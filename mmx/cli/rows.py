"""Rows of results: which inputs are left to process, and where rows and errors are written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from mmx.errors import MmxError, one_line
from mmx.io.console import progress_bar, set_total_in_background, skip_one, write_errors
from mmx.io.results_file import RESULT_FIELDS, ResultsFile, hash_id, open_results_file, row_line

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


@dataclass(frozen=True)
class OutputOptions:
    """Where rows go. path: None for stdout; shard: (index, count)."""

    path: Path | None
    as_json: bool
    overwrite: bool
    retry_errors: bool
    quiet: bool
    shard: tuple[int, int]

    @classmethod
    def parse(
        cls, out: Path | None, as_json: bool, overwrite: bool, retry_errors: bool, quiet: bool, shard: tuple[int, int]
    ) -> OutputOptions:
        """Check the options. `--out -` prints JSON lines. Raises MmxError."""
        if out == Path("-"):
            out = None
            as_json = True
        if out is None and (overwrite or retry_errors):
            flag = "--overwrite" if overwrite else "--retry-errors"
            message = f"{flag} was given without a file; type {flag} --out FILE."
            raise MmxError(message, code="option.needs_out", option=flag)
        hide_bar = quiet or (out is None and sys.stdout.isatty())  # rows and a bar on one terminal would mix
        return cls(out, as_json, overwrite, retry_errors, hide_bar, shard)


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
    """

    items: Iterable[Item]
    sources: Collection[str]
    config: Mapping[str, object]
    shard_key: Callable[[Item], str]
    process: Callable[[Iterable[Item]], Iterable[Row]]
    format_line: Callable[[Row], str]
    count: Callable[[], int | None]
    result_fields: Collection[str] = RESULT_FIELDS

    def write(self, output: OutputOptions) -> bool:
        """Process the items and write their rows. Returns whether there is no error, now or in the file."""
        with _open_results(output, self) as results, progress_bar(None, output.quiet) as bar:
            set_total_in_background(bar, self.count)
            items = remaining_items(self.items, output.shard, self.shard_key, results, bar)
            rows = self.process(items)
            if results is not None:
                return _write_rows(rows, bar, lambda row: results.write(row.fields)) and not results.num_errors
            if output.as_json:
                return _write_rows(rows, bar, lambda row: print(row_line(row.fields), end="", flush=True))
            return _write_rows(rows, bar, lambda row: _print_text(row, self.format_line))


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
) -> Iterator[Item]:
    """Yield the items of a shard, chosen by the hash of their keys, that are not in the results file yet."""
    index, count = shard
    for item in items:
        if count > 1 and hash_id(shard_key(item)) % count != index:
            continue
        if results is None or results.add_id(item.fields):
            yield item
        else:
            skip_one(bar)


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
