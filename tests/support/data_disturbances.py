"""Disturbances of a generated data set: spellings, fields that are not read, missing fields, wrong encodings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from generated_data import GeneratedImage

from mmx.config.schema import DataConfig

Record = dict[str, object]
ENCODINGS = ("latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32-be", "shift_jis", "gb18030")


@dataclass(frozen=True)
class Refusal:
    """The error that spoiled data must give: its code, and the file and line or record that it must name."""

    code: str
    path: Path
    line: int | None = None
    record: str | None = None
    byte: int | None = None


@dataclass
class WrittenData:
    """Data in one form.

    Attributes:
        images: the texts that must be read.
        rows: number of captions and questions in the files, and of records without any.
        skipped: names of the records that must be counted as not read.
        without_answers: names of the questions that must be counted as read without answers.
        sources: names of the model's sources; None if they are unknown.
        refusal: the expected error, None for data that is read.
    """

    config: DataConfig
    images: list[GeneratedImage]
    rows: int
    skipped: list[str] = field(default_factory=list)
    without_answers: list[str] = field(default_factory=list)
    sources: tuple[str, ...] | None = ("image",)
    refusal: Refusal | None = None


def spelling(random: Random, folder: Path, name: str) -> str:
    """Return one of several spellings of the path of an image."""
    file = folder / "images" / Path(name).name
    detour = folder / "images" / ".." / "images" / file.name
    windows = f".\\{name}".replace("/", "\\")
    return random.choice([name, name, f"./{name}", f".//{name}", windows, str(file), str(detour)])


def blurred(random: Random, text: str) -> str:
    """Return a text with other white space."""
    return random.choice([text, text, f" {text}\n", text.replace(" ", "  "), text.replace(" ", "\u2028")])


def id(random: Random, number: int) -> int | str:
    return random.choice([number, str(number)])


def add_unread_fields(random: Random, record: Record, texts: bool = True) -> Record:
    """Add fields that are not read; without `texts`, only numbers, which are never inputs."""
    fields: Record = {"width": 640, "score": float("nan"), "cropped": True, "audio": None}
    if texts:
        fields |= {"author": f"by {random.random()}", "boxes": [random.random()], "url": "http://x.y/z.jpg"}
    for name in random.sample(sorted(fields), random.randint(0, 3)):
        record[name] = fields[name]
    return record


def spoil_record(
    random: Random,
    written: WrittenData,
    path: Path,
    name: str,
    records: list[Record],
    required: Sequence[str],
    wrong: Record,
) -> None:
    """Sometimes remove a required field of a record, or give it a value of a wrong type."""
    if not records or written.refusal is not None or random.random() > 0.1:
        return
    number = random.randrange(len(records))
    if wrong and random.random() < 0.5:
        key = random.choice(sorted(wrong))
        records[number] = {**records[number], key: wrong[key]}
        code = "data.field_type"
    else:
        key = random.choice(required)
        records[number] = {field: value for field, value in records[number].items() if field != key}
        code = "data.missing_field"
    written.refusal = Refusal(code, path, None, f"{name} {number}")


def write_document(random: Random, path: Path, document: Record, written: WrittenData) -> None:
    indent = random.choice([None, 1])
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    write_text(random, path, text, written)


def write_text(random: Random, path: Path, text: str, written: WrittenData) -> None:
    """Write a text in UTF-8, with a byte order mark or without, or in a wrong encoding."""
    content = text.encode(random.choice(["utf-8", "utf-8", "utf-8-sig"]))
    if written.refusal is None and random.random() < 0.1:
        other = text.encode(random.choice(ENCODINGS), errors="replace")
        refusal = _encoding_refusal(path, other)
        if refusal is not None:
            written.refusal = refusal
            content = other
    path.write_bytes(content)


def _encoding_refusal(path: Path, content: bytes) -> Refusal | None:
    """Return the refusal of the first byte that is zero or not UTF-8; None if all are valid."""
    for number, line in enumerate(content.split(b"\n"), 1):
        valid = line.decode("utf-8", errors="replace").split("\0")[0].split("\ufffd")[0].encode()
        if len(valid) < len(line):
            return Refusal("data.not_utf8", path, number, byte=len(valid))
    return None
