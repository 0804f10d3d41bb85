"""Records: the rows of a list of inputs in whatever format, as fields of a manifest line (see `mmx.data.manifest`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mmx.data.json_fields import JsonObject, RecordLocation
from mmx.errors import DataError

_NUMBERED_CAPTION = re.compile(r"captions?_(\d+)")


class Record(NamedTuple):
    """One record: where it was read, and its fields or why they cannot be read."""

    location: RecordLocation
    fields: JsonObject | DataError


def valid_fields(record: Record) -> JsonObject:
    """Return the fields of a record. Raises its error."""
    if isinstance(record.fields, DataError):
        raise record.fields
    return record.fields


def normalize_record(record: Record, columns: Mapping[str, str]) -> Record:
    """Return a record of a table with the fields of a manifest line; its empty cells are left out.

    The texts of caption_0, caption_1, ... become `captions`.

    Args:
        columns: see `rename_columns`.

    Raises:
        DataError: the error of the record, or its columns do not fit.
    """
    fields = rename_columns(valid_fields(record), columns, record.location)
    fields = _join_numbered_captions(fields, record.location)
    return record._replace(fields={name: value for name, value in fields.items() if value is not None})


def rename_columns(fields: JsonObject, columns: Mapping[str, str], location: RecordLocation) -> JsonObject:
    """Return fields of the names of a manifest; a column that is not renamed keeps its name.

    Args:
        columns: the column of each field that has another name in the data, such as {"caption": "description"}.

    Raises:
        DataError: one of the columns is missing, or there is one of the new name already.
    """
    for field, column in columns.items():
        if column not in fields:
            present = ", ".join(map(repr, fields)) or "no column"
            message = f"has no column {column!r} for {field!r}; it has {present}. Correct `columns`."
            raise location.error("missing_column", message, key=column, present=sorted(fields))
        if field in fields and field not in columns.values():
            message = f"has a column {field!r}, and `columns` names {column!r} for it; leave one of them out."
            raise location.error("two_columns", message, key=field)
    renamed = {name: value for name, value in fields.items() if name not in columns.values()}
    for field, column in columns.items():
        renamed[field] = fields[column]
    return renamed


def _join_numbered_captions(fields: JsonObject, location: RecordLocation) -> JsonObject:
    numbered: dict[int, str] = {}
    for name in fields:
        match = _NUMBERED_CAPTION.fullmatch(name)
        if match is not None:
            numbered[int(match[1])] = name
    if not numbered:
        return fields
    if fields.get("captions") is not None:
        message = f"has both 'captions' and {min(numbered.values())!r}; leave one of them out."
        raise location.error("two_columns", message, key="captions")
    captions = [fields[numbered[number]] for number in sorted(numbered)]
    joined = {name: value for name, value in fields.items() if name not in numbered.values()}
    joined["captions"] = [caption for caption in captions if caption is not None] or None
    return joined


def check_header(names: Iterable[object], location: RecordLocation) -> None:
    """Raise DataError for column names that are empty or occur twice."""
    seen: set[object] = set()
    for number, name in enumerate(names, 1):
        if not isinstance(name, str) or not name.strip():
            message = f"has no name for column {number}; name it in the first line, as image,caption."
            raise location.error("column_name", message, column=number)
        if name in seen:
            raise location.error("repeated_key", f"has two columns {json.dumps(name)[:60]}; rename one.", key=name)
        seen.add(name)
