"""EXIF fields of an image, by name."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image

from mmx.errors import ImageError

_EXIF_FOLDER = 0x8769  # tag of the sub-directory with the fields of the camera, such as DateTimeOriginal
_TAGS = {name: tag for tag, name in ExifTags.TAGS.items()}


def read_exif_field(source: str | os.PathLike[str] | bytes, name: str) -> str | None:
    """Return a field such as "DateTimeOriginal" as text; None if the image has no such field.

    Only the header is read.

    Raises:
        ImageError: image.exif, if this is not an image that can be opened.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else Path(source)) as image:
            exif = image.getexif()
            fields = {**exif, **exif.get_ifd(_EXIF_FOLDER)}
    except Exception as error:  # Pillow raises errors of many kinds for damaged headers
        where = "the bytes" if isinstance(source, bytes) else repr(os.fspath(source))
        raise ImageError(
            f"the EXIF fields of {where} cannot be read; check that it is an image.", code="image.exif", source=where
        ) from error
    value = fields.get(_TAGS.get(name, -1))
    if value is None:
        return None
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text.strip("\0 ") or None
