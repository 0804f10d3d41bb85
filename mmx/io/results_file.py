"""A file of results that grows line by line and goes on where it stopped: each id is in it once, each line whole.

    captions.jsonl            one JSON object a line, appended with one write each
    captions.jsonl.run.json   what made it: the command, the model, the options; going on with another is refused

A process that is killed leaves whole lines, and at most one torn one, which is cut off when the next one starts. A row
is known by what was asked (`row_key`), not by its place, so rows may be made in any order, and by several runs. Rows
are JSON without exception: no NaN, and nothing in them that would move the cursor of a terminal.
"""

from __future__ import annotations

import json
import os
import re
import stat
from array import array
from bisect import bisect_left
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from heapq import merge
from pathlib import Path
from typing import Any, BinaryIO

from mmx.errors import MmxError
from mmx.io.atomic import atomic_write

RESULTS = {"caption", "answer", "score", "error"}  # what was found; the rest of a row is what was asked
IDS = ("id", "question_id")  # a row that has one is known by it, its inputs, its question and its box alone
_ASKED = (*IDS, "question", "box", "input")  # input: what no source was found for
_FRESH = 65_536  # ids that wait to be sorted in
_TRIES = 100  # times that a file is opened again because another took its place meanwhile
_UNSEEN = re.compile("[\x7f-\x9f\u2028\u2029]")  # JSON may hold them as they are; terminals and line readers stumble


def row_id(facts: Mapping[str, Any], sources: Collection[str]) -> str:
    """By what a row is known: all that was asked; where it has an id, only that, its inputs, its question and its box.

    sources: the names under which a row may have inputs. An id alone is not enough: two lists may both begin with 0.
    """
    asked = {name: value for name, value in facts.items() if name not in RESULTS}
    if any(facts.get(name) is not None for name in IDS):
        asked = {name: asked[name] for name in (*_ASKED, *sources) if asked.get(name) is not None}
    return json.dumps(asked, sort_keys=True)


def number_of(key: str) -> int:
    """64 bits of a key's hash, the same on every machine; of ten million keys two are equal once in 400,000 times."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def row_line(facts: Mapping[str, Any]) -> str:
    """A row as the line of a file, its end with it; what would move the cursor of a terminal is written as \\u0000.

    Raises ValueError for numbers that JSON has not.
    """
    line = json.dumps(facts, ensure_ascii=False, allow_nan=False)
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n"


def is_stream(out: Path) -> bool:
    """Whether this is a device or a pipe, which is written to and neither replaced nor gone on with."""
    try:
        mode = out.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def files_of(out: Path | None) -> tuple[Path, ...]:
    """What a run with this --out writes: the file and the note beside it; nothing for a stream, or for None."""
    if out is None or is_stream(out):
        return ()
    place = Path(os.path.realpath(out))
    return place, _note_of(place)


class SeenIds:
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


class ResultsFile:
    """An open file of results. `errors`: how many rows of errors it held when it was opened."""

    def __init__(self, file: BinaryIO, sources: Collection[str], known: SeenIds, errors: int = 0) -> None:
        self.file, self.sources, self.known, self.errors = file, sources, known, errors

    def takes(self, facts: Mapping[str, Any]) -> bool:
        """Whether what is asked is not in the file yet, nor was taken before; from now on it is."""
        number = number_of(row_id(facts, self.sources))
        if number in self.known:
            return False
        self.known.add(number)
        return True

    def write(self, facts: Mapping[str, Any]) -> None:
        """Append a row, whole or not at all."""
        line = memoryview(row_line(facts).encode(errors="backslashreplace"))
        begun = self.file.seek(0, os.SEEK_END)
        try:
            while line:  # once, but on a disk that is nearly full
                line = line[self.file.write(line) :]
        except OSError:
            with suppress(OSError):
                self.file.truncate(begun)
            raise


class _Stream(ResultsFile):
    """A device or a pipe: rows go by, and none is remembered."""

    def takes(self, facts: Mapping[str, Any]) -> bool:
        return True

    def write(self, facts: Mapping[str, Any]) -> None:
        line = memoryview(row_line(facts).encode(errors="backslashreplace"))
        while line:  # a pipe that is nearly full takes a part
            line = line[self.file.write(line) :]


class _Fresh(ResultsFile):
    """A journal beside an older file, whose place it takes with its first row."""

    def __init__(self, file: BinaryIO, sources: Collection[str], waiting: Path, place: Path, note: str) -> None:
        super().__init__(file, sources, SeenIds())
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
def open_results_file(
    out: Path,
    made: Mapping[str, Any],
    sources: Collection[str],
    overwrite: bool = False,
    retry_errors: bool = False,
) -> Iterator[ResultsFile]:
    """The results of `out`, to be gone on with; `made` is what a run must have in common with those before.

    sources: the names under which rows have their inputs (see `row_key`). overwrite: start anew; the older file stays
    until there is a first row. retry_errors: rows of errors are taken out, so that what they asked is asked again.
    Raises OSError, and MmxError for a file that something else made, or that another process writes at this moment.
    """
    if is_stream(out):  # before links are resolved: that of /dev/stdout may lead to a pipe, which has no place
        with open(out, "wb", buffering=0) as stream:
            yield _Stream(stream, sources, SeenIds())
        return
    place = out.resolve()  # through a link: what it points at grows
    note = json.dumps(made, indent=2) + "\n"
    place.parent.mkdir(parents=True, exist_ok=True)
    if overwrite and place.is_file() and place.stat().st_size:
        with _replaced(place, out, sources, note) as fresh:
            yield fresh
        return
    if retry_errors and place.is_file():
        _take_errors_out(place, out, json.loads(note))
    with _locked(place, out) as file:
        _go_on(file, place, out, json.loads(note))
        _write_note(place, note)
        yield ResultsFile(file, sources, *_read_rows(file, out, sources))
        os.fsync(file.fileno())


@contextmanager
def _replaced(place: Path, out: Path, sources: Collection[str], note: str) -> Iterator[ResultsFile]:
    waiting = place.with_name(f".{place.name}.new")
    with _locked(place, out), _locked(waiting, out) as file:
        file.truncate(0)
        try:
            yield _Fresh(file, sources, waiting, place, note)
            os.fsync(file.fileno())
        finally:
            waiting.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[BinaryIO]:
    """A file to append to, without a buffer, that no other process opens this way at the same time."""
    for _ in range(_TRIES):
        with open(path, "ab+", buffering=0) as file:
            _lock(file, out)
            if _is_at(file, path):
                yield file
                return
    raise _busy(out)


def _lock(file: BinaryIO, out: Path) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(out) from None
    except (ImportError, OSError):  # no locks on this system, or on this disk
        pass


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether a file is still the one at its path: between opening and locking, another run may have replaced it, and
    what is appended to the one that it was would be lost."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _busy(out: Path) -> MmxError:
    return MmxError(f"{out} is being written by another process; wait for it, or choose another --out.")


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
    """Each line with its row; blank lines, and the mark that some editors begin a file with, are passed over. Raises
    MmxError for a line that is no row."""
    file.seek(0)
    with open(file.fileno(), "rb", closefd=False) as lines:
        for number, line in enumerate(lines, 1):
            text = line.removeprefix(BOM_UTF8) if number == 1 else line
            if text.strip():
                yield text, _row(text, f"{out}:{number}")


def _row(text: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not row:
        what = "an empty" if row == {} else "no"
        raise MmxError(f"{where} is {what} JSON object; mend or delete the line, or choose another --out.")
    return row


def _read_rows(file: BinaryIO, out: Path, sources: Collection[str]) -> tuple[SeenIds, int]:
    """What is asked in the file, and how many of its rows are errors."""
    known, errors = SeenIds(), 0
    for _, row in _rows(file, out):
        number = number_of(row_id(row, sources))
        if number not in known:
            known.add(number)
        errors += "error" in row
    return known, errors


def _take_errors_out(place: Path, out: Path, made: dict[str, Any]) -> None:
    """Put the rows that are no errors in the file's place, at once."""
    with _locked(place, out) as file:
        _go_on(file, place, out, made)
        with atomic_write(place) as temporary, temporary.open("wb") as kept:
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
    with atomic_write(_note_of(place)) as temporary:
        temporary.write_text(note, encoding="utf-8")
