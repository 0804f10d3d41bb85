"""Reading generated texts of any program: result rows (JSON lines), COCO and VQA results (a JSON list), CSV and TSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmx.boxes import Box
from mmx.data.json_fields import (
    RecordLocation,
    box_field,
    id_field,
    load_json_value,
    optional_text_field,
    read_lines,
)
from mmx.data.records import valid_fields
from mmx.data.tables import is_table, read_table
from mmx.errors import DataError

Record = Mapping[str, object]

CAPTION = "caption"
ANSWER = "answer"
PREDICTION = "prediction"  # of `mmx eval`: a caption, or an answer if there is a question
TEXT_FIELDS = (CAPTION, ANSWER, PREDICTION)
IMAGE_FIELDS = ("file_name", "filename")  # other names of the field "image"
ID_NAMES = ("id", "image_id", "question_id")
_EXPECTED = 'expected a list such as [{"image_id": 1, "caption": "…"}], JSON lines (.jsonl) or a table (.csv, .tsv).'


@dataclass(frozen=True)
class Prediction:
    """A generated text.

    Args:
        location: where it was read.
        text: None in the row of an error, which has none.
        is_answer: whether it is an answer, also if the row does not repeat the question.
        ids: by the name of their field.
        inputs: the other fields that are texts, among them the paths of inputs by source name.
        box: the region that the question is about.
    """

    location: RecordLocation
    text: str | None
    is_answer: bool
    question: str | None
    ids: Mapping[str, int | str]
    inputs: Mapping[str, str]
    box: Box | None = None


def read_predictions(path: Path) -> list[Prediction]:
    """Return the generated texts of a file in order.

    Raises DataError: the file is missing or damaged, or a row has no text (caption, answer or prediction) or several.
    """
    if not path.is_file():
        message = f"there is no file {path}; expected predictions as .jsonl, .json, .csv or .tsv."
        raise DataError(message, code="data.missing", path=str(path))
    predictions = [_parse_prediction(location, record) for location, record in _read_records(path)]
    if not predictions:
        message = f"{path} holds no rows; {_EXPECTED}"
        raise DataError(message, code="predictions.empty", path=str(path))
    return predictions


def _read_records(path: Path) -> Iterator[tuple[RecordLocation, Record]]:
    suffix = path.suffix.lower()
    if is_table(path.name):
        yield from _read_table(path)
    elif suffix == ".json":
        yield from _read_list(path)
    elif suffix == ".parquet":
        message = f"{path} is parquet, which is not read as predictions; {_EXPECTED}"
        raise DataError(message, code="predictions.format", path=str(path))
    else:
        for number, line in read_lines(path, finite=False):
            yield RecordLocation(str(path), number), line


def _read_list(path: Path) -> Iterator[tuple[RecordLocation, Record]]:
    document = load_json_value(path, _EXPECTED)
    if not isinstance(document, list):
        raise DataError(f"{path} does not hold a JSON list; {_EXPECTED}", code="predictions.format", path=str(path))
    for number, record in enumerate(document):
        location = RecordLocation(str(path), record=f"row {number}")
        if not isinstance(record, Mapping):
            raise location.error("not_object", f"is not an object; {_EXPECTED}")
        yield location, record


def _read_table(path: Path) -> Iterator[tuple[RecordLocation, Record]]:
    """Yield the rows of a table as records. Empty cells are absent, but a row without an error has a text."""
    try:
        for row in read_table(path):
            fields = valid_fields(row)
            record = {name: cell for name, cell in fields.items() if cell is not None}
            texts = [name for name in TEXT_FIELDS if name in fields]
            if texts and "error" not in record and not record.keys() & set(texts):
                record[texts[0]] = ""
            yield row.location, record
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror}; check the path."
        raise DataError(message, code="data.unreadable", path=str(path)) from error


def _parse_prediction(location: RecordLocation, record: Record) -> Prediction:
    question = optional_text_field(record, "question", location)
    found = [name for name in TEXT_FIELDS if record.get(name) is not None]
    if len(found) > 1:
        message = f"has several texts, {' and '.join(found)}; expected one of them."
        raise location.error("several_texts", message)
    if not found and not record.get("error"):
        raise location.error("no_text", "has no 'caption' and no 'answer'; add the generated text as one of them.")
    text = optional_text_field(record, found[0], location) if found else None
    ids = {name: id_field(record, name, location) for name in ID_NAMES if record.get(name) is not None}
    others = record.keys() - {"question", "error", *ID_NAMES, *TEXT_FIELDS}
    inputs = {name: str(record[name]) for name in sorted(others) if isinstance(record[name], str)}
    for name in IMAGE_FIELDS:
        if name in inputs:
            inputs.setdefault("image", inputs.pop(name))
    is_answer = question is not None or "question_id" in ids or found == [ANSWER]
    box = box_field(record, "box", location) if isinstance(record.get("box"), list) else None
    return Prediction(location, text, is_answer, question, ids, inputs, box)
