"""Shards: tar files of many samples, read one member after the other; nothing is unpacked to a disk.

Written for the habit of WebDataset (Aizman et al. 2019, arXiv:2001.01252): members a.jpg, a.json, b.jpg, ... in order.
"""

import gzip
import os
import sys
import tarfile
from bz2 import BZ2File
from collections.abc import Callable, Iterator
from lzma import LZMAFile
from typing import Any, NamedTuple

from mmx.errors import DataError

_OPENERS: dict[str, Callable[[str], Any]] = {
    ".tar": lambda path: open(path, "rb"),  # noqa: SIM115 - closed by read_shard
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": BZ2File,
    ".tar.xz": LZMAFile,
}
_BLOCK = 512  # bytes of a header, and of what a tar file is made of
_MOST_HEADER = 2**20  # bytes: longer names and notes than this are nobody's
_MOST_PASSED = 2**30  # bytes unpacked between two members that are read: zeros shrink to a thousandth, and take seconds


class TarMember(NamedTuple):
    """A file in a shard: its name there, and its bytes or why they cannot be had."""

    name: str
    data: bytes | DataError


def is_tar(path: str) -> bool:
    """Whether a name is that of a tar file, compressed or not."""
    return _ending(path) is not None


def read_tar(path: str, wanted: Callable[[str], bool], most: int) -> Iterator[TarMember]:
    """The members whose names are wanted, in order, one in memory at a time; hidden ones are passed over, as in folders
    (archives made on a Mac have a "._a.jpg" beside each "a.jpg").

    What is no plain file (links, devices, holes), has a name that leads out of a folder, or holds more than `most`
    bytes is not read but told. A shard that is damaged gives what comes before, and its reason last, under the name "".
    So does one that is compressed and would have a gibibyte or more unpacked for what is passed over at a stretch.
    """
    try:
        with _OPENERS[_ending(path) or ".tar"](path) as file:
            passable = sys.maxsize if _ending(path) in (None, ".tar") else _MOST_PASSED
            yield from _members(path, _BoundedFile(file, most), wanted, most, passable)
    except OSError as error:
        yield TarMember("", DataError(f"shard {path!r} cannot be read: {error.strerror or 'damaged'}; fetch it again."))
    except Exception:  # noqa: BLE001 - damaged archives raise what the decoders of three compressions think of
        yield TarMember("", _damaged(path))


class _BoundedFile:
    """A file of which no more than a member's limit is read at once, whatever a header promises."""

    def __init__(self, file: Any, most: int) -> None:
        self.file, self.most = file, max(most, _MOST_HEADER) + 1
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.most:
            raise tarfile.ReadError("more than a header or a member has")
        return bytes(self.file.read(size))


def _members(
    path: str, file: _BoundedFile, wanted: Callable[[str], bool], most: int, passable: int
) -> Iterator[TarMember]:
    with tarfile.open(fileobj=file, mode="r:") as archive:  # type: ignore[call-overload]
        passed = 0  # bytes since the last member that was read
        while (info := archive.next()) is not None:
            archive.members = []  # else all headers are kept
            member = _member(path, archive, info, most) if _is_meant(info, wanted) else None
            if member is not None:
                yield member
            was_read = member is not None and isinstance(member.data, bytes)
            passed = 0 if was_read else passed + archive.offset - info.offset_data
            if passed >= passable:  # nothing of it is unpacked before the next member is asked for
                yield TarMember("", _too_long(path, info.name, passable))
                return
        file.seek(archive.offset)
        end = file.read(_BLOCK)
        if len(end) < _BLOCK or end.strip(b"\0"):  # a whole shard closes with zeros; else: cut short, or no header
            yield TarMember("", _damaged(path))


def _is_meant(info: tarfile.TarInfo, wanted: Callable[[str], bool]) -> bool:
    """Whether a member is to be read, or to be told of: its name is wanted, and nothing in it is hidden."""
    hidden = any(part.startswith(".") and part not in (".", "..") for part in _parts(info.name))
    return not hidden and not info.isdir() and wanted(info.name)


def _member(path: str, archive: tarfile.TarFile, info: tarfile.TarInfo, most: int) -> TarMember:
    strange = _member_problem(info, most)
    if strange is not None:
        return TarMember(info.name, DataError(f"{f'{path}/{info.name}'!r}: {strange}."))
    part = archive.extractfile(info)
    return TarMember(info.name, part.read(info.size) if part is not None else b"")


def _member_problem(info: tarfile.TarInfo, most: int) -> str | None:
    """Why a member is not read; None for plain files."""
    parts = _parts(info.name)
    if info.name.startswith(("/", "\\")) or ".." in parts or "\0" in info.name or parts[0].endswith(":"):
        return "a name that leads out of its folder; expected one such as 'a.jpg', write the shard again"
    if not info.isreg() or info.issparse():
        return "a link, a device or a file with holes; expected a plain file, write the shard again"
    if info.size > most:
        return f"over {most // 2**20} MB; expected a smaller file, make it smaller"
    return None


def _parts(name: str) -> list[str]:
    return name.replace("\\", "/").split("/")


def _too_long(path: str, name: str, passable: int) -> DataError:
    return DataError(
        f"shard {path!r} holds {passable // 2**20:,} MB or more that is not read, up to {name!r}, and would have to "
        "be unpacked for what follows; write the shard again without it, or as a plain .tar."
    )


def _damaged(path: str) -> DataError:
    return DataError(f"shard {path!r} is damaged or cut short, what follows in it is lost; fetch or write it again.")


def _ending(path: str) -> str | None:
    return next((ending for ending in _OPENERS if os.fspath(path).lower().endswith(ending)), None)
