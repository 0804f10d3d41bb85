"""The one door for pictures: whatever is given, out comes an upright 8-bit RGB picture, or an `ImageError`.

Every step that can go wrong has its limit here, before the step is taken: bytes before they are parsed, pixels before
they are decoded. Nothing is fetched from the network and no setting of the decoding library is changed, so `load_image`
may be called from many threads and processes at once.
"""

import os
import re
import sys
from io import BytesIO

import numpy as np
from PIL import Image

from mmx.errors import ImageError
from mmx.io.files import ReadFailure, display_name, failure_messages, read_file

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000  # width x height; decoding takes about 12 bytes for each, so at most some 600 MB
MAX_SCANS = 200  # passes of a progressive JPEG: each costs a walk over all pixels and takes only 14 bytes of file
MAX_READS = 100_000  # pieces a header is read in: one of a million comments takes hours; pixels get 40 times as many
MAX_EXIF = 2**17  # bytes: 5,000 tags that all point at the same bytes are copied 5,000 times

# ICO is missing on purpose: the library decodes it while opening, before its size can be looked at.
# So are formats without a signature (any bytes would do) and those that start another program (EPS, WMF).
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")

_KNOWN = "apng avif bmp gif j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpo pbm pfm pgm png pnm ppm tif tiff webp"
SUFFIXES = frozenset(f".{suffix}" for suffix in _KNOWN.split())

# kind of refusal: what is wrong; what was expected; what to do
_REASONS = {
    **failure_messages("picture", MAX_BYTES),
    "type": "this cannot be read; expected a path, the bytes of a picture file, or an open picture; save it to a file",
    "empty": "zero bytes; expected a picture file; fetch or export it again",
    "format": "no picture, or damaged at the start; use PNG, JPEG, GIF, BMP, TIFF, WEBP, AVIF, JP2, PPM; convert it",
    "pixels": f"too many pixels, or none; expected 1 to {MAX_PIXELS:,} of them; scale the picture down",
    "effort": "it takes too much work to decode; expected an ordinary picture; save it as a plain JPEG or PNG",
    "colours": "its colours are not ones that turn into RGB here; expected RGB, grey or CMYK; convert it first",
}

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # the latter where warnings are errors
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # marker, length and count must agree
_AVIF_EXIF = re.compile(rb"(infe.{8}(?:..)?)Exif", re.DOTALL)  # the table entry of an item

_WAYS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TURN = {exif: Image.Transpose[way] for exif, way in enumerate(_WAYS.split(), start=2)}  # makes upright


def load_image(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """An RGB picture from a path, the bytes of a picture file, or an open picture; a fresh copy, without metadata.

    A file gives its first frame, an open picture the frame it stands at. EXIF orientation is applied (one that cannot
    be read counts as upright), transparency laid over white, 16-bit and float values scaled to 0..255 (see `_range`).
    Colour profiles are not applied. The size is `(width, height)` from 1 x 1 up to MAX_PIXELS, any shape.

    Raises ImageError, and nothing else, for all that cannot become such a picture; its `kind` is a key of `_REASONS`.
    """
    try:
        return _upright(_decode(source))
    except ReadFailure as refusal:
        given = refusal
    except _BOMBS:
        given = ReadFailure("pixels")
    except Exception:  # noqa: BLE001 - damaged files raise some ten types, OSError is only the most common
        given = ReadFailure("damaged")
    raise _error(source, given)  # out here, so that no text of another library hangs on it


class _LimitedReader(BytesIO):
    """Bytes that are read only so often, and twice over: TIFF tags may all point at the same megabyte."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads, self.bytes = MAX_READS, 2 * len(data) + 2**20

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(size)
        self.reads, self.bytes = self.reads - 1, self.bytes - len(piece)
        if self.reads < 0 or self.bytes < 0:
            raise ReadFailure("effort")
        return piece


def center_square(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The square in the middle of a picture of (width, height) pixels: x0, y0, x1, y1 in 0..1."""
    x, y = ((1 - min(size) / side) / 2 for side in size)
    return (x, y, 1 - x, 1 - y)


def _error(source: object, refusal: ReadFailure) -> ImageError:
    opened = isinstance(source, Image.Image)
    label, name = ("the open picture", "picture") if opened else display_name(source, "picture")
    return ImageError(f"{label}{refusal.detail}: {_REASONS[refusal.kind]}.", code=f"image.{refusal.kind}", source=name)


def _decode(source: object) -> Image.Image:
    """The first frame with its pixels in memory, in its own mode and still lying as stored."""
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, bytes):
        image = _open(source)
    elif isinstance(source, str | os.PathLike):
        image = _open(read_file(os.fsdecode(source), MAX_BYTES))
    else:
        raise ReadFailure("type")
    if not 1 <= image.width * image.height <= MAX_PIXELS:
        raise ReadFailure("pixels", f" of {image.width} x {image.height}")
    image.load()
    return image


def _open(data: bytes) -> Image.Image:
    """The header of a picture: format, size and mode are known, nothing is decoded."""
    if not data:
        raise ReadFailure("empty")
    if len(data) > MAX_BYTES:
        raise ReadFailure("bytes")
    file = _LimitedReader(_limit_decoding_cost(data))
    try:
        image = Image.open(file, formats=FORMATS)
    except (ReadFailure, *_BOMBS):
        raise
    except Exception:  # noqa: BLE001 - as in load_image
        raise ReadFailure("format") from None
    if image.format in ("JPEG", "MPO") and sum(1 for _ in _SCAN.finditer(data)) > MAX_SCANS:
        raise ReadFailure("effort")
    file.reads, file.bytes = 40 * MAX_READS, sys.maxsize  # a BMP may be read run by run, a TIFF far beyond each row
    return image


def _limit_decoding_cost(data: bytes) -> bytes:
    """EXIF that the library would parse while opening, before its length can be looked at, is renamed away.

    A JPEG keeps its first block, at most 64 KB (the library joins all it finds); an AVIF none, it has its own rotation.
    """
    if data.startswith(b"\xff\xd8"):
        head, mark, rest = data.partition(b"Exif\0\0")
        return head + mark + rest.replace(mark, b"none\0\0") if mark else data
    return _AVIF_EXIF.sub(rb"\1none", data) if data[4:8] == b"ftyp" else data


def _upright(image: Image.Image) -> Image.Image:
    """RGB, turned as EXIF says. The metadata goes, else loading the result again would turn it twice."""
    notes = image.info.get("exif") or image.info.get("Raw profile type exif") or b""
    try:
        turn = _TURN.get(image.getexif().get(0x0112, 1)) if len(notes) <= MAX_EXIF else None
    except Exception:  # noqa: BLE001 - a damaged note about a picture does not make it a damaged picture
        turn = None
    rgb = _rgb(image)
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {}
    return rgb


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        raise ReadFailure("colours")
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    straight = image.convert("LA") if image.mode == "La" else image
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(straight.convert("RGBA"))
    return paper.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey, scaled linearly so that `_range` becomes 0..255; NaN becomes black, infinities the ends."""
    values = np.asarray(image).astype(np.float64)  # [height, width]
    low, high = _range(image, values)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    values -= low
    values *= 255
    values /= high - low or 1
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def _range(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """The values that mean black and white.

    16 bits always span 0..65535, so that a dark picture stays dark. 32-bit and float pictures do not say what their
    range is: the first that holds all values is taken of 0..1 (floats only), 0..255 and 0..65535, else their own.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 0, 65535
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ReadFailure("damaged")
    low, high = float(finite.min()), float(finite.max())
    tops = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    fits = [top for top in tops if low >= 0 and high <= top]
    return (0, fits[0]) if fits else (low, high)
