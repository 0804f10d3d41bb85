"""Tar archives in the layout of WebDataset (Aizman et al. 2019): the members of a sample differ in their suffix only.

An image or audio file is the input of a sample, `.txt` is its caption, and `.json` has fields of a manifest line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from mmx.data.json_fields import JsonObject, RecordLocation, check_utf8_line, parse_line
from mmx.data.records import Record
from mmx.data.skipped import SkippedRecords
from mmx.errors import DataError
from mmx.io import audio, images
from mmx.io.tar import TarMember, is_compressed, is_tar, read_tar, split_sample_name

SOURCES = {**dict.fromkeys(images.SUFFIXES, "image"), **dict.fromkeys(audio.SUFFIXES, "audio")}  # by suffix
TEXT_SUFFIXES = (".txt", ".caption", ".json")
TEXT_FIELDS = {"caption", "captions", "question"}
MAX_TEXT_BYTES = 2**20


def find_archives(path: Path) -> list[Path]:
    """Return the archives of a data set: the file itself, or the sorted tar files in a folder."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if is_tar(file.name) and not file.name.startswith("."))


def read_webdataset(path: Path) -> Iterator[Record]:
    """Yield the samples of an archive, or of all in a folder, in order; inputs are read when they are needed.

    A sample without an input has no field of it. Raises DataError for a compressed archive: its members cannot be read
    in any order.
    """
    for archive in find_archives(path):
        if is_compressed(archive.name):
            message = f"{archive} is compressed, and its members cannot be read in any order; decompress it to a .tar."
            raise DataError(message, code="data.compressed_archive", path=str(archive))
        yield from _read_samples(str(archive))


def complete_samples(records: Iterable[Record], skipped: SkippedRecords) -> Iterator[Record]:
    """Yield the samples that have an input and a text; the others are reported as skipped."""
    for record in records:
        if isinstance(record.fields, DataError):
            yield record
        elif not record.fields.keys() & set(SOURCES.values()):
            skipped.add(record.location, "the sample has no image")
        elif not record.fields.keys() & TEXT_FIELDS:
            skipped.add(record.location, "the sample has no text")
        else:
            yield record


def _read_samples(path: str) -> Iterator[Record]:
    key: str | None = None
    members: list[TarMember] = []
    for member in read_tar(path, _is_member, audio.MAX_BYTES, is_stored=lambda name: _source_of(name) is not None):
        if member.name == "":  # the archive is damaged from here on
            break
        member_key = split_sample_name(member.name)[0]
        if member_key != key and members:
            yield _sample(path, members)
            members = []
        key = member_key
        members.append(member)
    else:
        member = None
    if members:
        yield _sample(path, members)
    if member is not None and isinstance(member.data, DataError):
        yield Record(RecordLocation(path), member.data)


def _source_of(name: str) -> str | None:
    return SOURCES.get(split_sample_name(name)[1])


def _is_member(name: str) -> bool:
    suffix = split_sample_name(name)[1]
    return suffix in TEXT_SUFFIXES or suffix in SOURCES


def _sample(path: str, members: list[TarMember]) -> Record:
    """Return the members of one sample as fields, or the first error."""
    location = RecordLocation(path, record=f"sample {split_sample_name(members[0].name)[0]}")
    fields: JsonObject = {}
    try:
        for member in members:
            for name, value in _member_fields(member, location).items():
                if name in fields and fields[name] != value:
                    message = f"has several values of {name!r}; give each sample a name of its own."
                    raise location.error("repeated_key", message, key=name)
                fields[name] = value
    except DataError as error:
        return Record(location, error)
    return Record(location, fields)


def _member_fields(member: TarMember, location: RecordLocation) -> JsonObject:
    if isinstance(member.data, DataError):
        raise member.data
    source = _source_of(member.name)
    if source is not None:
        return {source: member.data}
    if not isinstance(member.data, bytes) or len(member.data) > MAX_TEXT_BYTES:
        message = f"has {member.name!r} of over {MAX_TEXT_BYTES // 2**20} MB; expected a text, write a shorter one."
        raise location.error("text_too_large", message, member=member.name)
    text = member.data.decode("utf-8-sig", "surrogateescape")
    if member.name.lower().endswith(".json"):
        return parse_line(location, text, finite=False)
    check_utf8_line(location, text)
    return {"caption": text.strip()} if text.strip() else {}
