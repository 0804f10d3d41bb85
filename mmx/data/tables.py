"""CSV and TSV lists: the first line names the columns, as a manifest names its fields.

Cells are texts. An empty cell is a field that is absent; lists and boxes are written as JSON.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmx.data.json_fields import RecordLocation, check_utf8_line
from mmx.data.records import Record, check_header
from mmx.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LIST_COLUMNS = ("captions", "answers")  # a text, or a JSON list of texts
JSON_COLUMNS = ("box", "evidence")
_STARTS_AS_LIST = re.compile(r"""\s*\[\s*["'\]]""")


def is_table(path: str) -> bool:
    """Return whether a file name is that of a CSV or TSV list."""
    return Path(path).suffix.lower() in DELIMITERS


def read_table(path: Path) -> Iterator[Record]:
    """Yield the rows of a CSV or TSV file; empty lines are skipped. Quotes are as in RFC 4180, also in TSV files.

    A row that is damaged, not UTF-8 or has too few or too many cells is a record of its own. Raises OSError, and
    DataError if the first line does not name columns.
    """
    delimiter = DELIMITERS[path.suffix.lower()]
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _CheckedLines(str(path), file)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _read_header(lines, rows, delimiter)
        while True:
            lines.start_row()
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Record(lines.location, lines.error or _damaged_row(lines.location, error))
                continue
            if lines.error is not None:
                yield Record(lines.location, lines.error)
            elif any(cell.strip() for cell in cells) or len(cells) > 1:
                yield _parse_row(lines.location, header, cells)


class _CheckedLines:
    """The lines of a table, with the number of the first line of a row and the first wrong encoding in the row."""

    def __init__(self, path: str, file: Iterator[str]) -> None:
        self.path = path
        self.file = file
        self.num_lines = 0
        self.location = RecordLocation(path, 1)
        self.error: DataError | None = None

    def __iter__(self) -> _CheckedLines:
        return self

    def __next__(self) -> str:
        text = next(self.file)
        self.num_lines += 1
        try:
            check_utf8_line(RecordLocation(self.path, self.num_lines), text)
        except DataError as error:
            self.error = self.error or error
        return text

    def start_row(self) -> None:
        """Start the next row, which may have several lines."""
        self.location = RecordLocation(self.path, self.num_lines + 1)
        self.error = None


def _read_header(lines: _CheckedLines, rows: Iterator[list[str]], delimiter: str) -> list[str]:
    try:
        header = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise lines.error or _damaged_row(lines.location, error) from None
    if lines.error is not None:
        raise lines.error
    if not header:
        raise lines.location.error("no_header", "names no columns; expected a first line such as image,caption.")
    others = [sign for sign in (",", ";", "\t") if sign != delimiter and sign in header[0]]
    if len(header) == 1 and others:
        message = f"is not separated by {delimiter!r} but by {others[0]!r}; save it with {delimiter!r} between cells."
        raise lines.location.error("delimiter", message, delimiter=others[0])
    check_header(header, lines.location)
    return header


def _parse_row(location: RecordLocation, header: Sequence[str], cells: Sequence[str]) -> Record:
    if len(cells) != len(header):
        message = f"has {len(cells)} cells, and the first line names {len(header)} columns; quote texts with commas."
        return Record(location, location.error("row_length", message, cells=len(cells), expected=len(header)))
    try:
        fields = {name: _parse_cell(name, cell, location) for name, cell in zip(header, cells, strict=True)}
        return Record(location, fields)
    except DataError as error:
        return Record(location, error)


def _parse_cell(name: str, cell: str, location: RecordLocation) -> object:
    """Return the value of a cell: None, a text, or for lists and boxes what its JSON says. Raises DataError."""
    if not cell.strip():
        return None
    is_list = name in LIST_COLUMNS and _STARTS_AS_LIST.match(cell)
    if not is_list and name not in JSON_COLUMNS:
        return cell
    try:
        value: object = json.loads(cell)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list):
        return value
    expected = "a JSON list such as " + ("[0.1, 0.2, 0.5, 0.9]" if name in JSON_COLUMNS else '["a dog", "a cat"]')
    message = f"has {name!r}: {json.dumps(cell)[:60]}; expected {expected}."
    raise location.error("field_type", message, key=name, expected=expected)


def _damaged_row(location: RecordLocation, error: csv.Error) -> DataError:
    message = f'cannot be read ({error}); expected cells with quotes as in "a ""small"" dog".'
    return location.error("damaged_row", message)
