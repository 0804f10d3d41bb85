"""A redo log of one row: what a killed process had begun to write is completed by the next one.

A row and its sidecars are several files. They are noted in another file first:

    captions.jsonl.pending    a line for each row: the row, and each sidecar with its new content and a hash of the old

Only the last line counts, if it is whole. Lines are appended, which takes less time than to replace the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from mmx.errors import DataError
from mmx.io.file_lock import hold_lock
from mmx.io.results_file import ResultsFile
from mmx.io.sidecars import SidecarChange

Fields = Mapping[str, object]

_FIELDS = {"image", "row", "sidecars"}
_MAX_BYTES = 2**20  # then the file starts again


class PendingRow:
    """The redo log of a results file, whose lock the process holds."""

    def __init__(self, results: ResultsFile, out: Path) -> None:
        self._results = results
        path = Path(os.path.realpath(out))
        self._path = path.with_name(f"{path.name}.pending")
        self._file: BinaryIO | None = None

    def note(self, image: Path, fields: Fields, changes: Sequence[SidecarChange]) -> None:
        """Note the row and the sidecars of an image before they are written. Raises OSError.

        The note is not flushed to the disk: the system keeps what a killed process has written.
        """
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
        if self._file.tell() > _MAX_BYTES:
            self._file.truncate(0)
        sidecars = [_as_dict(change) for change in changes]
        line = json.dumps({"image": os.path.abspath(image), "row": fields, "sidecars": sidecars})
        self._file.write(f"\n{line}\n".encode())  # the first line break ends a torn line

    def discard(self) -> None:
        """Remove the note: all that it has is written."""
        if self._file is not None:
            self._file.close()
            self._file = None
        with suppress(OSError):
            self._path.unlink()

    def complete(self) -> None:
        """Write what an earlier process noted and did not write: its row, and sidecars that were not changed since.

        If that fails, the image is processed again.
        """
        noted = self._read()
        if noted is not None and not self._results.has_id(noted["row"]) and _apply(noted):
            self._results.add_id(noted["row"])
            self._results.write(noted["row"])
        self.discard()

    def _read(self) -> dict[str, Any] | None:
        """Return the last note; None if there is none, or if the process was killed while it noted a row."""
        try:
            content = self._path.read_bytes()
            noted = json.loads(content.splitlines()[-1]) if content.endswith(b"\n") else None
        except (OSError, ValueError, IndexError):
            return None
        return noted if isinstance(noted, dict) and noted.keys() == _FIELDS else None


def _apply(noted: Mapping[str, Any]) -> bool:
    """Write the sidecars of an image. Returns whether that succeeded."""
    try:
        with hold_lock(Path(noted["image"])):
            for sidecar in noted["sidecars"]:
                _apply_unchanged(sidecar)
    except (OSError, DataError):
        return False
    return True


def _apply_unchanged(noted: Mapping[str, str]) -> None:
    """Write a sidecar that still has its old content. Raises OSError and DataError."""
    path = Path(noted["path"])
    content = path.read_bytes() if path.exists() else None
    if _digest(content) == noted["before"]:
        SidecarChange(path, content, noted["content"].encode()).apply()


def _as_dict(change: SidecarChange) -> Fields:
    return {
        "path": os.path.abspath(change.path),
        "before": _digest(change.before),
        "content": change.content.decode("utf-8"),
    }


def _digest(content: bytes | None) -> str | None:
    return None if content is None else blake2b(content, digest_size=16).hexdigest()
