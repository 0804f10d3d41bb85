"""A folder of images with a text file next to each: dog.jpg and dog.txt, which holds one caption.

This is the layout of tools that train image generators. Folders below are searched too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmx.data.json_fields import RecordLocation, read_utf8
from mmx.data.records import Record
from mmx.data.skipped import SkippedRecords
from mmx.errors import DataError
from mmx.io.files import find_files
from mmx.io.images import SUFFIXES
from mmx.io.sidecars import TEXT_SUFFIXES


def has_sidecars(folder: Path) -> bool:
    """Return whether an image in or below a folder has a text file next to it."""
    images = find_files([folder], _is_image)
    return any(isinstance(image, Path) and find_sidecar(image) is not None for image in images)


def find_sidecar(image: Path) -> Path | None:
    """Return the text file of an image, the first one of TEXT_SUFFIXES; None if it has none."""
    sidecars = (image.with_suffix(suffix) for suffix in TEXT_SUFFIXES)
    return next((sidecar for sidecar in sidecars if sidecar.is_file()), None)


def read_sidecars(folder: Path, skipped: SkippedRecords) -> Iterator[Record]:
    """Yield each image with its caption. Images without a text and texts without an image are reported as skipped."""
    used: set[Path] = set()
    for image in find_files([folder], _is_image):
        if isinstance(image, DataError):
            yield Record(RecordLocation(str(folder)), image)
            continue
        sidecar = find_sidecar(image)
        name = str(image.relative_to(folder))
        if sidecar is None:
            skipped.add(RecordLocation(str(folder), record=name), "the image has no text file next to it")
            continue
        if sidecar in used:
            skipped.add(RecordLocation(str(folder), record=name), f"{sidecar.name} is the text of another image")
            continue
        used.add(sidecar)
        try:
            caption = read_utf8(sidecar).strip()
        except DataError as error:
            yield Record(RecordLocation(str(sidecar)), error)
            continue
        except OSError as error:
            message = f"{sidecar} cannot be read: {error.strerror}; check its permissions."
            yield Record(RecordLocation(str(sidecar)), DataError(message, code="data.unreadable", path=str(sidecar)))
            continue
        if caption:
            yield Record(RecordLocation(str(sidecar)), {"image": name, "caption": caption})
        else:
            skipped.add(RecordLocation(str(folder), record=name), "its text file is empty")
    _report_orphans(folder, used, skipped)


def _report_orphans(folder: Path, used: set[Path], skipped: SkippedRecords) -> None:
    for text in find_files([folder], lambda path: Path(path).suffix in TEXT_SUFFIXES):
        if isinstance(text, Path) and text not in used and not _has_image(text, used):
            location = RecordLocation(str(folder), record=str(text.relative_to(folder)))
            skipped.add(location, "no image has the name of the text file")


def _has_image(text: Path, used: set[Path]) -> bool:
    """Whether the image of a text has another text that was used."""
    return any(text.with_suffix(suffix) in used for suffix in TEXT_SUFFIXES)


def _is_image(path: str) -> bool:
    return Path(path).suffix.lower() in SUFFIXES
