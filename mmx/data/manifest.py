"""Manifests: JSON lines of inputs by source name, with captions or a question; and the metadata of HF ImageFolder."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmx.config.schema import DataConfig
from mmx.data.examples import Example, TextTask, join_tasks, unknown_sources
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
from mmx.errors import DataError
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
METADATA = "metadata.jsonl"
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
        _check_spelling(location, line, sources or ())
        lines.append(_parse_manifest_line(location, line))
    return join_lines(lines, path.parent, sources)


def read_folder(path: Path, config: DataConfig, sources: Collection[str] | None = None) -> list[Example]:
    """Read a folder in the layout of HF ImageFolder: `metadata.jsonl` with `file_name` and `text`."""
    metadata = path / METADATA
    if not metadata.is_file():
        raise DataError(
            f"folder {path} has no {METADATA}; expected lines such as {{'file_name': …, 'text': …}}.",
            code="data.no_metadata",
            path=str(path),
        )
    numbered = read_lines(metadata, finite=False)
    lines = (_parse_metadata_line(RecordLocation(str(metadata), number), line) for number, line in numbered)
    return join_lines(lines, path, sources)


def read_questions(path: Path) -> list[ManifestQuestion]:
    """Return the questions of a manifest in order. Raises DataError."""
    questions = []
    for number, line in read_lines(path):
        location = RecordLocation(str(path), number)
        if not isinstance(line.get("question"), str):
            message = 'has no \'question\'; expected {"image": "a.jpg", "question": "…"}.'
            raise location.error("no_question", message, key="question")
        written = _parse_inputs(location, line)
        task = _parse_question(location, line)
        ids = {name: line[name] for name in ID_FIELDS if name in line}
        questions.append(ManifestQuestion(written, resolve_sources(written, path.parent), task, ids, location))
    if not questions:
        raise DataError(
            f'{path} holds no questions; expected lines such as {{"image": "a.jpg", "question": "…"}}.',
            code="data.no_questions",
            path=str(path),
        )
    return questions


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
    return json.dumps(resolved, sort_keys=True)


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
