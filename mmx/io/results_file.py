"""A results file: JSON lines that are appended one by one, and continued by the next run of the same command.

    captions.jsonl            one JSON object a line, appended with one write each
    captions.jsonl.run.json   the command, the model and the options; a run with others is refused

A process that is killed leaves whole lines, and at most one torn line, which the next run cuts off. A row is identified
by its inputs (`row_id`), not by its position, so rows may come in any order, and from several runs. Rows are strict
JSON without NaN, and contain no character that moves the cursor of a terminal.
"""

from __future__ import annotations

import json
import os
import re
import stat
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from mmx.errors import MmxError
from mmx.io.atomic import atomic_write, atomic_write_text
from mmx.io.file_lock import open_locked

Fields = Mapping[str, object]

RESULT_FIELDS = frozenset(
    {"caption", "captions", "answer", "answers", "score", "scores", "probability", "unmet", "error"}
)  # the other fields of a row are its inputs
# Further results of models that read audio; of all others these are fields of the input's list.
SPEECH_FIELDS = frozenset({"windows", "language", "language_score", "task", "no_speech_prob"})
ID_FIELDS = ("id", "question_id")
_IDENTIFYING_FIELDS = (*ID_FIELDS, "question", "box", "input")  # input: a path that no source reads
_EARLIER_OPTIONS: Fields = {"sidecars": []}  # values of options that run files of earlier versions do not have
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029]")  # valid in JSON, but terminals and line readers interpret them
_REMEDY = "type --overwrite to start again, or choose another --out."


def row_id(fields: Fields, sources: Collection[str], results: Collection[str] = RESULT_FIELDS) -> str:
    """Return what identifies a row: all fields but the results; with an id only the id, inputs, question and box.

    An id alone does not identify a row: two lists may both start with 0. sources: the names that inputs may have;
    results: those of the fields that are results.
    """
    known = {name: value for name, value in fields.items() if name not in results}
    if any(fields.get(name) is not None for name in ID_FIELDS):
        known = {name: known[name] for name in (*_IDENTIFYING_FIELDS, *sources) if known.get(name) is not None}
    return json.dumps(known, sort_keys=True)


def hash_id(text: str) -> int:
    """Return a hash of 64 bits, equal on every machine. A collision among ten million has a chance of 1 in 400,000."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def row_line(fields: Fields) -> str:
    """Return a row as a line of a file. Raises ValueError for NaN and infinities."""
    line = json.dumps(fields, ensure_ascii=False, allow_nan=False)
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", line) + "\n"


def is_stream(out: Path) -> bool:
    """Return whether a path is a device or a pipe, which is written to, and neither continued nor replaced."""
    try:
        mode = out.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def output_files(out: Path | None) -> tuple[Path, ...]:
    """Return the files that a run with this --out writes; none for a stream, or for None."""
    if out is None or is_stream(out):
        return ()
    path = Path(os.path.realpath(out))
    return path, _run_file(path)


class ResultsFile:
    """An open results file. `num_errors`: how many error rows it had when it was opened."""

    def __init__(
        self, file: BinaryIO, path: Path, run: Fields, sources: Collection[str], results: Collection[str]
    ) -> None:
        self._file = file
        self._path = path
        self._run = run
        self._sources = sources
        self._results = results
        self._ids: set[int] = set()
        self._overwrite = False
        self.num_errors = 0

    def overwrite(self) -> None:
        """Start again with the next row; until then the file keeps its content."""
        self._overwrite = True

    def continue_rows(self, out: Path) -> None:
        """Add the ids of the rows in the file, and count its errors."""
        _write_run_file(self._path, self._run)
        for _, row in _read_rows(self._file, out):
            self.add_id(row)
            self.num_errors += "error" in row

    def add_id(self, fields: Fields) -> bool:
        """Return whether a row is new: neither in the file nor added before. From now on it is not."""
        number = hash_id(row_id(fields, self._sources, self._results))
        is_new = number not in self._ids
        self._ids.add(number)
        return is_new

    def has_id(self, fields: Fields) -> bool:
        """Return whether a row is in the file or was added."""
        return hash_id(row_id(fields, self._sources, self._results)) in self._ids

    def write(self, fields: Fields) -> None:
        """Append a row, the whole line or nothing of it."""
        if self._overwrite:  # a file without a run file is refused, one with that of another run would be accepted
            _run_file(self._path).unlink(missing_ok=True)
            self._file.truncate(0)
        end = self._file.seek(0, os.SEEK_END)
        try:
            _write_all(self._file, fields)
        except OSError:
            with suppress(OSError):
                self._file.truncate(end)
            raise
        if self._overwrite:
            _write_run_file(self._path, self._run)
            self._overwrite = False


class _Stream(ResultsFile):
    """A device or a pipe: every row is written."""

    def has_id(self, fields: Fields) -> bool:
        return False

    def add_id(self, fields: Fields) -> bool:
        return True

    def write(self, fields: Fields) -> None:
        _write_all(self._file, fields)


@contextmanager
def open_results_file(
    out: Path,
    run: Fields,
    sources: Collection[str],
    overwrite: bool = False,
    retry_errors: bool = False,
    result_fields: Collection[str] = RESULT_FIELDS,
) -> Iterator[ResultsFile]:
    """Open a results file to continue it, or a stream.

    Args:
        out: the file, which need not exist.
        run: what all runs that write this file have in common: the command, the model, the options.
        sources: the names under which a row has its inputs (see `row_id`).
        overwrite: start again; an older file stays until the first row is written.
        retry_errors: remove error rows first, so that their inputs are new.
        result_fields: the fields of a row that are results.

    Raises:
        OSError: the file cannot be read or written.
        MmxError: another program or other options made the file, or another process writes it.
    """
    if is_stream(out):  # before links are resolved: /dev/stdout may be a link to a pipe without a path
        with open(out, "wb", buffering=0) as stream:
            yield _Stream(stream, out, run, sources, result_fields)
        return
    path = out.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if retry_errors and not overwrite and path.is_file():
        _remove_error_rows(path, out, run)
    with _open_locked(path, out) as file:
        results = ResultsFile(file, path, run, sources, result_fields)
        if overwrite and path.stat().st_size:
            results.overwrite()
        else:
            _check_and_repair(file, path, out, run)
            results.continue_rows(out)
        yield results
        os.fsync(file.fileno())


# ---- opening ---------------------------------------------------------------------------------------------------


@contextmanager
def _open_locked(path: Path, out: Path) -> Iterator[BinaryIO]:
    """Open a file for unbuffered appending with an exclusive lock. Raises MmxError if another process holds it."""
    file = open_locked(path)
    if file is None:
        raise _locked_error(out)
    with file:
        yield file


def _locked_error(out: Path) -> MmxError:
    message = f"{out} is being written by another process; wait for it, or choose another --out."
    return MmxError(message, code="results.locked", path=str(out))


def _check_and_repair(file: BinaryIO, path: Path, out: Path, run: Fields) -> None:
    """Check that the same command made the file, and cut off a torn line. Raises MmxError."""
    if file.seek(0, os.SEEK_END):
        _check_run_file(path, out, run)
    _cut_torn_line(file)


def _remove_error_rows(path: Path, out: Path, run: Fields) -> None:
    with _open_locked(path, out) as file:
        _check_and_repair(file, path, out, run)
        with atomic_write(path) as temporary, temporary.open("wb") as remaining:
            for line, row in _read_rows(file, out):
                if "error" not in row:
                    remaining.write(line)


# ---- lines -----------------------------------------------------------------------------------------------------


def _write_all(file: BinaryIO, fields: Fields) -> None:
    line = memoryview(row_line(fields).encode(errors="backslashreplace"))
    while line:  # a pipe or a disk that is almost full takes a part
        line = line[file.write(line) :]


def _cut_torn_line(file: BinaryIO) -> None:
    """Truncate the file after its last line break, which is searched backwards one mebibyte at a time."""
    size = file.seek(0, os.SEEK_END)
    start = size
    found = -1
    while start and found < 0:
        stop = start
        start = max(0, start - 2**20)
        file.seek(start)
        found = file.read(stop - start).rfind(b"\n")
    if start + found + 1 < size:
        file.truncate(start + found + 1)


def _read_rows(file: BinaryIO, out: Path) -> Iterator[tuple[bytes, dict[str, object]]]:
    """Yield each line with its row. Blank lines and a byte order mark are skipped. Raises MmxError for other lines."""
    file.seek(0)
    with open(file.fileno(), "rb", closefd=False) as lines:
        for number, line in enumerate(lines, 1):
            text = line.removeprefix(BOM_UTF8) if number == 1 else line
            if text.strip():
                yield text, _parse_row(text, out, number)


def _parse_row(text: bytes, out: Path, number: int) -> dict[str, object]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not row:
        message = (
            f"{out}:{number} is not a JSON object with fields; correct or delete the line, or choose another --out."
        )
        raise MmxError(message, code="results.line", path=str(out), line=number)
    return row


# ---- the run file ----------------------------------------------------------------------------------------------


def _check_run_file(path: Path, out: Path, run: Fields) -> None:
    """Raise MmxError if the run file is missing, or another command, model or other options made the results."""
    try:
        previous = json.loads(_run_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        previous = None
    if not isinstance(previous, dict):
        message = f"{out} exists, and no {_run_file(path).name} says which command made it; {_REMEDY}"
        raise MmxError(message, code="results.unknown_run", path=str(out))
    differences = list(_differences({**_EARLIER_OPTIONS, **previous}, json.loads(json.dumps(run))))
    if differences:
        old = ", ".join(f"{name} {_short(was)}" for name, was, _ in differences[:3])
        new = ", ".join(f"{name} {_short(now)}" for name, _, now in differences[:3])
        names = [name for name, _, _ in differences]
        message = f"{out} was made with {old}, and this run has {new}; {_REMEDY}"
        raise MmxError(message, code="results.other_run", path=str(out), differences=names)


def _differences(previous: Fields, run: Fields) -> Iterator[tuple[str, object, object]]:
    """Yield (name, old value, new value) of fields that both have: options are added from version to version.

    Equal weights are the same model under any name.
    """
    same_weights = run.get("weights") is not None and run.get("weights") == previous.get("weights")
    for name in sorted(previous.keys() & run.keys()):
        was = previous[name]
        now = run[name]
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now)
        elif was != now and not (name == "model" and same_weights):
            yield name, was, now


def _short(value: object) -> str:
    return json.dumps(value)[:60]


def _run_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.run.json")


def _write_run_file(path: Path, run: Fields) -> None:
    atomic_write_text(_run_file(path), json.dumps(run, indent=2) + "\n")
