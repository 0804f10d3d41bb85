"""Images: `load_image` turns any supported input into an upright 8-bit RGB image, or raises an `ImageError`.

Every step that can be expensive has a limit that is checked before the step: bytes before parsing, pixels before
decoding. No setting of the decoding library is changed, so `load_image` may be called from many threads and processes.
"""

import os
import re
import sys
from io import BytesIO
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
from PIL import Image

from mmx.errors import ImageError
from mmx.io.files import BinaryFile, ReadFailure, StoredBytes, display_name, failure_messages, read_source
from mmx.io.heic import decode_heic, is_heic

if TYPE_CHECKING:
    from torch import Tensor

ImageInput: TypeAlias = Union[  # noqa: UP007 - the name of a type that is not imported here
    str, os.PathLike[str], bytes, bytearray, memoryview, BinaryFile, StoredBytes, Image.Image, np.ndarray, "Tensor"
]

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000  # width x height; decoding takes about 12 bytes for each, so at most some 600 MB
MAX_SCANS = 200  # scans of a progressive JPEG: each costs a pass over all pixels and takes only 14 bytes of file
MAX_READS = 100_000  # reads for a header: one with a million comments takes hours; pixels may take 40 times as many
MAX_EXIF = 2**17  # bytes: 5,000 tags that all point to the same bytes are copied 5,000 times

# HEIC is read without a plugin of the library, see mmx.io.heic. ICO is missing on purpose: the library decodes it while
# opening, before its size can be checked. So are formats without a signature (any bytes would do) and those that start
# another program (EPS, WMF).
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")

_KNOWN = """
    apng avif bmp gif heic heif hif j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpo pbm pfm pgm png pnm ppm tif tiff webp
"""
SUFFIXES = frozenset(f".{suffix}" for suffix in _KNOWN.split())

# Last part of the error code -> the problem; what was expected; what to do.
_MESSAGES = {
    **failure_messages("image", MAX_BYTES),
    "type": "not a supported type; expected a path, bytes, a binary file, a PIL image or an array; convert it first",
    "format": "unknown format, or damaged at the start; use PNG, JPEG, GIF, BMP, TIFF, WEBP, AVIF, HEIC, JP2; convert",
    "heic_package": "a HEIC image; expected pillow-heif to be installed; type pip install 'mmx[heic]'",
    "pixels": f"too many pixels, or none; expected 1 to {MAX_PIXELS:,} of them; resize the image",
    "effort": "decoding would take too long; expected an ordinary image; save it as a plain JPEG or PNG",
    "color_mode": "this color mode cannot be converted to RGB; expected RGB, gray or CMYK; convert it first",
    "shape": "the shape is not that of one image; expected [H, W] or [H, W, C] of 1, 3 or 4 channels; select one image",
    "dtype": "the type of the values is not supported; expected uint8, or floats in 0..1; convert them first",
    "range": "the values are outside of 0..1; expected uint8, or floats in 0..1; undo the normalization first",
}

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # the latter if warnings are errors
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # marker, length and count must agree
_AVIF_EXIF = re.compile(rb"(infe.{8}(?:..)?)Exif", re.DOTALL)  # the table entry of an item

_ORIENTATIONS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TRANSPOSE = {exif: Image.Transpose[name] for exif, name in enumerate(_ORIENTATIONS.split(), start=2)}


def load_image(source: ImageInput, *, allow_urls: bool = False) -> Image.Image:
    """Return an RGB image of size (width, height), as a new object without metadata.

    The first frame of a file is used, and the current frame of a PIL image. EXIF orientation is applied (an unreadable
    one is ignored), transparency is composited over white, 16-bit and float values are scaled to 0..255. Color profiles
    are not applied.

    Args:
        source: one of
            - a path,
            - the bytes of an image file (bytes, bytearray, memoryview),
            - a binary file object, such as an open file or a BytesIO, read from its start,
            - a PIL image,
            - a NumPy array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], of uint8 or of floats in 0..1,
            - a tensor [H, W], [C, H, W] or [H, W, C] with C = 1, 3 or 4 (channels first if both fit).
        allow_urls: whether a path that starts with http:// or https:// is downloaded, of at most MAX_BYTES. Off by
            default: the caller decides which hosts may be contacted.

    Raises:
        ImageError: the input cannot be read; its code is `image.REASON`, such as image.missing or image.damaged.
    """
    try:
        return _to_upright_rgb(_decode(source, allow_urls))
    except ReadFailure as error:
        failure = error
    except _BOMBS:
        failure = ReadFailure("pixels")
    except Exception:  # noqa: BLE001 - decoders raise about ten types for damaged files
        failure = ReadFailure("damaged")
    raise _image_error(source, failure)  # outside of the handlers, so that no other library's error is chained


def center_square(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the central square of an image of (width, height) pixels as x0, y0, x1, y1 in 0..1."""
    x, y = ((1 - min(size) / side) / 2 for side in size)
    return (x, y, 1 - x, 1 - y)


def surrounding_square(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the square around an image of (width, height) pixels as x0, y0, x1, y1 in 0..1 of the image."""
    width, height = size
    left, top = ((max(size) - side) // 2 for side in size)  # whole pixels, as the image is pasted
    return (-left / width, -top / height, (max(size) - left) / width, (max(size) - top) / height)


# ---- decoding --------------------------------------------------------------------------------------------------


class _LimitedReader(BytesIO):
    """Bytes with a limit on the number of reads, and of bytes read: TIFF tags may all point to the same megabyte."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads = MAX_READS
        self.bytes = 2 * len(data) + 2**20

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(size)
        self.reads -= 1
        self.bytes -= len(piece)
        if self.reads < 0 or self.bytes < 0:
            raise ReadFailure("effort")
        return piece


def _image_error(source: object, failure: ReadFailure) -> ImageError:
    if isinstance(source, Image.Image):
        label, name = "the open image", "image"
    elif _is_array(source):
        label, name = f"an array of shape {list(source.shape)}", "array"  # type: ignore[attr-defined]
    else:
        label, name = display_name(source, "image")
    message = f"{label}{failure.detail}: {_MESSAGES[failure.reason]}."
    return ImageError(message, code=f"image.{failure.reason}", source=name)


def _decode(source: object, allow_urls: bool) -> Image.Image:
    """Return the first frame with its pixels in memory, in its own mode and orientation."""
    if isinstance(source, Image.Image):
        image = source
    elif _is_array(source):
        return _array_to_image(source)
    else:
        data = read_source(source, MAX_BYTES, allow_urls)
        image = decode_heic(data, _check_pixels) if is_heic(data) else _open(data)
    _check_pixels(image.width, image.height)
    image.load()
    return image


def _check_pixels(width: int, height: int) -> None:
    if not 1 <= width * height <= MAX_PIXELS:
        raise ReadFailure("pixels", f" of {width} x {height}")


def _open(data: bytes) -> Image.Image:
    """Parse the header: format, size and mode are known, nothing is decoded."""
    file = _LimitedReader(_limit_decoding_cost(data))
    try:
        image = Image.open(file, formats=FORMATS)
    except (ReadFailure, *_BOMBS):
        raise
    except Exception:  # noqa: BLE001 - as in load_image
        raise ReadFailure("format") from None
    if image.format in ("JPEG", "MPO") and sum(1 for _ in _SCAN.finditer(data)) > MAX_SCANS:
        raise ReadFailure("effort")
    file.reads = 40 * MAX_READS  # a BMP may be read run by run
    file.bytes = sys.maxsize  # a TIFF may be read far beyond each row
    return image


def _limit_decoding_cost(data: bytes) -> bytes:
    """Rename EXIF blocks that the library would parse while opening, before their length can be checked.

    A JPEG keeps its first block, at most 64 KB (the library joins all blocks); an AVIF none, it has its own rotation.
    """
    if data.startswith(b"\xff\xd8"):
        head, marker, rest = data.partition(b"Exif\0\0")
        return head + marker + rest.replace(marker, b"none\0\0") if marker else data
    return _AVIF_EXIF.sub(rb"\1none", data) if data[4:8] == b"ftyp" else data


# ---- arrays ----------------------------------------------------------------------------------------------------


def _is_array(source: object) -> bool:
    torch = sys.modules.get("torch")  # without it there are no tensors
    return isinstance(source, np.ndarray) or (torch is not None and isinstance(source, torch.Tensor))


def _array_to_image(source: object) -> Image.Image:
    """Convert an array or a tensor. Raises ReadFailure."""
    pixels = source if isinstance(source, np.ndarray) else _tensor_to_array(source)  # type: ignore[arg-type]
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise ReadFailure("shape")
    _check_pixels(pixels.shape[1], pixels.shape[0])
    if pixels.dtype != np.uint8:
        pixels = _unit_floats_to_bytes(pixels)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _tensor_to_array(tensor: "Tensor") -> np.ndarray:
    """Channels last, on the CPU."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # NumPy has no bfloat16
    if tensor.ndim == 3 and tensor.shape[0] in (1, 3, 4):
        tensor = tensor.permute(1, 2, 0)
    array: np.ndarray = tensor.numpy()
    return array


def _unit_floats_to_bytes(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind != "f":
        raise ReadFailure("dtype")
    if not (values.min() >= 0 and values.max() <= 1):  # also false for NaN
        raise ReadFailure("range")
    return (values * 255).round().astype(np.uint8)


# ---- conversion to RGB -----------------------------------------------------------------------------------------


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB and apply the EXIF orientation. Metadata is removed, so that it is not applied twice."""
    exif = image.info.get("exif") or image.info.get("Raw profile type exif") or b""
    try:
        orientation = image.getexif().get(0x0112, 1) if len(exif) <= MAX_EXIF else 1
        transpose = _TRANSPOSE.get(orientation)
    except Exception:  # noqa: BLE001 - damaged metadata does not make a damaged image
        transpose = None
    rgb = _to_rgb(image)
    if transpose is not None:
        rgb = rgb.transpose(transpose)
    rgb.info = {}
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        raise ReadFailure("color_mode")
    if image.mode.startswith("I") or image.mode == "F":
        return _to_gray(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    straight_alpha = image.convert("LA") if image.mode == "La" else image
    background = Image.new("RGBA", image.size, "white")
    background.alpha_composite(straight_alpha.convert("RGBA"))
    return background.convert("RGB")


def _to_gray(image: Image.Image) -> Image.Image:
    """Scale linearly so that `_value_range` becomes 0..255; NaN becomes black, infinities the ends of the range."""
    values = np.asarray(image).astype(np.float64)  # [height, width]
    low, high = _value_range(image, values)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    values -= low
    values *= 255
    values /= high - low or 1
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def _value_range(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """Return the values of black and white.

    16-bit images always span 0..65535, so that a dark image stays dark. 32-bit and float files do not state their
    range: the first range that holds all values is used, of 0..1 (floats only), 0..255 and 0..65535, else their own.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 0, 65535
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ReadFailure("damaged")
    low = float(finite.min())
    high = float(finite.max())
    for maximum in (1, 255, 65535) if image.mode == "F" else (255, 65535):
        if low >= 0 and high <= maximum:
            return 0, maximum
    return low, high
