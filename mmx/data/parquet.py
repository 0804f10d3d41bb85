"""Parquet lists: columns are the fields of a manifest line. Images are paths, or the {bytes, path} of HF datasets.

pyarrow is in the extra `parquet`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time
from importlib import import_module
from pathlib import Path
from types import ModuleType

from mmx.data.json_fields import RecordLocation
from mmx.data.records import Record, check_header
from mmx.errors import DataError
from mmx.io.files import StoredBytes

ROWS_PER_BATCH = 64  # rows that are decoded at once: images of some megabytes are held in memory


def is_parquet(path: str) -> bool:
    """Return whether a file name is that of a parquet file."""
    return Path(path).suffix.lower() == ".parquet"


def read_parquet(path: Path) -> Iterator[Record]:
    """Yield the rows of a parquet file, ROWS_PER_BATCH of them in memory at a time.

    Raises DataError if pyarrow is missing, or the file is damaged.
    """
    parquet = import_extra("pyarrow.parquet", "parquet", path)
    location = RecordLocation(str(path))
    try:
        file = parquet.ParquetFile(path)
        check_header(file.schema_arrow.names, location)
        number = 0
        for batch in file.iter_batches(ROWS_PER_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield Record(RecordLocation(str(path), record=f"row {number}"), row_fields(row, f"{path}:{number}"))
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - pyarrow raises about six types for damaged files
        message = f"cannot be read as parquet ({type(error).__name__}); download or write it again."
        raise location.error("damaged_parquet", message) from None


def count_parquet_rows(path: str) -> int:
    """Return the number of rows of a parquet file. Raises DataError."""
    parquet = import_extra("pyarrow.parquet", "parquet", Path(path))
    try:
        return int(parquet.ParquetFile(path).metadata.num_rows)
    except Exception:  # noqa: BLE001 - as in read_parquet; reading the rows reports it
        return 0


@dataclass(frozen=True)
class EmbeddedBytes(StoredBytes):
    """The bytes of an image in a row of a table."""

    name: str
    data: bytes = field(repr=False)

    def load(self, max_bytes: int) -> bytes:
        """Return the bytes."""
        return self.data[: max_bytes + 1]


def row_fields(row: Mapping[str, object], name: str) -> dict[str, object]:
    """Return a row as fields: images become paths or embedded bytes; values without a form in JSON are left out.

    Args:
        name: what messages call the row; also the name of its image.
    """
    return {column: _field(value, name) for column, value in row.items()}


def _field(value: object, name: str) -> object:
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        data = value["bytes"]
        return value["path"] if data is None else EmbeddedBytes(name, data)
    return EmbeddedBytes(name, value) if isinstance(value, bytes) else _json_value(value)


def _json_value(value: object) -> object:
    """Return a value as it is written to JSON; one without such a form is None."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    return value if isinstance(value, str | int | float) else None


def import_extra(module: str, extra: str, path: object) -> ModuleType:
    """Import a module of an extra. Raises DataError, which names the extra."""
    try:
        return import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise DataError(
            f"{path} needs {package}, which is not installed; type: pip install 'mmx[{extra}]'.",
            code="data.missing_package",
            path=str(path),
            package=package,
            extra=extra,
        ) from None
