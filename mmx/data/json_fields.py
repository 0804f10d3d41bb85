"""Reading and checking JSON that users wrote: lines, fields, texts, boxes and paths.

Every error names the file and the line or record, and what was found there.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath

from mmx.boxes import Box, check_box
from mmx.errors import DataError, MmxError

JsonObject = dict[str, object]


@dataclass(frozen=True)
class RecordLocation:
    """Where a record was read: a file, and a line of it or a part of it such as "image 3"."""

    path: str
    line: int | None = None
    record: str | None = None

    def __str__(self) -> str:
        if self.line is not None:
            return f"{self.path}:{self.line}"
        return self.path if self.record is None else f"{self.path}, {self.record}"

    def error(self, reason: str, message: str, **details: object) -> DataError:
        """Return a DataError about this record; its code is `data.REASON`."""
        details = {"record": self.record, **details}
        return DataError(f"{self} {message}", code=f"data.{reason}", path=self.path, line=self.line, **details)


# ---- documents and lines -----------------------------------------------------------------------------------------


def read_lines(path: Path, finite: bool = True) -> Iterator[tuple[int, JsonObject]]:
    """Yield (line number, object) of a JSONL file; empty lines are skipped.

    Raises:
        DataError: the file is missing, or a line is not a JSON object (see `parse_line`).
    """
    if not path.is_file():
        raise DataError(
            f"there is no file {path}; expected JSON lines, one object each.", code="data.missing", path=str(path)
        )
    for number, text in numbered_lines(path):
        yield number, parse_line(RecordLocation(str(path), number), text, finite)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of the lines of a file for `parse_line`; empty lines are skipped. Raises OSError.

    Bytes that are not UTF-8 become lone surrogates, so that each wrong line can be refused on its own.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield number, text


def parse_line(location: RecordLocation, text: str, finite: bool = True) -> JsonObject:
    """Parse one line as a JSON object.

    Args:
        text: a line of `numbered_lines`.
        finite: refuse NaN, Infinity and numbers that overflow. Lines whose fields are written out again need this,
            because the output would not be valid JSON.

    Raises:
        DataError: the line is not UTF-8, not a JSON object, has a key twice, or a number that is not finite.
    """
    check_utf8_line(location, text)
    parse_number = _parse_finite if finite else float
    try:
        line = json.loads(
            text, parse_constant=parse_number, parse_float=parse_number, object_pairs_hook=_object_of_pairs
        )
    except _RepeatedKeyError as error:
        raise _repeated_key(location, error) from None
    except OverflowError:
        message = "has a number that is not finite, such as NaN; write null, or leave it out."
        raise location.error("not_finite", message) from None
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict):
        raise location.error("not_json", 'is not a JSON object; expected a line such as {"image": …}.')
    return line


def check_utf8_line(location: RecordLocation, text: str) -> None:
    """Raise DataError for a line of `numbered_lines` that was not UTF-8, or has a zero byte."""
    content = text.encode("utf-8", "surrogateescape")
    wrong = _wrong_byte(content)
    if wrong is not None:
        raise _not_utf8(location, content, wrong)


def load_json(path: Path, expected: str) -> JsonObject:
    """Return the JSON object in a file. Raises DataError; its message ends with `expected`."""
    document = load_json_value(path, expected)
    if not isinstance(document, dict):
        message = f"{path} does not hold a JSON object; {expected}"
        raise DataError(message, code="data.not_json", path=str(path))
    return document


def load_json_value(path: Path, expected: str) -> object:
    """Return the JSON value in a file, such as a list. Raises DataError; its message ends with `expected`."""
    details = {"code": "data.not_json", "path": str(path)}
    try:
        return json.loads(read_utf8(path), object_pairs_hook=_object_of_pairs)
    except _RepeatedKeyError as error:
        raise _repeated_key(RecordLocation(str(path)), error) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON; {expected}", line=error.lineno, **details) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON; {expected}", **details) from error


def read_utf8(path: Path) -> str:
    """Return the text of a file without its byte order mark. Raises OSError, and DataError if it is not UTF-8."""
    content = path.read_bytes()
    wrong = _wrong_byte(content)
    if wrong is not None:
        start = content.rfind(b"\n", 0, wrong) + 1
        location = RecordLocation(str(path), 1 + content.count(b"\n", 0, start))
        raise _not_utf8(location, content[start:], wrong - start)
    return content.decode("utf-8").removeprefix("\ufeff")


def _wrong_byte(content: bytes) -> int | None:
    """Return the offset of the first byte that is not UTF-8, or zero as in UTF-16; None if there is none."""
    try:
        content.decode("utf-8")
        end = len(content)
    except UnicodeDecodeError as error:
        end = error.start
    zero = content.find(b"\0", 0, end)
    if zero >= 0:
        return zero
    return None if end == len(content) else end


def _not_utf8(location: RecordLocation, line: bytes, offset: int) -> DataError:
    """Return the error for the byte of a line that is not UTF-8."""
    message = f"is not UTF-8: byte 0x{line[offset]:02x} at byte offset {offset} of the line; save the file as UTF-8."
    return location.error("not_utf8", message, byte=offset)


class _RepeatedKeyError(Exception):
    """A JSON object has a key twice; Python's reader would drop the first value. Its argument is the key."""


def _object_of_pairs(pairs: list[tuple[str, object]]) -> JsonObject:
    """Return a JSON object as a dictionary. Raises _RepeatedKeyError."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in record if names.count(name) > 1))
    return record


def _repeated_key(location: RecordLocation, error: _RepeatedKeyError) -> DataError:
    key = str(error.args[0])
    message = f"has the key {_shorten(key)} twice in one object; give several values as a list."
    return location.error("repeated_key", message, key=key)


def _parse_finite(text: str) -> float:
    """Parse a number; NaN, Infinity and 1e999 raise OverflowError."""
    number = float(text)
    if not math.isfinite(number):
        raise OverflowError
    return number


# ---- fields ------------------------------------------------------------------------------------------------------


def text_field(record: object, name: str, location: RecordLocation) -> str:
    """Return a required text. Raises DataError."""
    value = _field(record, name, location)
    if not isinstance(value, str):
        raise _type_error(value, name, "a text", location)
    return _check_utf8(value, location)


def optional_text_field(record: object, name: str, location: RecordLocation) -> str | None:
    """Return a text, or None if the field is absent or null. Raises DataError."""
    if isinstance(record, Mapping) and record.get(name) is None:
        return None
    return text_field(record, name, location)


def list_field(record: object, name: str, location: RecordLocation) -> list[object]:
    """Return a required list. Raises DataError."""
    value = _field(record, name, location)
    if not isinstance(value, list):
        raise _type_error(value, name, "a list", location)
    return value


def id_field(record: object, name: str, location: RecordLocation) -> int | str:
    """Return a required identifier, a number or a text; "7" is the number 7. Raises DataError."""
    value = _field(record, name, location)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _type_error(value, name, "a number or a text", location)
    if isinstance(value, str):
        text = _check_utf8(value, location)
        return int(text) if re.fullmatch(r"0|-?[1-9][0-9]{0,18}", text) else text
    return value


def texts_field(record: Mapping[str, object], names: Sequence[str], location: RecordLocation) -> tuple[str, ...]:
    """Return the text or texts under `names`, () if the record has none of them. Raises DataError.

    A text under a later name, such as "caption" next to "captions", is not repeated if an earlier name has it.
    """
    found: list[str] = []
    for name in names:
        value = record.get(name)
        if value is None:
            continue
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts:
            raise _type_error(value, name, "one or more texts", location)
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise _type_error(value, name, "one or more texts", location)
        earlier = set(found)
        found.extend(_check_utf8(text, location) for text in texts if text not in earlier)
    return tuple(found)


def box_field(record: Mapping[str, object], name: str, location: RecordLocation) -> Box | None:
    """Return a box, or None if the field is absent or null. Raises DataError for anything but a region in 0..1."""
    value = record.get(name)
    if value is None:
        return None
    expected = "[x0, y0, x1, y1] with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
    if not isinstance(value, list) or not all(isinstance(edge, int | float) for edge in value):
        raise _type_error(value, name, expected, location)
    try:
        check_box(value)
        x0, y0, x1, y1 = map(float, value)
    except (MmxError, ValueError, OverflowError):
        raise _type_error(value, name, expected, location) from None
    return x0, y0, x1, y1


def _field(record: object, name: str, location: RecordLocation) -> object:
    if not isinstance(record, Mapping):
        message = f"is or holds {_shorten(record)}; expected an object with a field {name!r}."
        raise location.error("not_object", message, key=name)
    if name not in record:
        present = ", ".join(sorted(record)) or "no field"
        raise location.error("missing_field", f"has no {name!r}; it has {present}.", key=name)
    return record[name]


def _type_error(value: object, name: str, expected: str, location: RecordLocation) -> DataError:
    message = f"has {name!r}: {_shorten(value)}; expected {expected}."
    return location.error("field_type", message, key=name, expected=expected)


def _check_utf8(text: str, location: RecordLocation) -> str:
    """Refuse unpaired surrogates: JSON can spell them ("\\ud800"), but they are not valid Unicode text."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        message = f"has a text with an unpaired surrogate, {_shorten(text)}; write it as UTF-8."
        raise location.error("not_utf8", message)
    return text


def _shorten(value: object) -> str:
    return json.dumps(value, default=str)[:60]


# ---- paths ----------------------------------------------------------------------------------------------------


def is_url(text: str) -> bool:
    """Return whether a text is a URL or inline data, in which double slashes must be kept."""
    return re.match(r"data:|[a-z][a-z0-9+.-]+://", text, re.IGNORECASE) is not None


def absolute_path(path: str) -> str:
    """Return a text that is equal for all spellings of a path; only the folder is resolved, not the file itself."""
    folder, name = os.path.split(path)
    return os.path.join(_absolute_folder(folder), name)


@lru_cache(maxsize=4096)
def _absolute_folder(folder: str) -> str:
    return os.path.realpath(folder)


def resolve_path(raw: str, base: Path) -> str:
    """Resolve a path relative to the folder of its list.

    A URL is kept, unless a file of this name exists. Windows separators are read where no file has the name as written.
    """
    if "\\" in raw and not os.path.exists(base / raw):
        with_slashes = PureWindowsPath(raw).as_posix()
        raw = with_slashes if os.path.exists(base / with_slashes) else raw
    path = base / raw
    return raw if is_url(raw) and not os.path.exists(path) else str(path)
