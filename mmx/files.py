"""Files: what stands in the folders that a person names, and how the bytes of one are read, or why they are not.

The doors of pictures and of sounds share what can be wrong with any file: a Refusal of some kind, the reason in words,
and what the sentence calls the thing.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from mmx.errors import DataError

_ADDRESS = re.compile(r"data:|[a-z][a-z0-9+.-]+://?", re.IGNORECASE)


class Refusal(Exception):  # noqa: N818 - no error yet: the door that catches it knows the name of the thing
    """Stops the reading. kind: a stable word; detail: what belongs to the name in the sentence."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind, self.detail = kind, detail


def reasons(thing: str, most_bytes: int) -> dict[str, str]:
    """Kind of refusal -> what is wrong with the file of a `thing`; what was expected; what to do."""
    return {
        "missing": f"there is no such file; expected a {thing} on this computer; check the path",
        "address": f"this is an address, not a file; expected a {thing} on this computer; download it first",
        "folder": f"this is a folder; expected one {thing}; give the files in it",
        "special": f"this is a device or a pipe; expected a regular file; save the {thing} to a file first",
        "permission": "reading this is not allowed; expected a file you may read; change its permissions",
        "unreadable": "the system could not read this; expected a readable file; check the path and the disk",
        "bytes": f"over {most_bytes // 2**20} MB; expected a smaller file; make the {thing} smaller, or compress it",
        "damaged": f"damaged or cut short; expected a complete {thing}; fetch or export it again",
    }


def read_file(path: str, most: int) -> bytes:
    """All bytes of a regular file, or a Refusal. One byte over the limit is read, never more, should it be growing."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise Refusal("folder")
        if not stat.S_ISREG(status.st_mode):
            raise Refusal("special")  # opening a pipe would wait for ever
        if status.st_size > most:
            raise Refusal("bytes")
        with open(path, "rb") as file:
            return file.read(most + 1)
    except PermissionError:
        raise Refusal("permission") from None
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the name
        raise Refusal("address" if _ADDRESS.match(path) else "missing") from None
    except OSError:  # also a name that is too long, as inline data is
        raise Refusal("address" if _ADDRESS.match(path) else "unreadable") from None


def spoken_name(source: object, thing: str) -> tuple[str, str]:
    """How a sentence calls a source that is a path, bytes or something else (short, printable), and its full name."""
    if isinstance(source, bytes):
        return f"a {thing} of {len(source):,} bytes", "bytes"
    if not isinstance(source, str | os.PathLike):
        known = source is None or type(source).__module__ == "builtins"
        return f"a value of type {type(source).__name__}" if known else "a value of another type", "value"
    name = os.fsdecode(source)
    tail = name if len(name) <= 60 else "..." + name[-57:]  # the file is at the end
    return "'" + "".join(letter if letter.isprintable() else "?" for letter in tail) + "'", name


def find_files(paths: Iterable[str | os.PathLike[str]], accepts: Callable[[str], bool]) -> list[Path]:
    """The files among `paths` as given, whatever they are, and in place of each folder those in and below it whose
    path is accepted.

    The files of a folder are sorted by path; hidden files and folders and links to folders are left out. A file found
    through two folders is listed once. Raises DataError for a folder that cannot be listed.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        wanted = sorted(file for file in _walk(path) if accepts(str(file)))
        fresh = [file for file in wanted if os.path.abspath(file) not in seen]
        seen.update(map(os.path.abspath, fresh))
        found += fresh
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder, onerror=_cannot_list):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in files if not name.startswith("."))


def _cannot_list(error: OSError) -> NoReturn:
    name = os.fsdecode(error.filename)
    raise DataError(f"folder {name!r} cannot be listed: {error.strerror}; check its permissions.") from None
