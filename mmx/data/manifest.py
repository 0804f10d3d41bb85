"""Manifests: JSON lines of inputs by source name, with captions or a question; and the metadata of HF ImageFolder."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmx.config.schema import DataConfig
from mmx.data.examples import Example, TextTask, join_tasks, unknown_sources
from mmx.data.hf_datasets import is_dataset_name
from mmx.data.json_fields import (
    RecordLocation,
    absolute_path,
    box_field,
    id_field,
    is_url,
    optional_text_field,
    read_lines,
    resolve_path,
    text_field,
    texts_field,
)
from mmx.data.record_files import is_record_list, read_records
from mmx.data.records import Record, normalize_record, rename_columns, valid_fields
from mmx.errors import DataError
from mmx.io.files import StoredBytes
from mmx.io.results_file import ID_FIELDS
from mmx.text.prompts import empty_question_error, is_empty_question

# Fields of a manifest line that are not inputs.
TASK_FIELDS = {
    "captions",
    "caption",
    "question",
    "question_type",
    "answer",
    "answers",
    "box",
    "evidence",
    "id",
    "question_id",
}
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
USUAL_SOURCES = ("image", "audio", "text")
NO_COLUMNS: Mapping[str, str] = {}
MIN_MISSPELT_LENGTH = 5  # shorter names, such as "ids", differ from others by one letter without being misspelt


class ManifestLine(NamedTuple):
    """One line of a manifest: where it was read, the inputs by source name as written, and its tasks."""

    location: RecordLocation
    written: dict[str, object]
    tasks: tuple[TextTask, ...]


class ManifestQuestion(NamedTuple):
    """One question of a manifest: the inputs by source name as written and with resolved paths, its task, its ids.

    location: where it was read; None for a question that was typed.
    """

    written: Mapping[str, object]
    sources: Mapping[str, object]
    task: TextTask
    ids: Mapping[str, object]
    location: RecordLocation | None = None


def read_manifest(path: Path, config: DataConfig, sources: Collection[str] | None = None) -> list[Example]:
    """Read JSONL: each line has inputs by source name, and captions, a question, or both.

    Lines about the same inputs become one example, see `join_lines`.

    Args:
        sources: names of the model's sources. Other fields of a line are not inputs. None if they are unknown: then
            every field but numbers and truth values is an input.
    """
    lines = []
    for number, line in read_lines(path, finite=False):
        location = RecordLocation(str(path), number)
        line = rename_columns(line, config.columns, location)
        _check_spelling(location, line, sources or ())
        lines.append(_parse_manifest_line(location, line))
    return join_lines(lines, path.parent, sources)


def read_folder(path: Path, config: DataConfig, sources: Collection[str] | None = None) -> list[Example]:
    """Read a folder in the layout of HF ImageFolder: a list of METADATA_FILES with `file_name` and `text`."""
    found = [path / name for name in METADATA_FILES if (path / name).is_file()]
    if not found:
        raise DataError(
            f"folder {path} has no {METADATA_FILES[0]}; expected lines such as {{'file_name': …, 'text': …}}.",
            code="data.no_metadata",
            path=str(path),
        )
    if len(found) > 1:
        raise DataError(
            f"folder {path} has both {found[0].name} and {found[1].name}; name the list that is meant as the path.",
            code="data.two_lists",
            path=str(path),
        )
    if found[0].suffix != ".jsonl":
        return read_record_list(read_records(found[0]), path, sources, config.columns)
    lines = []
    for number, line in read_lines(found[0], finite=False):
        location = RecordLocation(str(found[0]), number)
        lines.append(_parse_metadata_line(location, rename_columns(line, config.columns, location)))
    return join_lines(lines, path, sources)


def read_record_list(
    records: Iterable[Record], base: Path, sources: Collection[str] | None, columns: Mapping[str, str]
) -> list[Example]:
    """Make examples of the records of a table, an archive, a folder or a data set, as of the lines of a manifest.

    A record with `file_name` and without `image` is one of an ImageFolder, in which `text` is a caption.

    Args:
        base: folder that relative paths start from.
        sources: names of the model's sources. None if they are unknown: then the columns USUAL_SOURCES are inputs.
        columns: see `rename_columns`.
    """
    lines = [parse_record(normalize_record(record, columns), sources or ()) for record in records]
    return join_lines(lines, base, USUAL_SOURCES if sources is None else sources)


def parse_record(record: Record, sources: Collection[str]) -> ManifestLine:
    """Parse a record as a line of a manifest. Raises DataError."""
    fields = valid_fields(record)
    _check_spelling(record.location, fields, sources)
    if is_metadata(fields):
        return _parse_metadata_line(record.location, fields)
    return _parse_manifest_line(record.location, fields)


def is_metadata(fields: Mapping[str, object]) -> bool:
    """Return whether a record of a table is one of an ImageFolder, which names its image `file_name`."""
    return "file_name" in fields and "image" not in fields


def image_as_source(fields: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of a record of a table without its empty cells; `file_name` becomes `image`, without `text`."""
    present = {name: value for name, value in fields.items() if value is not None}
    if is_metadata(present):
        present["image"] = present.pop("file_name")
        present.pop("text", None)
    return present


def read_questions(path: Path, columns: Mapping[str, str] = NO_COLUMNS) -> list[ManifestQuestion]:
    """Return the questions of a manifest, a table or an archive in order. Raises DataError."""
    base = Path() if is_dataset_name(str(path)) else path.parent
    questions = [_read_question(record, base) for record in _question_records(path, columns)]
    if not questions:
        raise DataError(
            f'{path} holds no questions; expected lines such as {{"image": "a.jpg", "question": "…"}}.',
            code="data.no_questions",
            path=str(path),
        )
    return questions


def _question_records(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    if not is_record_list(str(path)):
        for number, line in read_lines(path):
            yield Record(RecordLocation(str(path), number), line)
        return
    for record in read_records(path):
        normalized = normalize_record(record, columns)
        yield normalized._replace(fields=image_as_source(valid_fields(normalized)))


def _read_question(record: Record, base: Path) -> ManifestQuestion:
    location = record.location
    line = valid_fields(record)
    if not isinstance(line.get("question"), str):
        message = 'has no \'question\'; expected {"image": "a.jpg", "question": "…"}.'
        raise location.error("no_question", message, key="question")
    inputs = _parse_inputs(location, line)
    task = _parse_question(location, line)
    ids = {name: line[name] for name in ID_FIELDS if name in line}
    written = {name: str(value) if isinstance(value, StoredBytes) else value for name, value in inputs.items()}
    return ManifestQuestion(written, resolve_sources(inputs, base), task, ids, location)


def resolve_sources(written: Mapping[str, object], base: Path) -> dict[str, object]:
    """Resolve paths relative to the folder of the manifest. The value of a source named "text" is the text itself."""
    sources: dict[str, object] = {}
    for name, value in written.items():
        if isinstance(value, str) and name != "text":
            value = resolve_path(value, base)
        sources[name] = value
    return sources


def join_lines(lines: Iterable[ManifestLine], base: Path, sources: Collection[str] | None) -> list[Example]:
    """Make one example of all lines about the same inputs, in the order in which inputs first appear.

    Paths are compared after they are resolved, and fields that are not inputs do not count. All captions become one
    task, and so do all answers to the same question.
    """
    first_lines: dict[str, ManifestLine] = {}
    tasks: dict[str, list[TextTask]] = {}
    for line in lines:
        inputs = _select_inputs(line, sources)
        key = _input_key(inputs, base)
        first_lines.setdefault(key, line._replace(written=inputs))
        tasks.setdefault(key, []).extend(line.tasks)
    examples = []
    for key, line in first_lines.items():
        name = " + ".join(str(value) for value in line.written.values())
        resolved = resolve_sources(line.written, base)
        examples.append(Example(name, resolved, join_tasks(tasks[key]), str(line.location)))
    return examples


def _select_inputs(line: ManifestLine, sources: Collection[str] | None) -> dict[str, object]:
    """Return the fields of a line that are inputs. Raises DataError if there are none."""
    if sources is None:
        inputs = {name: value for name, value in line.written.items() if not isinstance(value, int | float)}
        if not inputs:
            raise _no_input(line.location)
        return inputs
    inputs = {name: value for name, value in line.written.items() if name in sources}
    if not inputs:
        location = line.location
        raise unknown_sources(str(location), line.written, sources, path=location.path, line=location.line)
    return inputs


def _input_key(inputs: Mapping[str, object], base: Path) -> str:
    """Return a text that is equal for equal inputs, in whatever order and spelling of their paths."""
    resolved = {}
    for name, value in resolve_sources(inputs, base).items():
        is_path = isinstance(value, str) and name != "text" and not is_url(value)
        resolved[name] = absolute_path(str(value)) if is_path else value
    return json.dumps(resolved, sort_keys=True, default=str)


def _no_input(location: RecordLocation) -> DataError:
    return location.error("no_input", "names no input; expected a field such as 'image' with a path.")


def _check_spelling(location: RecordLocation, line: Mapping[str, object], sources: Collection[str]) -> None:
    """Raise DataError for a field such as "answrs": its texts would be left out without a word."""
    missing = sorted(TASK_FIELDS - line.keys(), key=len, reverse=True)
    known = [field for field in missing if len(field) >= MIN_MISSPELT_LENGTH]
    for name in line.keys() - TASK_FIELDS - set(sources):
        meant = next((field for field in known if _is_one_edit(name, field)), None)
        if meant is not None:
            message = f"has the field {name!r}, which is not read; write {meant!r}, or give it another name."
            raise location.error("misspelt_field", message, key=name, expected=meant)


def _is_one_edit(name: str, other: str) -> bool:
    """Whether two names differ by one letter that is added, left out or replaced, or by two that are exchanged."""
    shared = len(os.path.commonprefix([name, other]))
    rest = name[shared:]
    other_rest = other[shared:]
    if rest[2:] == other_rest[2:] and rest[:2] == other_rest[1::-1]:
        return True
    return rest[1:] == other_rest[1:] or rest[1:] == other_rest or rest == other_rest[1:]


def _parse_manifest_line(location: RecordLocation, line: Mapping[str, object]) -> ManifestLine:
    return _parse_line(location, line, line, ("captions", "caption"))


def _parse_line(
    location: RecordLocation, line: Mapping[str, object], inputs: Mapping[str, object], caption_fields: Sequence[str]
) -> ManifestLine:
    """Parse a line; `inputs` are its fields that may be inputs."""
    written = _parse_inputs(location, inputs)
    tasks = []
    captions = texts_field(line, caption_fields, location)
    if captions:
        tasks.append(TextTask(captions, id=_parse_id(location, line)))
    if "question" in line:
        tasks.append(_parse_question(location, line))
    else:
        _check_no_answer(location, line)
    if not tasks:
        raise location.error("no_task", "has neither 'captions' nor 'question'; add one of them.")
    return ManifestLine(location, written, tuple(tasks))


def _check_no_answer(location: RecordLocation, line: Mapping[str, object]) -> None:
    """Refuse fields of a question in a line without one: they would not be read."""
    for name in ("answers", "answer", "box"):
        if line.get(name) is not None:
            message = f"has {name!r} without a question; add 'question', or leave {name!r} out."
            raise location.error("no_question", message, key=name)


def _parse_inputs(location: RecordLocation, line: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of a line that may be inputs."""
    written = {key: value for key, value in line.items() if key not in TASK_FIELDS and value is not None}
    if not written:
        raise _no_input(location)
    for name in ("image", "text"):
        if not isinstance(written.get(name), StoredBytes):
            optional_text_field(written, name, location)
    return written


def _parse_question(location: RecordLocation, line: Mapping[str, object]) -> TextTask:
    question = text_field(line, "question", location)
    if is_empty_question(question):
        raise empty_question_error(str(location), path=location.path, line=location.line)
    question_type = optional_text_field(line, "question_type", location)
    answers = texts_field(line, ("answers", "answer"), location)
    if "box" not in line and "bbox" in line:
        message = "has 'bbox', which is not read; write 'box': [x0, y0, x1, y1], in fractions of the image (0 to 1)."
        raise location.error("bbox", message, key="bbox", expected="box")
    box = box_field(line, "box", location)
    evidence = box_field(line, "evidence", location)
    return TextTask(answers, question, question_type, box, evidence, _parse_id(location, line))


def _parse_id(location: RecordLocation, line: Mapping[str, object]) -> int | str | None:
    """Return the id of a line's texts: that of the question before that of the line. Other values are no ids."""
    for name in reversed(ID_FIELDS):
        value = line.get(name)
        if isinstance(value, int | str) and not isinstance(value, bool):
            return id_field(line, name, location)
    return None


def _parse_metadata_line(location: RecordLocation, line: Mapping[str, object]) -> ManifestLine:
    name = text_field(line, "file_name", location)
    if line.get("image") is not None:
        message = "has both 'file_name' and 'image'; give the path of the image as 'file_name' only."
        raise location.error("two_images", message, key="image")
    others = {key: value for key, value in line.items() if key not in ("file_name", "text")}
    return _parse_line(location, line, {**others, "image": name}, ("text", "captions", "caption"))
