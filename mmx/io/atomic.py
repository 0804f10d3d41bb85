"""Atomic replacement of files, folders and symbolic links: a reader finds the old content or the new, never a mixture.

New content is written under a temporary name in the same folder, flushed to the disk, and renamed. An error, or a
process that is killed, leaves the old content as it was.

A folder that is not empty cannot be renamed over. It is renamed to a backup first, then the new one is renamed into
place; `folder_or_backup` finds the backup if the process was killed between the two renames.
"""

import glob
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_TEMPORARY = re.compile(r"\..*\.(?P<pid>[0-9]{1,9})\.tmp(\.[^.]*)?")
_MIN_STALE_SECONDS = 60


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the block it replaces `path`. Missing folders are made.

    The temporary path has the suffix of `path`, from which some libraries choose the format. Raises OSError.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush_file(temporary)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def atomic_write_text(path: Path, text: str) -> None:
    """Replace the content of a file by a text in UTF-8. Raises OSError."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of a file, whose permissions are kept. Raises OSError."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
        if path.exists():
            shutil.copymode(path, temporary)


def remove_stale_temporary(path: Path) -> None:
    """Remove a file if `atomic_write` made it in a process that no longer runs.

    One that is younger than a minute stays: the process may run on another machine that shares the disk.
    """
    match = _TEMPORARY.fullmatch(path.name)
    if match is None or _is_running(int(match["pid"])):
        return
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _MIN_STALE_SECONDS:
            path.unlink()


@contextmanager
def atomic_text_writer(path: Path) -> Iterator[TextIO]:
    """Yield a text file in UTF-8; at the end of the block it replaces `path`, or the target of the link `path`.

    A device or a pipe cannot be replaced and is written to directly. Raises OSError.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        return
    with (
        atomic_write(path.resolve()) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        yield file


def atomic_symlink(link: Path, target: Path) -> None:
    """Make `link` point to `target`, relative to the folder of the link, replacing an older link. Raises OSError."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.relative_to(link.parent))
    os.replace(temporary, link)


@contextmanager
def atomic_write_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; at the end of the block it replaces `folder`. Raises OSError.

    Temporary folders of processes that no longer run are removed.
    """
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_temporaries(folder)
        temporary.mkdir()
        yield temporary
        _flush_tree(temporary)
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def folder_or_backup(folder: Path) -> Path:
    """Return the backup of a folder if only the backup exists, as after a kill between two renames; else the folder."""
    backup = _backup_path(folder.resolve())
    return backup if backup.is_dir() and not folder.exists() else folder


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; an older folder becomes the backup first and is removed at the end."""
    backup = _backup_path(folder)
    if folder.exists():
        shutil.rmtree(backup, ignore_errors=True)  # of a process that was killed before it could remove it
        os.rename(folder, backup)
    try:
        os.rename(temporary, folder)
    except OSError:
        if backup.exists():
            os.rename(backup, folder)
        raise
    _flush_folder(folder.parent)
    shutil.rmtree(backup, ignore_errors=True)


def _backup_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _remove_stale_temporaries(folder: Path) -> None:
    """Remove temporary folders of this folder that were left by processes which no longer run."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid == str(os.getpid()) or (pid.isdecimal() and not _is_running(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere, os.kill(pid, 0) would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _flush_tree(folder: Path) -> None:
    """Flush every file and folder in and below a folder to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _flush_folder(path)
        else:
            _flush_file(path)


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
