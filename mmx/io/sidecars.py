"""Sidecars: small files next to an image that hold its caption: a.txt, a.caption, a.json or a.xmp next to a.jpg.

A sidecar is replaced atomically while its image is locked, so two processes do not overwrite each other's work. Which
image a sidecar belongs to depends on the names in the folder only: of a.jpg and a.png, which would share a.txt, the
first has it, in every run.
"""

from __future__ import annotations

import json
import os
import stat
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mmx.errors import DataError
from mmx.io import xmp
from mmx.io.atomic import atomic_write_bytes, remove_stale_temporary
from mmx.io.file_lock import hold_lock

Existing = Literal["skip", "overwrite", "append", "prepend"]
EXISTING: tuple[Existing, ...] = get_args(Existing)
TEXT_SUFFIXES = (".txt", ".caption")
SUFFIXES = (*TEXT_SUFFIXES, ".json", ".xmp")

Fields = Mapping[str, object]


@dataclass(frozen=True)
class SidecarChange:
    """A sidecar that is to be written. before: its content, None if there is no such file."""

    path: Path
    before: bytes | None
    content: bytes

    def apply(self) -> None:
        """Replace the file, or the target of a link. Raises DataError."""
        with _write_error(self.path):
            atomic_write_bytes(Path(os.path.realpath(self.path)), self.content)


class Sidecars:
    """The sidecars of a run.

    Args:
        suffixes: the kinds to write, of SUFFIXES.
        existing: what happens to the text of a sidecar that has one.
        is_image: whether the model reads files of a name. Two of them with one stem would share a sidecar.
        reserved: other files that the run writes, which are no sidecars.
    """

    def __init__(
        self,
        suffixes: Sequence[str],
        existing: Existing,
        is_image: Callable[[str], bool],
        reserved: Iterable[Path] = (),
    ) -> None:
        self.suffixes = tuple(suffixes)
        self.existing = existing
        self._is_image = is_image
        self._reserved = frozenset(map(os.path.realpath, reserved))
        self._owners: dict[Path, dict[str, str]] = {}  # folder -> image without a sidecar -> the image that has it

    def are_done(self, image: Path) -> bool:
        """Return whether there is nothing to do for an image: all its sidecars have a text, and that stays."""
        if self.existing != "skip" or self._owner(image) is not None:
            return False
        try:
            paths = [image.with_suffix(suffix) for suffix in self.suffixes]
            return all(_has_text(path) and os.path.realpath(path) not in self._reserved for path in paths)
        except (DataError, OSError, ValueError):
            return False  # the error is met again when the sidecar is to be written

    @contextmanager
    def changes(self, image: Path, text: str, fields: Fields) -> Iterator[list[SidecarChange]]:
        """Yield what has to be written for an image, which is locked within the block. Raises DataError.

        fields: further fields for a JSON sidecar.
        """
        self._check_image(image)
        with ExitStack() as stack:
            with _lock_error(image):
                stack.enter_context(hold_lock(image))
            changes = []
            for suffix in self.suffixes:
                path = image.with_suffix(suffix)
                before = self._read(path)
                with named_errors(path):
                    content = new_content(suffix, before, text, self.existing, fields)
                if content is not None and content != before:
                    changes.append(SidecarChange(path, before, content))
            yield changes

    def _check_image(self, image: Path) -> None:
        """Raise DataError for an input that is not a file, and for one whose sidecar belongs to another image."""
        if not os.path.isfile(image):
            message = f"{str(image)!r} is not a file that a sidecar can be written next to; use --out for it."
            raise DataError(message, code="sidecar.no_file", path=str(image))
        owner = self._owner(image)
        if owner is not None:
            message = f"{str(image)!r} and {owner!r} would share a sidecar; rename one of them."
            raise DataError(message, code="sidecar.shared", path=str(image), owner=owner)

    def _read(self, path: Path) -> bytes | None:
        """Return the content of a sidecar that may be replaced; None if there is none. Raises DataError."""
        if os.path.realpath(path) in self._reserved:
            message = f"{str(path)!r} is a sidecar and the file of --out; choose another --out."
            raise DataError(message, code="sidecar.is_output", path=str(path))
        with _write_error(path):
            try:
                status = path.stat()
            except FileNotFoundError:
                return None
            if not stat.S_ISREG(status.st_mode):
                message = f"{str(path)!r} is not a regular file; expected a sidecar, move it away."
                raise DataError(message, code="sidecar.not_a_file", path=str(path))
            if not (status.st_mode & 0o222 and os.access(path, os.W_OK)):
                raise PermissionError(0, "it is write-protected")
            return path.read_bytes()

    def _owner(self, image: Path) -> str | None:
        """Return the image that has the sidecar which this one would have; None if it is its own."""
        folder = image.parent
        if folder not in self._owners:
            self._owners[folder] = dict(self._scan(folder))
        return self._owners[folder].get(image.name)

    def _scan(self, folder: Path) -> Iterator[tuple[str, str]]:
        """Yield (image, owner) for images that share a stem, and remove what killed processes left."""
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            return
        for name in names:
            if name.startswith(".") and name.endswith(self.suffixes):
                remove_stale_temporary(folder / name)
        ignores_case = _ignores_case(folder, names)
        owners: dict[str, str] = {}
        for name in filter(self._is_image, names):
            stem = Path(name).stem
            owner = owners.setdefault(stem.casefold() if ignores_case else stem, name)
            if owner != name:
                yield name, owner


def new_content(
    suffix: str, before: bytes | None, text: str, existing: Existing, fields: Fields | None = None
) -> bytes | None:
    """Return the content of a sidecar with a text, None if it is to stay as it is. Raises DataError.

    Of JSON and XMP only the text (and in JSON the given fields) is set; other fields stay.
    """
    if suffix == ".xmp":
        old = None if before is None else xmp.read_description(before)
        new = join_texts(old, text, existing)
        return None if new is None else xmp.set_description(before, new)
    if suffix == ".json":
        document = {} if before is None else _parse_json(before)
        caption = document.get("caption")
        new = join_texts(caption if isinstance(caption, str) else None, text, existing)
        if new is None:
            return None
        changed = {**document, "caption": new, **(fields or {})}
        return (json.dumps(changed, ensure_ascii=False, indent=2) + "\n").encode(errors="backslashreplace")
    if before is not None and existing == "skip":
        return None
    replaced = before is None or existing == "overwrite"  # then the older text may have any encoding
    new = text if replaced else join_texts(_decode(before or b""), text, existing)
    return None if new is None else new.encode()


def join_texts(old: str | None, new: str, existing: Existing) -> str | None:
    """Return an old text with a new one as a line before or after it, or in its place; None to keep the old one.

    A line that the old text has is not added again.
    """
    if old is None:
        return new
    if existing == "skip":
        return None
    lines = old.rstrip("\r\n")
    if existing == "overwrite" or not lines:
        return new
    if new in lines.splitlines():
        return None
    return f"{lines}\n{new}" if existing == "append" else f"{new}\n{lines}"


@contextmanager
def named_errors(path: Path | str) -> Iterator[None]:
    """Put the name of a sidecar before the message of an error about its content."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{str(path)!r}: {error}", code=error.code, path=str(path)) from None


# ---- helpers ---------------------------------------------------------------------------------------------------


def _has_text(path: Path) -> bool:
    if not path.is_file():
        return False
    if path.suffix == ".xmp":
        return xmp.read_description(path.read_bytes()) is not None
    return path.suffix != ".json" or isinstance(_parse_json(path.read_bytes()).get("caption"), str)


def _decode(content: bytes) -> str:
    try:
        return content.removeprefix(BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError:
        message = "it is not UTF-8; expected a text in UTF-8, convert the file or use --existing overwrite."
        raise DataError(message, code="sidecar.not_utf8") from None


def _parse_json(content: bytes) -> dict[str, object]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise DataError("it is not a JSON object; correct or delete the file.", code="sidecar.not_json")
    return document


def _ignores_case(folder: Path, names: Sequence[str]) -> bool:
    """Return whether the file system finds a file under a name in other case."""
    listed = set(names)
    for name in names:
        if name.swapcase() not in listed and name.swapcase() != name:
            return os.path.lexists(folder / name.swapcase())
    return False


@contextmanager
def _write_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or "the operating system refused it"
        message = f"{str(path)!r} cannot be written: {reason}; change its permissions."
        raise DataError(message, code="sidecar.not_writable", path=str(path)) from error


@contextmanager
def _lock_error(image: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{str(image)!r} cannot be read: {error.strerror}; check the path."
        raise DataError(message, code="sidecar.no_file", path=str(image)) from error
