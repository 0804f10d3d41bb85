"""What stands in JSON that people wrote, looked at before it is believed: lines, fields, texts, boxes, paths.

Every error names the file, the line and what stands there instead.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmx.errors import DataError
from mmx.memory import Box

KINDS = {str: "a text", list: "a list", (int, str): "a number or a text"}


def read_lines(path: Path, finite: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file. Raises DataError, naming file and line, for one that is no object, and see
    `parse_line`."""
    if not path.is_file():
        raise DataError(f"there is no file {path}; expected JSON lines, one object each.")
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield number, parse_line(f"{path}:{number}", text, finite)


def parse_line(where: str, text: str, finite: bool = True) -> dict[str, Any]:
    """The object of one line. Raises DataError, naming where it stands, for what is none; or (`finite`) holds a number
    that JSON has not: what is kept of a line that is asked about is written again, and others could not read it."""
    try:
        line = json.loads(text, parse_constant=_finite, parse_float=_finite) if finite else json.loads(text)
    except OverflowError:
        raise DataError(f"{where} has a number that is not finite, such as NaN; write null, or leave it out.") from None
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict):
        raise DataError(f'{where} is no JSON object; expected a line such as {{"image": …}}.')
    return line


def _finite(text: str) -> float:
    """NaN, Infinity, 1e999 -> OverflowError."""
    if not math.isfinite(number := float(text)):
        raise OverflowError
    return number


def is_url(text: str) -> bool:
    """Whether this is an address or inline data, of which nothing may be folded as `Path` folds two slashes."""
    return re.match(r"data:|[a-z][a-z0-9+.-]+://", text, re.IGNORECASE) is not None


def resolve_path(raw: str, base: Path) -> str:
    """A path as seen from the folder of its list; an address stays as it is spelled, unless a file bears its name."""
    place = base / raw
    return raw if is_url(raw) and not os.path.exists(place) else str(place)


def load_json(path: Path, expected: str) -> dict[str, Any]:
    """The object that a file holds. Raises DataError, which closes with what was expected, for what is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is no JSON; {expected}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON; {expected}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} holds no JSON object; {expected}")
    return document


def required_field(record: Any, name: str, kind: Any, where: str) -> Any:
    """A field that must be there and be of a kind. Raises DataError with what stands there instead."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where} is or holds {_shown(record)}; expected an object with a field {name!r}.")
    if name not in record:
        raise DataError(f"{where} has no {name!r}; it has {', '.join(sorted(record)) or 'nothing'}.")
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where} has {name!r}: {_shown(value)}; expected {KINDS[kind]}.")
    return _utf8(value, where) if isinstance(value, str) else value


def optional_field(record: Mapping[str, Any], name: str, kind: Any, where: str) -> Any:
    """The same, or None where it is not there, or null."""
    return None if record.get(name) is None else required_field(record, name, kind, where)


def text_fields(line: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[str, ...]:
    """The text or texts under the first of `names` that the line has; () where it has none of them."""
    name = next((name for name in names if line.get(name) is not None), None)
    if name is None:
        return ()
    given = [line[name]] if isinstance(line[name], str) else line[name]
    if not isinstance(given, list) or not given or not all(isinstance(text, str) and text.strip() for text in given):
        raise DataError(f"{where} has {name!r}: {_shown(line[name])}; expected one or more texts.")
    return tuple(_utf8(text, where) for text in given)


def read_box(line: Mapping[str, Any], name: str, where: str) -> Box | None:
    """A region under a name, None where there is none. Raises DataError for what is no region in 0..1."""
    box = line.get(name)
    if box is None:
        return None
    numbers = isinstance(box, list) and all(isinstance(edge, int | float) and math.isfinite(edge) for edge in box)
    if not numbers or len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise DataError(
            f"{where} has {name!r}: {_shown(box)}; expected [x0, y0, x1, y1] with 0 <= x0 < x1 <= 1, y alike."
        )
    return tuple(map(float, box))  # type: ignore[return-value]


def _utf8(text: str, where: str) -> str:
    """JSON can spell half a character ("\\ud800"), which no tokenizer takes."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{where} has a text with half a character, {_shown(text)}; write it as UTF-8.")
    return text


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


def single_spaced(text: str) -> str:
    """One space where there is white space, none at the ends."""
    return " ".join(text.split())
