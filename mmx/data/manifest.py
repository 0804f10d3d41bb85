"""Manifests: JSON lines of inputs by source name, with captions or a question; and the metadata of HF ImageFolder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mmx.config.schema import DataConfig
from mmx.data.examples import Example, TextTask
from mmx.data.json_fields import (
    RecordLocation,
    box_field,
    optional_text_field,
    read_lines,
    resolve_path,
    text_field,
    texts_field,
)
from mmx.errors import DataError
from mmx.io.results_file import ID_FIELDS

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


class ManifestLine(NamedTuple):
    """One line of a manifest: where it was read, the inputs by source name as written, and its task."""

    location: RecordLocation
    written: dict[str, object]
    task: TextTask


class ManifestQuestion(NamedTuple):
    """One question of a manifest: the inputs by source name as written and with resolved paths, its task, its ids."""

    written: Mapping[str, object]
    sources: Mapping[str, object]
    task: TextTask
    ids: Mapping[str, object]


def read_manifest(path: Path, config: DataConfig) -> list[Example]:
    """Read JSONL: each line has inputs by source name, and captions or a question.

    Lines with equal inputs become one example.
    """
    numbered = read_lines(path, finite=False)
    lines = (_parse_manifest_line(RecordLocation(str(path), number), line) for number, line in numbered)
    return _join_equal_inputs(lines, path.parent)


def read_folder(path: Path, config: DataConfig) -> list[Example]:
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
    return _join_equal_inputs(lines, path)


def read_questions(path: Path) -> list[ManifestQuestion]:
    """Return the questions of a manifest in order. Raises DataError."""
    questions = []
    for number, line in read_lines(path):
        location = RecordLocation(str(path), number)
        if not isinstance(line.get("question"), str):
            message = 'has no \'question\'; expected {"image": "a.jpg", "question": "…"}.'
            raise location.error("no_question", message, key="question")
        parsed = _parse_manifest_line(location, line)
        sources = resolve_sources(parsed.written, path.parent)
        ids = {name: line[name] for name in ID_FIELDS if name in line}
        questions.append(ManifestQuestion(parsed.written, sources, parsed.task, ids))
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


def _parse_manifest_line(location: RecordLocation, line: Mapping[str, object]) -> ManifestLine:
    written = {key: value for key, value in line.items() if key not in TASK_FIELDS and value is not None}
    if not written:
        raise location.error("no_input", "names no input; expected a field such as 'image' with a path.")
    for name in ("image", "text"):
        optional_text_field(written, name, location)
    return ManifestLine(location, written, _parse_task(location, line))


def _parse_task(location: RecordLocation, line: Mapping[str, object]) -> TextTask:
    if "question" in line:
        question = text_field(line, "question", location)
        question_type = optional_text_field(line, "question_type", location)
        answers = texts_field(line, ("answers", "answer"), location)
        box = box_field(line, "box", location)
        evidence = box_field(line, "evidence", location)
        return TextTask(answers, question, question_type, box, evidence)
    captions = texts_field(line, ("captions", "caption"), location)
    if not captions:
        raise location.error("no_task", "has neither 'captions' nor 'question'; add one of them.")
    return TextTask(captions)


def _parse_metadata_line(location: RecordLocation, line: Mapping[str, object]) -> ManifestLine:
    text_field(line, "file_name", location)
    new_names = {"file_name": "image", "text": "caption"}
    renamed = {new_names.get(key, key): value for key, value in line.items()}
    return _parse_manifest_line(location, renamed)


def _join_equal_inputs(lines: Iterable[ManifestLine], base: Path) -> list[Example]:
    """Make one example of all lines with the same inputs, in the order in which inputs first appear."""
    first_lines: dict[str, ManifestLine] = {}
    tasks: dict[str, list[TextTask]] = {}
    for line in lines:
        key = json.dumps(line.written, sort_keys=True)
        first_lines.setdefault(key, line)
        tasks.setdefault(key, []).append(line.task)
    examples = []
    for key, line in first_lines.items():
        name = " + ".join(str(value) for value in line.written.values())
        sources = resolve_sources(line.written, base)
        examples.append(Example(name, sources, tuple(tasks[key]), str(line.location)))
    return examples
