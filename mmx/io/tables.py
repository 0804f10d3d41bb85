"""Tables of result rows: a results file of JSON lines is written again as CSV, Parquet or text.

A stopped run is continued from the results file. A table is made from it at the end, and replaced as a whole.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from mmx.errors import MmxError, one_line
from mmx.io.atomic import atomic_write

if TYPE_CHECKING:
    import pyarrow

TableFormat = Literal["csv", "parquet", "txt"]
TABLE_FORMATS: tuple[TableFormat, ...] = get_args(TableFormat)

_ROW_GROUP = 10_000  # rows that are in memory at once
_TEXT_COLUMNS = ("question", "caption", "answer")


def write_table(path: Path, kind: TableFormat, results: Path, sources: Collection[str]) -> None:
    """Write the rows of a results file as a table.

    csv: UTF-8 with a header. parquet: columns of text, integers, numbers or truth values. In both, a value that is a
    list or an object is JSON, and a field that a row lacks is empty. txt: inputs, question and text of each row that is
    no error, with tabs between them. sources: the names under which rows have their inputs.

    Raises OSError and MmxError.
    """
    with atomic_write(path) as temporary:
        if kind == "csv":
            _write_csv(temporary, results)
        elif kind == "parquet":
            _write_parquet(temporary, results)
        else:
            _write_text(temporary, results, sources)


def check_parquet() -> None:
    """Raise MmxError if Parquet files cannot be written."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        message = "Parquet files need pyarrow, which is not installed; type pip install 'mmx[parquet]'."
        raise MmxError(message, code="parquet.not_installed") from error


def read_rows(results: Path) -> Iterator[dict[str, object]]:
    """Yield the rows of a results file."""
    with results.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


# ---- text and CSV ----------------------------------------------------------------------------------------------


def _write_text(path: Path, results: Path, sources: Collection[str]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for row in read_rows(results):
            if "error" not in row:
                columns = [str(row[name]) for name in (*sources, *_TEXT_COLUMNS) if row.get(name) is not None]
                print("\t".join(map(one_line, columns)), file=file)


def _write_csv(path: Path, results: Path) -> None:
    columns: dict[str, None] = {}
    for row in read_rows(results):
        columns.update(dict.fromkeys(row))
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if columns:
            writer.writerow(columns)
        for row in read_rows(results):
            writer.writerow(_cell(row.get(name)) for name in columns)


def _cell(value: object) -> object:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


# ---- Parquet ---------------------------------------------------------------------------------------------------


def _write_parquet(path: Path, results: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import ParquetWriter

    schema = _parquet_schema(results)
    rows = _encodable_rows(results)
    with ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, _ROW_GROUP)):
            columns: dict[str, list[object]] = {}
            for column in schema:
                columns[column.name] = [_parquet_value(row.get(column.name), column.type) for row in group]
            writer.write_table(Table.from_pydict(columns, schema))


def _parquet_schema(results: Path) -> pyarrow.Schema:
    """Return a schema that all rows fit: the names of columns, and a type for the values of each."""
    import pyarrow

    types: dict[str, set[type]] = {}
    for row in _encodable_rows(results):
        for name, value in row.items():
            types.setdefault(name, set()).add(_value_type(value))
    return pyarrow.schema([(name, _column_type(found - {type(None)})) for name, found in types.items()])


def _value_type(value: object) -> type:
    """Return the type of a value; an integer beyond 64 bits is stored as text."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str
    return type(value)


def _column_type(found: set[type]) -> pyarrow.DataType:
    import pyarrow

    if found == {bool}:
        return pyarrow.bool_()
    if found == {int}:
        return pyarrow.int64()
    if found and found <= {int, float}:
        return pyarrow.float64()
    return pyarrow.string()


def _parquet_value(value: object, column_type: pyarrow.DataType) -> object:
    if value is None or str(column_type) != "string":
        return value
    return _encodable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _encodable_rows(results: Path) -> Iterator[dict[str, object]]:
    for row in read_rows(results):
        yield {_encodable(name): value for name, value in row.items()}


def _encodable(text: str) -> str:
    """Return a text that UTF-8 can store: lone surrogates, of undecodable file names, are escaped."""
    return text.encode(errors="backslashreplace").decode()
