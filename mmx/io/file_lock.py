"""Exclusive locks on files: one process at a time writes a results file, a run folder, or the sidecars of an image.

The operating system releases a lock when the process ends, however it ends.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_MAX_OPEN_ATTEMPTS = 100  # each fails if another process replaced the file at that moment
_LOCKED_BYTE = 2**40  # Windows locks bytes, and others could not read a locked one; this one is beyond any content


def open_locked(path: Path) -> BinaryIO | None:
    """Open a file for unbuffered appending with an exclusive lock; None if another process holds the lock.

    A disk without locks is used without them. Raises OSError if the file cannot be opened.
    """
    for _ in range(_MAX_OPEN_ATTEMPTS):
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 - the caller closes it
        try:
            if not _lock(file):
                file.close()
                return None
            if _is_at(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
    return None


def _lock(file: BinaryIO) -> bool:
    """Lock a file without waiting; return False if another process holds the lock."""
    try:
        if sys.platform == "win32":
            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the second on Windows
        return False
    except OSError:  # no locks on this disk
        pass
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still is the one at its path. Another process may have replaced it before it was locked."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is only opened for reading; wait while another process holds it.

    A disk without locks is used without them. Raises OSError if the file cannot be opened.
    """
    with open(path, "rb") as file:
        with suppress(OSError):
            _wait_for_lock(file)
        yield


def _wait_for_lock(file: BinaryIO) -> None:
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX)
        return
    while not _lock(file):
        time.sleep(0.01)
