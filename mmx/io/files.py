"""Files: reading the bytes of an input, and finding the files in folders and by patterns.

Images and audio share the ways in which reading can fail: `read_source` raises a `ReadFailure`, and `load_image` or
`load_audio` turns it into an error with a message and a code.
"""

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http.client import HTTPException
from pathlib import Path
from typing import Protocol, TypeAlias

from mmx.errors import DataError

URL_TIMEOUT = 30.0  # seconds without an answer

_URL = re.compile(r"data:|[a-z][a-z0-9+.-]+://?", re.IGNORECASE)
_HTTP_URL = re.compile(r"https?://", re.IGNORECASE)
_WILDCARDS = "*?["


class BinaryFile(Protocol):
    """An object that bytes can be read from, such as an open file or a BytesIO."""

    def read(self, size: int = -1, /) -> bytes: ...


_UNREAD_IMAGES = """
    3fr ai arw bpg cr2 cr3 crw cur dds dng emf eps erf exr hdp hdr heics icns ico iiq jls jxl jxr mef mos
    mrw nef nrw orf pcx pef psb psd qoi raf ras raw rw2 rwl sgi srw svg svgz tga wdp wmf x3f xbm xcf xpm
"""
_UNREAD_AUDIO = "3ga aac ac3 alac amr ape awb dsf dts m4a m4b mka mpc mp2 oma ra wma wv"
# Suffixes of image and audio files whose format is not read, by modality: not to be overlooked in a folder.
UNREAD_SUFFIXES: Mapping[str, frozenset[str]] = {
    "image": frozenset(f".{suffix}" for suffix in _UNREAD_IMAGES.split()),
    "audio": frozenset(f".{suffix}" for suffix in _UNREAD_AUDIO.split()),
}


class StoredBytes(ABC):
    """The bytes of an input inside of something larger, such as an archive or a table; read when they are needed.

    Subclasses are frozen: equal ones are the same input. name: what messages and rows call the input.
    """

    name: str

    @abstractmethod
    def load(self, max_bytes: int) -> bytes:
        """Return the bytes, at most one byte more than `max_bytes`. Raises ReadFailure."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class FilePart(StoredBytes):
    """Some bytes of a file, such as a member of an uncompressed archive. offset, size: in bytes."""

    name: str
    path: str
    offset: int
    size: int

    def load(self, max_bytes: int) -> bytes:
        """Read the bytes. Raises ReadFailure."""
        if self.size > max_bytes:
            raise ReadFailure("too_large")
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError:
            raise ReadFailure("unreadable") from None
        if len(data) < self.size:
            raise ReadFailure("damaged")
        return data


# What the bytes of an input can be read from: a path (or, on request, a URL), the bytes, or an open binary file.
FileInput: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile | StoredBytes


class ReadFailure(Exception):  # noqa: N818 - never leaves mmx.io
    """An input that cannot be read. `reason` is the last part of the error code; `detail` follows the input's name."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def failure_messages(kind: str, max_bytes: int) -> dict[str, str]:
    """Return the message of each reason: the problem; what was expected; what to do. kind: image or audio."""
    return {
        "missing": f"there is no such file; expected the path of an {kind} file; check the path",
        "url": f"a URL; expected an {kind} file on this computer; download it, or in Python use allow_urls=True",
        "download": f"the download failed; expected the URL of an {kind} file; check the address and the network",
        "folder": f"this is a folder; expected one {kind} file; give the files in it",
        "not_a_file": f"this is a device or a pipe; expected a regular file; save the {kind} data to a file first",
        "permission": "permission denied; expected a readable file; change its permissions",
        "unreadable": "the operating system could not read this; expected a readable file; check the path and the disk",
        "too_large": f"over {max_bytes // 2**20} MB; expected a smaller file; reduce its size, or compress it",
        "empty": f"it has no content; expected an {kind} file; download or export it again",
        "damaged": f"damaged or truncated; expected a complete {kind} file; download or export it again",
    }


def read_source(source: object, max_bytes: int, allow_urls: bool = False) -> bytes:
    """Return the bytes of a `FileInput`, at least one and at most `max_bytes`. Raises ReadFailure."""
    if isinstance(source, bytes | bytearray | memoryview):
        data = _copy_bytes(source, max_bytes)
    elif isinstance(source, StoredBytes):
        data = source.load(max_bytes)
    elif isinstance(source, str | os.PathLike):
        name = os.fsdecode(source)
        is_http = _HTTP_URL.match(name) is not None
        data = _fetch(name, max_bytes) if allow_urls and is_http else read_file(name, max_bytes)
    elif callable(getattr(source, "read", None)):
        data = _read_open_file(source, max_bytes)
    else:
        raise ReadFailure("type")
    if not data:
        raise ReadFailure("empty")
    if len(data) > max_bytes:
        raise ReadFailure("too_large")
    return data


def read_file(path: str, max_bytes: int) -> bytes:
    """Return the content of a regular file, at most one byte more than `max_bytes`. Raises ReadFailure."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ReadFailure("folder")
        if not stat.S_ISREG(status.st_mode):
            raise ReadFailure("not_a_file")  # opening a pipe without a writer would block
        if status.st_size > max_bytes:
            raise ReadFailure("too_large")
        with open(path, "rb") as file:
            return file.read(max_bytes + 1)
    except PermissionError:
        raise ReadFailure("permission") from None
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the name
        raise ReadFailure("url" if _URL.match(path) else "missing") from None
    except OSError:  # also a name that is too long, such as a data URL
        raise ReadFailure("url" if _URL.match(path) else "unreadable") from None


def read_stored(source: StoredBytes, max_bytes: int) -> bytes:
    """Return the bytes of an input inside of something larger. Raises DataError."""
    try:
        return source.load(max_bytes)
    except ReadFailure:
        message = f"{_quoted(source.name)} is gone, damaged or too large; expected a complete file; write it again."
        raise DataError(message, code="data.stored_bytes", source=source.name) from None


def display_name(source: object, kind: str) -> tuple[str, str]:
    """Return what a message calls a source (short, printable), and its full name for `details["source"]`."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{kind} data of {len(source):,} bytes", "bytes"
    if isinstance(source, StoredBytes):
        return _quoted(source.name), source.name
    name = getattr(source, "name", None) if callable(getattr(source, "read", None)) else source
    if isinstance(name, str | os.PathLike):
        return _quoted(os.fsdecode(name)), os.fsdecode(name)
    if callable(getattr(source, "read", None)):
        return f"an open {kind} file", "file"
    return f"a value of type {type(source).__name__[:60]}", "value"


def find_files(paths: Iterable[str | os.PathLike[str]], accepts: Callable[[str], bool]) -> Iterator[Path | DataError]:
    """Yield the files that paths, folders and patterns such as photos/**/*.jpg stand for, one path after the other.

    A path to anything but a folder is yielded as it is. In place of a folder, the files in and below it whose path is
    accepted are yielded, sorted by path; in place of a pattern, those that match it. An error is yielded for a folder
    that cannot be listed. Hidden files and folders, and links to folders, are left out. Only the names in one folder
    (and in those above it) are held in memory.
    """
    for path in map(Path, paths):
        if path.is_dir():
            yield from _walk(path, [(_ANY_DEPTH,)], accepts)
        elif is_pattern(path):
            yield from _match(path, accepts)
        else:
            yield path


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Return whether a path has wildcards, and no file has exactly this name."""
    return any(sign in os.fspath(path) for sign in _WILDCARDS) and not os.path.lexists(path)


# ---- helpers ---------------------------------------------------------------------------------------------------


def _copy_bytes(source: bytes | bytearray | memoryview, max_bytes: int) -> bytes:
    if memoryview(source).nbytes > max_bytes:
        raise ReadFailure("too_large")
    return bytes(source)


def _fetch(url: str, max_bytes: int) -> bytes:
    """Download over HTTP or HTTPS; other protocols are not followed on a redirect. Raises ReadFailure."""
    from urllib import request  # costs 10 ms to import

    handlers = (request.HTTPHandler, request.HTTPSHandler, request.HTTPRedirectHandler, request.ProxyHandler,
                request.HTTPDefaultErrorHandler, request.HTTPErrorProcessor)  # fmt: skip
    opener = request.OpenerDirector()
    for handler in handlers:
        opener.add_handler(handler())
    try:
        with opener.open(request.Request(url, headers={"User-Agent": "mmx"}), timeout=URL_TIMEOUT) as response:
            return _read_open_file(response, max_bytes)
    except (OSError, HTTPException, ValueError, AttributeError):  # AttributeError: no handler for a redirect's protocol
        raise ReadFailure("download") from None


def _read_open_file(file: object, max_bytes: int) -> bytes:
    """Read from the start of a binary file, or from where it is if it cannot seek; at most one byte too many."""
    if getattr(file, "seekable", lambda: False)():
        file.seek(0)  # type: ignore[attr-defined]
    pieces: list[bytes] = []
    missing = max_bytes + 1
    while missing > 0:
        piece = file.read(missing)  # type: ignore[attr-defined]
        if not isinstance(piece, bytes):  # a file in text mode
            raise ReadFailure("type")
        if not piece:
            break
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _quoted(name: str) -> str:
    tail = name if len(name) <= 60 else "..." + name[-57:]  # the file name is at the end
    return "'" + "".join(character if character.isprintable() else "?" for character in tail) + "'"


_ANY_DEPTH = "**"  # the part of a pattern that matches any number of folders, or everything in them
_Pattern = tuple[str, ...]  # the parts that are left to match


def _match(path: Path, accepts: Callable[[str], bool]) -> Iterator[Path | DataError]:
    """Walk from the last folder before the first wildcard."""
    first = next(i for i, part in enumerate(path.parts) if any(sign in part for sign in _WILDCARDS))
    folder = Path(*path.parts[:first])
    if folder.is_dir():
        yield from _walk(folder, [path.parts[first:]], accepts)


def _walk(folder: Path, patterns: Sequence[_Pattern], accepts: Callable[[str], bool]) -> Iterator[Path | DataError]:
    listing = _list_folder(folder)
    if isinstance(listing, DataError):
        yield listing
        return
    names, folders = listing
    while names:  # popped, so that a long listing is freed on the way
        name = names.pop()
        rest = [left for pattern in patterns for left in _advance(pattern, name)]
        matched = any(all(part == _ANY_DEPTH for part in left) for left in rest)
        if name in folders and rest:
            yield from _walk(folder / name, [(_ANY_DEPTH,)] if matched else rest, accepts)
        elif name not in folders and matched and accepts(str(folder / name)):
            yield folder / name


def _list_folder(folder: Path) -> tuple[list[str], set[str]] | DataError:
    """The names in a folder in reverse order, and which of them are folders; links to folders are left out."""
    names: list[str] = []
    folders: set[str] = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.add(entry.name)
                elif entry.is_dir():
                    continue
                names.append(entry.name)
    except OSError as error:
        message = f"folder {str(folder)!r} cannot be listed: {error.strerror}; check its permissions."
        return DataError(message, code="folder.unreadable", path=str(folder))
    return sorted(names, reverse=True), folders


def _advance(pattern: _Pattern, name: str) -> Iterator[_Pattern]:
    """What is left of a pattern after a part of this name, once for each way to match it."""
    if not pattern or (name.startswith(".") and not pattern[0].startswith(".")):
        return
    if pattern[0] != _ANY_DEPTH:
        if fnmatchcase(name, pattern[0]):
            yield pattern[1:]
        return
    yield pattern
    yield from _advance(pattern[1:], name)
