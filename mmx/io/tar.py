"""Tar archives of many samples, read member by member; nothing is unpacked to a disk.

Intended for the layout of WebDataset (Aizman et al. 2019, arXiv:2001.01252): members a.jpg, a.json, b.jpg, ...
"""

import gzip
import os
import sys
import tarfile
from bz2 import BZ2File
from collections.abc import Callable, Iterator
from lzma import LZMAFile
from typing import BinaryIO, NamedTuple

from mmx.errors import DataError
from mmx.io.files import FilePart

_OPENERS: dict[str, Callable[[str], BinaryIO]] = {
    ".tar": lambda path: open(path, "rb"),  # noqa: SIM115 - closed by read_tar
    ".tar.gz": gzip.open,  # type: ignore[dict-item]
    ".tgz": gzip.open,  # type: ignore[dict-item]
    ".tar.bz2": BZ2File,  # type: ignore[dict-item]
    ".tar.xz": LZMAFile,  # type: ignore[dict-item]
}
_BLOCK = 512  # bytes; headers and members are padded to blocks
_MAX_HEADER = 2**20  # bytes; no real name or comment is longer
_MAX_SKIPPED = 2**30  # bytes to decompress between two members that are read: zeros compress a thousandfold


class TarHeader(NamedTuple):
    """The header of a member, and where the member ends among the decompressed bytes of the archive."""

    info: tarfile.TarInfo
    end: int


class TarMember(NamedTuple):
    """A file in an archive: its name, and its bytes, the place of its bytes, or the reason why it was not read."""

    name: str
    data: bytes | FilePart | DataError


def split_sample_name(name: str) -> tuple[str, str]:
    """Return the key of a sample and the suffix of a member: they are separated by the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def is_tar(path: str) -> bool:
    """Return whether a file name is that of a tar archive, compressed or not."""
    return _suffix(path) is not None


def is_compressed(path: str) -> bool:
    """Return whether a file name is that of a compressed archive, whose members cannot be read in any order."""
    return _suffix(path) not in (None, ".tar")


def read_tar(
    path: str, accepts: Callable[[str], bool], max_bytes: int, is_stored: Callable[[str], bool] | None = None
) -> Iterator[TarMember]:
    """Yield the members whose names are accepted, in order, with one in memory at a time.

    Hidden members are skipped, as in folders: archives made on macOS have a "._a.jpg" for each "a.jpg". Links, devices,
    sparse files, names that lead out of the folder and members over `max_bytes` are yielded as errors. A damaged
    archive ends with an error under the name "", and so does a compressed archive in which a gibibyte or more would
    have to be decompressed to skip unread members.

    Args:
        is_stored: members whose bytes are not read now: in an uncompressed archive their `data` is a FilePart.
    """
    max_skipped = _MAX_SKIPPED if is_compressed(path) else sys.maxsize
    stored = None if is_compressed(path) else is_stored
    try:
        with open_tar(path) as file:
            yield from _read_members(path, _BoundedFile(file, max_bytes), accepts, max_bytes, max_skipped, stored)
    except OSError as error:
        yield TarMember("", _unreadable(path, error))
    except Exception:  # noqa: BLE001 - three decompressors raise many types for damaged archives
        yield TarMember("", _damaged(path))


def open_tar(path: str) -> BinaryIO:
    """Open an archive for reading its decompressed bytes. Raises OSError."""
    return _OPENERS[_suffix(path) or ".tar"](path)


def tar_headers(path: str) -> Iterator[TarHeader]:
    """Yield the header of each member of an archive, of any kind. Raises DataError for a damaged archive."""
    try:
        with open_tar(path) as file:
            bounded = _BoundedFile(file, 0)
            with tarfile.open(fileobj=bounded, mode="r:") as archive:  # type: ignore[call-overload]
                while (info := archive.next()) is not None:
                    archive.members = []  # else all headers are kept in memory
                    yield TarHeader(info, archive.offset)
                if not _is_complete(bounded, archive.offset):
                    raise _damaged(path)
    except DataError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # three decompressors raise many types for damaged archives
        raise _damaged(path) from error


class _BoundedFile:
    """A file from which no more than the largest member or header is read at once, whatever a header declares."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self.file = file
        self.seek = file.seek
        self.tell = file.tell
        self.max_read = max(max_bytes, _MAX_HEADER) + 1

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.max_read:
            raise tarfile.ReadError("more than a header or a member has")
        return bytes(self.file.read(size))


def _read_members(
    path: str,
    file: _BoundedFile,
    accepts: Callable[[str], bool],
    max_bytes: int,
    max_skipped: int,
    is_stored: Callable[[str], bool] | None,
) -> Iterator[TarMember]:
    with tarfile.open(fileobj=file, mode="r:") as archive:  # type: ignore[call-overload]
        skipped = 0  # bytes since the last member that was read
        while (info := archive.next()) is not None:
            archive.members = []  # else all headers are kept in memory
            stored = is_stored is not None and is_stored(info.name)
            member = _read_member(path, archive, info, max_bytes, stored) if _is_selected(info, accepts) else None
            if member is not None:
                yield member
            if member is not None and isinstance(member.data, bytes):
                skipped = 0
            else:
                skipped += archive.offset - info.offset_data
            if skipped >= max_skipped:  # nothing was decompressed yet: that would happen with the next header
                yield TarMember("", _too_much_skipped(path, info.name, max_skipped))
                return
        if not _is_complete(file, archive.offset):
            yield TarMember("", _damaged(path))


def _is_complete(file: _BoundedFile, offset: int) -> bool:
    """Whether an archive ends with a block of zeros after its last member."""
    file.seek(offset)
    end = file.read(_BLOCK)
    return len(end) == _BLOCK and not end.strip(b"\0")


def _is_selected(info: tarfile.TarInfo, accepts: Callable[[str], bool]) -> bool:
    hidden = any(part.startswith(".") and part not in (".", "..") for part in _parts(info.name))
    return not hidden and not info.isdir() and accepts(info.name)


def _read_member(path: str, archive: tarfile.TarFile, info: tarfile.TarInfo, max_bytes: int, stored: bool) -> TarMember:
    problem = _find_problem(info, max_bytes)
    if problem is not None:
        reason, message = problem
        error = DataError(f"{f'{path}/{info.name}'!r}: {message}.", code=f"tar.{reason}", path=path, member=info.name)
        return TarMember(info.name, error)
    if stored:
        return TarMember(info.name, FilePart(f"{path}/{info.name}", path, info.offset_data, info.size))
    file = archive.extractfile(info)
    return TarMember(info.name, b"" if file is None else file.read(info.size))


def _find_problem(info: tarfile.TarInfo, max_bytes: int) -> tuple[str, str] | None:
    """Return why a member is not read, as (last part of the code, message); None for a regular file."""
    parts = _parts(info.name)
    if info.name.startswith(("/", "\\")) or ".." in parts or "\0" in info.name or parts[0].endswith(":"):
        return "member_path", "the name leads out of its folder; expected one such as 'a.jpg', write the archive again"
    if not info.isreg() or info.issparse():
        return "member_type", "a link, a device or a sparse file; expected a regular file, write the archive again"
    if info.size > max_bytes:
        return "member_too_large", f"over {max_bytes // 2**20} MB; expected a smaller file, reduce its size"
    return None


def _parts(name: str) -> list[str]:
    return name.replace("\\", "/").split("/")


def _too_much_skipped(path: str, member: str, max_skipped: int) -> DataError:
    return DataError(
        f"archive {path!r} has {max_skipped // 2**20:,} MB or more of unread members up to {member!r}, which would "
        "have to be decompressed to read on; write the archive again without them, or as an uncompressed .tar.",
        code="tar.too_much_skipped",
        path=path,
        member=member,
    )


def _unreadable(path: str, error: OSError) -> DataError:
    message = f"archive {path!r} cannot be read: {error.strerror or 'damaged'}; download it again."
    return DataError(message, code="tar.unreadable", path=path)


def _damaged(path: str) -> DataError:
    message = f"archive {path!r} is damaged or truncated, the rest of it is lost; download or write it again."
    return DataError(message, code="tar.damaged", path=path)


def _suffix(path: str) -> str | None:
    lower = os.fspath(path).lower()
    return next((suffix for suffix in _OPENERS if lower.endswith(suffix)), None)
