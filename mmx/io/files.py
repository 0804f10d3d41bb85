"""Files: what stands in the folders that a person names, and how the bytes of one are read, or why they are not.

The doors of pictures and of sounds share what can be wrong with any file: a Refusal of some kind, the reason in words,
and what the sentence calls the thing.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from mmx.errors import DataError

_ADDRESS = re.compile(r"data:|[a-z][a-z0-9+.-]+://?", re.IGNORECASE)


class ReadFailure(Exception):  # noqa: N818 - no error yet: the door that catches it knows the name of the thing
    """Stops the reading. kind: a stable word; detail: what belongs to the name in the sentence."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind, self.detail = kind, detail


def failure_messages(thing: str, most_bytes: int) -> dict[str, str]:
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
            raise ReadFailure("folder")
        if not stat.S_ISREG(status.st_mode):
            raise ReadFailure("special")  # opening a pipe would wait for ever
        if status.st_size > most:
            raise ReadFailure("bytes")
        with open(path, "rb") as file:
            return file.read(most + 1)
    except PermissionError:
        raise ReadFailure("permission") from None
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the name
        raise ReadFailure("address" if _ADDRESS.match(path) else "missing") from None
    except OSError:  # also a name that is too long, as inline data is
        raise ReadFailure("address" if _ADDRESS.match(path) else "unreadable") from None


def display_name(source: object, thing: str) -> tuple[str, str]:
    """How a sentence calls a source that is a path, bytes or something else (short, printable), and its full name."""
    if isinstance(source, bytes):
        return f"a {thing} of {len(source):,} bytes", "bytes"
    if not isinstance(source, str | os.PathLike):
        known = source is None or type(source).__module__ == "builtins"
        return f"a value of type {type(source).__name__}" if known else "a value of another type", "value"
    name = os.fsdecode(source)
    tail = name if len(name) <= 60 else "..." + name[-57:]  # the file is at the end
    return "'" + "".join(letter if letter.isprintable() else "?" for letter in tail) + "'", name


def find_files(
    paths: Iterable[str | os.PathLike[str]], accepts: Callable[[str], bool], walked: list[str] | None = None
) -> Iterator[Path | DataError]:
    """The files among `paths` as given, whatever they are, and in place of each folder, and of each pattern such as
    photos/**/*.jpg, those in and below it whose path is accepted; in place of a folder that cannot be listed, why not.

    One after the other, sorted by path: no more than the names in one folder (and in those above it) are held. Hidden
    files and folders and links to folders are left out. A file found through two folders is given once: the folders
    that were walked are noted in `walked`, which calls may share.
    """
    known = [] if walked is None else walked
    for path in map(Path, paths):
        if path.is_dir():
            yield from _walk(path, [(DEEP,)], accepts, tuple(known))
            known.append(os.path.abspath(path))
        elif is_pattern(path):
            yield from _matching(path, accepts, tuple(known))
        else:
            yield path


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether this stands for files by their names; a file that bears such a name is itself."""
    return any(sign in os.fspath(path) for sign in "*?[") and not os.path.lexists(path)


DEEP = "**"  # the part of a pattern that stands for any number of folders, or for all that is in them
Pattern = tuple[str, ...]  # what remains to be matched, part by part


def _matching(path: Path, accepts: Callable[[str], bool], walked: tuple[str, ...]) -> Iterator[Path | DataError]:
    """Walk from the last folder before the first sign of a pattern; what is not a folder matches nothing."""
    plain = next(place for place, part in enumerate(path.parts) if any(sign in part for sign in "*?["))
    folder = Path(*path.parts[:plain])
    if folder.is_dir():
        yield from _walk(folder, [path.parts[plain:]], accepts, walked)


def _walk(
    folder: Path, patterns: Sequence[Pattern], accepts: Callable[[str], bool], walked: tuple[str, ...]
) -> Iterator[Path | DataError]:
    if is_under(folder, walked):
        return
    listed = _listed(folder)
    if isinstance(listed, DataError):
        yield listed
        return
    names, folders = listed
    while names:  # let go of each name once it is dealt with
        name = names.pop()
        left = [rest for pattern in patterns for rest in _advanced(pattern, name)]
        whole = any(all(part == DEEP for part in rest) for rest in left)
        if name not in folders and whole and accepts(str(folder / name)):
            yield folder / name
        elif name in folders and left:
            yield from _walk(folder / name, [(DEEP,)] if whole else left, accepts, walked)


def _listed(folder: Path) -> tuple[list[str], set[str]] | DataError:
    """The names in a folder, last first, and those among them that are folders; links to folders are left out."""
    names, folders = [], set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.add(entry.name)
                elif entry.is_dir():
                    continue
                names.append(entry.name)
    except OSError as error:
        told = f"folder {str(folder)!r} cannot be listed: {error.strerror}; check its permissions."
        return DataError(told)
    return sorted(names, reverse=True), folders


def _advanced(pattern: Pattern, name: str) -> Iterator[Pattern]:
    """What remains of a pattern after a part of this name, in every way that it matches; nothing where it does not."""
    if not pattern or (name.startswith(".") and not pattern[0].startswith(".")):
        return
    if pattern[0] != DEEP:
        if fnmatchcase(name, pattern[0]):
            yield pattern[1:]
        return
    yield pattern
    yield from _advanced(pattern[1:], name)


def is_under(folder: Path, walked: tuple[str, ...]) -> bool:
    """Whether an earlier walk came through here: from one of its folders down, through nothing hidden and no link."""
    if not walked:
        return False
    place = Path(os.path.abspath(folder))
    while not place.name.startswith(".") or str(place) in walked:
        if str(place) in walked:
            return True
        if place.is_symlink() or place == place.parent:
            return False
        place = place.parent
    return False
