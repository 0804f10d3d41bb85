"""HEIC images, the format of phones. They are decoded by pillow-heif, which is in the extra `heic`.

The plugin is not registered with the decoding library, so that nothing changes for other callers.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

from PIL import Image

from mmx.io.files import ReadFailure

# Brands of ISO 23008-12 for images and sequences coded with HEVC; mif1 and msf1 are those of any coding.
_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"))
_AVIF_BRANDS = (b"avif", b"avis")


def is_heic(data: bytes) -> bool:
    """Return whether bytes start as a HEIC image. An AVIF image, which has the same container, is not one."""
    size = int.from_bytes(data[:4], "big")
    if data[4:8] != b"ftyp" or not 16 <= size <= 512:
        return False
    brands = {data[8:12], *(data[start : start + 4] for start in range(16, size, 4))}
    return data[8:12] in _BRANDS and brands.isdisjoint(_AVIF_BRANDS)


def decode_heic(data: bytes, check_pixels: Callable[[int, int], None]) -> Image.Image:
    """Return the main image, upright.

    Args:
        check_pixels: called with width and height before anything is decoded.

    Raises:
        ReadFailure: pillow-heif is not installed.
    """
    try:
        from pillow_heif import open_heif
    except ImportError:
        raise ReadFailure("heic_package") from None
    file = open_heif(BytesIO(data))
    check_pixels(*file.size)
    image: Image.Image = file.to_pillow()
    return image
