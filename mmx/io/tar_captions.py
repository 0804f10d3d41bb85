"""Captions in tar archives of the layout of WebDataset: a.jpg is followed by a.txt, and all else is copied as it is.

Members are copied in their bytes, with their headers, so times, owners and long names stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tarfile import PAX_FORMAT, RECORDSIZE, TarInfo
from typing import BinaryIO, NamedTuple

from mmx.errors import DataError, MmxError
from mmx.io.atomic import atomic_write
from mmx.io.sidecars import TEXT_SUFFIXES, Existing, Fields, named_errors, new_content
from mmx.io.tar import TarHeader, open_tar, split_sample_name, tar_headers

MAX_SIDECAR_BYTES = 2**24

_BLOCK = 512
_CHUNK = 2**20


class TarCaption(NamedTuple):
    """The caption of a member, and further fields for JSON."""

    text: str
    fields: Fields


class CaptionedTar:
    """A tar archive to which captions are added.

    Args:
        path: the archive, which is read once for the names of its members. Raises DataError if it is damaged.
        suffixes: the kinds of members to add, such as .txt; see `mmx.io.sidecars`.
        existing: what happens to the text of such a member that the archive has.
        is_image: whether the model reads files of a name.
    """

    def __init__(self, path: str, suffixes: Sequence[str], existing: Existing, is_image: Callable[[str], bool]) -> None:
        self.path = path
        self._suffixes = tuple(suffixes)
        self._existing = existing
        self._sidecars: set[str] = set()  # names in the archive
        self._shared: dict[str, str] = {}  # image without a sidecar -> the image of its sample that has it
        owners: dict[str, str] = {}
        for header in tar_headers(path):
            name = header.info.name
            if name.endswith(self._suffixes):
                self._sidecars.add(name)
            elif header.info.isreg() and is_image(name) and owners.setdefault(sample_key(name), name) != name:
                self._shared[name] = owners[sample_key(name)]

    def is_done(self, name: str) -> bool:
        """Return whether a member has its captions already, and they stay."""
        if self._existing != "skip" or name in self._shared:
            return False
        sidecars = [sample_key(name) + suffix for suffix in self._suffixes if suffix in TEXT_SUFFIXES]
        return len(sidecars) == len(self._suffixes) and self._sidecars.issuperset(sidecars)

    def check(self, name: str) -> None:
        """Raise DataError if the sample of a member has another image, which has the caption."""
        if name in self._shared:
            owner = self._shared[name]
            message = (
                f"{f'{self.path}/{name}'!r} and {owner!r} are one sample, which has one caption; rename one of them."
            )
            raise DataError(message, code="sidecar.shared", path=f"{self.path}/{name}", owner=owner)

    def write(self, out: Path, captions: Mapping[str, TarCaption]) -> list[MmxError]:
        """Write a copy of the archive with captions, by names of members. An older file is replaced.

        Returns the errors of members that were left as they are. Raises OSError, and DataError if the archive is
        damaged.
        """
        errors: list[MmxError] = []
        with atomic_write(out) as temporary, temporary.open("wb") as target, open_tar(self.path) as source:
            copy = _Copy(source, target)
            changed = self._by_sidecar(captions)
            captioned: set[str] = set()
            for header in tar_headers(self.path):
                name = header.info.name
                if name in changed:
                    try:
                        self._copy_changed(copy, header, changed[name])
                    except DataError as error:
                        errors.append(error)
                copy.to(header.end)
                if name in captions and name not in captioned:
                    captioned.add(name)
                    target.writelines(self._new_members(header.info, captions[name]))
            copy.finish()
        return errors

    def _by_sidecar(self, captions: Mapping[str, TarCaption]) -> dict[str, TarCaption]:
        """Return the captions by the names of their sidecars in the archive."""
        changed: dict[str, TarCaption] = {}
        for name, caption in captions.items():
            for suffix in self._suffixes:
                sidecar = sample_key(name) + suffix
                if sidecar in self._sidecars:
                    changed[sidecar] = caption
        return changed

    def _copy_changed(self, copy: _Copy, header: TarHeader, caption: TarCaption) -> None:
        """Write a sidecar of the archive with its new content. Raises DataError before anything is written."""
        info = header.info
        where = f"{self.path}/{info.name}"
        if not info.isreg() or info.size > MAX_SIDECAR_BYTES:
            message = f"{where!r} is not a small regular file; expected a text, write the archive again."
            raise DataError(message, code="sidecar.not_a_file", path=where)
        before = copy.peek(info.offset_data, info.size, header.end)
        with named_errors(where):
            content = new_content(Path(info.name).suffix, before, caption.text, self._existing, caption.fields)
        if content is not None:
            copy.replace(info.offset, header.end, _member(info.name, content, info))

    def _new_members(self, image: TarInfo, caption: TarCaption) -> Iterator[bytes]:
        """Yield the sidecars of a member that the archive does not have."""
        for suffix in self._suffixes:
            name = sample_key(image.name) + suffix
            content = new_content(suffix, None, caption.text, self._existing, caption.fields)
            if name not in self._sidecars and content is not None:
                yield _member(name, content, image)


def sample_key(name: str) -> str:
    """Return the key of the sample of a member: its name up to the first dot after the last slash."""
    return split_sample_name(name)[0]


class _Copy:
    """Copies an archive from a stream that is read in order. `position`: how far the source is copied or replaced."""

    def __init__(self, source: BinaryIO, target: BinaryIO) -> None:
        self._source = source
        self._target = target
        self._position = 0
        self._peeked = b""

    def to(self, end: int) -> None:
        """Copy everything up to an offset."""
        self._target.write(self._peeked)
        self._position += len(self._peeked)
        self._peeked = b""
        while self._position < end:
            piece = self._source.read(min(_CHUNK, end - self._position))
            if not piece:
                raise DataError("an archive was changed while it was read.", code="tar.changed")
            self._target.write(piece)
            self._position += len(piece)

    def peek(self, start: int, size: int, end: int) -> bytes:
        """Return bytes of what lies before an offset, all of which is copied later."""
        self._peeked = self._source.read(end - self._position)
        return self._peeked[start - self._position :][:size]

    def replace(self, start: int, end: int, content: bytes) -> None:
        """Write content in the place of the bytes between two offsets, which were peeked."""
        self._target.write(self._peeked[: start - self._position])
        self._target.write(content)
        self._position = end
        self._peeked = b""

    def finish(self) -> None:
        """Write the end of the archive: two blocks of zeros, padded to a record."""
        self._target.write(bytes(2 * _BLOCK))
        self._target.write(bytes(-self._target.tell() % RECORDSIZE))


def _member(name: str, content: bytes, image: TarInfo) -> bytes:
    """Return a regular file as it is stored in an archive, with the time and the permissions of another member."""
    info = TarInfo(name)
    info.size = len(content)
    info.mtime = image.mtime
    info.mode = image.mode
    return info.tobuf(PAX_FORMAT, "utf-8", "surrogateescape") + content + bytes(-len(content) % _BLOCK)
