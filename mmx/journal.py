"""A file of results that grows line by line and goes on where it stopped: each id is in it once, each line whole.

    captions.jsonl            one JSON object a line, appended with one write each
    captions.jsonl.run.json   what made it: the command, the model, the options; going on with another is refused

A process that is killed leaves whole lines, and at most one torn one, which is cut off when the next one starts. A row
is known by what was asked (`row_key`), not by its place, so rows may be made in any order, and by several runs.
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from heapq import merge
from pathlib import Path
from typing import Any, BinaryIO

from mmx.errors import MmxError
from mmx.files import replacing

RESULTS = {"caption", "answer", "score", "error"}  # what was found; the rest of a row is what was asked
IDS = ("id", "question_id")  # a row that has one is known by it, with its question, if any
_FRESH = 65_536  # ids that wait to be sorted in


def row_key(facts: Mapping[str, Any]) -> str:
    """By what a row is known: its id where it has one, else its inputs; and its question and box."""
    named = {name: facts[name] for name in (*IDS, "question", "box") if facts.get(name) is not None}
    if not any(name in named for name in IDS):
        named = {name: value for name, value in facts.items() if name not in RESULTS}
    return json.dumps(named, sort_keys=True)


def number_of(key: str) -> int:
    """64 bits of a key's hash, the same on every machine; of ten million keys two are equal once in 400,000 times."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Known:
    """A set of 64-bit numbers that takes 8 bytes for each."""

    def __init__(self) -> None:
        self.sorted, self.fresh = array("Q"), set[int]()

    def __contains__(self, number: int) -> bool:
        place = bisect_left(self.sorted, number)
        return number in self.fresh or (place < len(self.sorted) and self.sorted[place] == number)

    def add(self, number: int) -> None:
        """One more; it must not be there already."""
        self.fresh.add(number)
        if len(self.fresh) >= _FRESH:
            self.sorted, self.fresh = array("Q", merge(self.sorted, sorted(self.fresh))), set()


class Journal:
    """An open file of results. `errors`: how many rows of errors it held when it was opened."""

    def __init__(self, file: BinaryIO, known: Known, errors: int = 0) -> None:
        self.file, self.known, self.errors = file, known, errors

    def takes(self, facts: Mapping[str, Any]) -> bool:
        """Whether what is asked is not in the file yet, nor was taken before; from now on it is."""
        number = number_of(row_key(facts))
        if number in self.known:
            return False
        self.known.add(number)
        return True

    def write(self, facts: Mapping[str, Any]) -> None:
        """Append a row, whole or not at all."""
        line = memoryview(_line(facts))
        begun = self.file.seek(0, os.SEEK_END)
        try:
            while line:  # once, but on a disk that is nearly full
                line = line[self.file.write(line) :]
        except OSError:
            with suppress(OSError):
                self.file.truncate(begun)
            raise


class _Stream(Journal):
    """A device or a pipe: rows go by, and none is remembered."""

    def takes(self, facts: Mapping[str, Any]) -> bool:
        return True

    def write(self, facts: Mapping[str, Any]) -> None:
        self.file.write(_line(facts))


class _Fresh(Journal):
    """A journal beside an older file, whose place it takes with its first row."""

    def __init__(self, file: BinaryIO, waiting: Path, place: Path, note: str) -> None:
        super().__init__(file, Known())
        self.waiting: Path | None = waiting
        self.place, self.note = place, note

    def write(self, facts: Mapping[str, Any]) -> None:
        super().write(facts)
        if self.waiting is not None:
            # In this order: a file without its note is refused, one with the note of another run would be believed.
            _note_of(self.place).unlink(missing_ok=True)
            os.replace(self.waiting, self.place)
            _write_note(self.place, self.note)
            self.waiting = None


@contextmanager
def open_journal(
    out: Path, made: Mapping[str, Any], overwrite: bool = False, retry_errors: bool = False
) -> Iterator[Journal]:
    """The results of `out`, to be gone on with; `made` is what a run must have in common with those before.

    overwrite: start anew; the older file stays until there is a first row. retry_errors: rows of errors are taken out,
    so that what they asked is asked again. Raises OSError, and MmxError for a file that something else made, or that
    another process writes at this moment.
    """
    place = out.resolve()  # through a link: what it points at grows
    note = json.dumps(made, indent=2) + "\n"
    if place.exists() and not (place.is_file() or place.is_dir()):
        with open(place, "wb", buffering=0) as stream:
            yield _Stream(stream, Known())
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if overwrite and place.is_file() and place.stat().st_size:
        with _replaced(place, out, note) as fresh:
            yield fresh
        return
    if retry_errors and place.is_file():
        _take_errors_out(place, out, json.loads(note))
    with _locked(place, out) as file:
        _go_on(file, place, out, json.loads(note))
        _write_note(place, note)
        yield Journal(file, *_read_rows(file, out))
        os.fsync(file.fileno())


@contextmanager
def _replaced(place: Path, out: Path, note: str) -> Iterator[Journal]:
    waiting = place.with_name(f".{place.name}.new")
    with _locked(place, out), _locked(waiting, out) as file:
        file.truncate(0)
        try:
            yield _Fresh(file, waiting, place, note)
            os.fsync(file.fileno())
        finally:
            waiting.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[BinaryIO]:
    """A file to append to, without a buffer, that no other process opens this way at the same time."""
    with open(path, "ab+", buffering=0) as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MmxError(
                f"{out} is being written by another process; wait for it, or choose another --out."
            ) from None
        except (ImportError, OSError):  # no locks on this system, or on this disk
            pass
        yield file


def _go_on(file: BinaryIO, place: Path, out: Path, made: dict[str, Any]) -> None:
    """Make an older file one that can be gone on with. Raises MmxError where something else made it."""
    if file.seek(0, os.SEEK_END):
        _check_note(place, out, made)
    _cut_torn_line(file)


def _cut_torn_line(file: BinaryIO) -> None:
    """Cut off what follows the last end of a line, looking for it a mebibyte at a time."""
    start = end = file.seek(0, os.SEEK_END)
    found = -1
    while start and found < 0:
        stop, start = start, max(0, start - 2**20)
        file.seek(start)
        found = file.read(stop - start).rfind(b"\n")
    if start + found + 1 < end:
        file.truncate(start + found + 1)


def _rows(file: BinaryIO, out: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line with its row. Raises MmxError for a line that is none."""
    file.seek(0)
    with open(file.fileno(), "rb", closefd=False) as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise MmxError(f"{out}:{number} is no JSON object; mend or delete the line, or choose another --out.")
            yield line, row


def _read_rows(file: BinaryIO, out: Path) -> tuple[Known, int]:
    """What is asked in the file, and how many of its rows are errors."""
    known, errors = Known(), 0
    for _, row in _rows(file, out):
        number = number_of(row_key(row))
        if number not in known:
            known.add(number)
        errors += "error" in row
    return known, errors


def _take_errors_out(place: Path, out: Path, made: dict[str, Any]) -> None:
    """Put the rows that are no errors in the file's place, at once."""
    with _locked(place, out) as file:
        _go_on(file, place, out, made)
        with replacing(place) as temporary, temporary.open("wb") as kept:
            kept.writelines(line for line, row in _rows(file, out) if "error" not in row)


def _check_note(place: Path, out: Path, made: dict[str, Any]) -> None:
    """Raise MmxError where the note beside a file is missing, or is not that of this run."""
    remedy = "type --overwrite to start anew, or choose another --out."
    try:
        note = json.loads(_note_of(place).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        note = None
    if not isinstance(note, dict):
        raise MmxError(f"{out} is there already and no {_note_of(place).name} says what made it; {remedy}")
    if differences := list(_differences(note, made)):
        was, now = (", ".join(sides) for sides in zip(*differences[:3], strict=True))
        raise MmxError(f"{out} was made with {was}, and this run has {now}; {remedy}")


def _differences(note: Mapping[str, Any], made: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What differs, as told of the one and of the other; equal weights are the same model under any name. A fact that
    only one of them knows is not compared: options are added from one version to the next."""
    same_weights = made.get("weights") is not None and made.get("weights") == note.get("weights")
    for name in note.keys() & made.keys():
        was, now = note[name], made[name]
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now)
        elif was != now and not (name == "model" and same_weights):
            yield f"{name} {_shown(was)}", f"{name} {_shown(now)}"


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


def _note_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.run.json")


def _write_note(place: Path, note: str) -> None:
    with replacing(_note_of(place)) as temporary:
        temporary.write_text(note, encoding="utf-8")


def _line(facts: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(facts, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace")
