"""Images for the tests of `mmx.io.images`: 56 modes with expected pixels, 16 encodings, and damaged files."""

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO

import numpy as np
from PIL import Image

Pixel = tuple[int, int, int]
Rows = list[list[Pixel]]

BLACK, WHITE, RED, GREEN, BLUE = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def one_row(mode: str, *pixels: object) -> Image.Image:
    """One row of pixels."""
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def gray_row(kind: str, *values: float) -> Image.Image:
    """One row of gray values of an array type."""
    return Image.fromarray(np.array([values], kind))


def gray(*values: int) -> Rows:
    return [[(value, value, value) for value in values]]


def palette(*colors: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    image = Image.new("P", (len(colors), 1))
    image.putpalette([value for color in colors for value in color], mode)
    image.putdata(range(len(colors)))
    return image


UPRIGHT = [[10, 60, 110], [160, 210, 250]]
STORED = {  # EXIF orientation -> pixels as stored, from the table of the standard
    1: [[10, 60, 110], [160, 210, 250]],
    2: [[110, 60, 10], [250, 210, 160]],
    3: [[250, 210, 160], [110, 60, 10]],
    4: [[160, 210, 250], [10, 60, 110]],
    5: [[10, 160], [60, 210], [110, 250]],
    6: [[110, 250], [60, 210], [10, 160]],
    7: [[250, 110], [210, 60], [160, 10]],
    8: [[160, 10], [210, 60], [250, 110]],
}


def rotated(orientation: int, kind: str = "PNG", **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.array(STORED.get(orientation, UPRIGHT), np.uint8))
    return encode(image.convert("RGB"), kind, exif=exif, **options)


def frames(kind: str, **options: object) -> bytes:
    first, *others = (Image.new("RGB", (2, 2), color) for color in (RED, GREEN, BLUE))
    return encode(first, kind, save_all=True, append_images=others, **options)


def image_modes() -> dict[str, tuple[Callable[[], bytes | Image.Image], Rows]]:
    """Name -> (function that makes the image, expected pixels)."""
    rgb = one_row("RGB", RED, (1, 2, 3))
    transparent = one_row("RGBA", (255, 0, 0, 0), (0, 0, 0, 128), (0, 0, 255, 255))
    on_white = [[WHITE, (127, 127, 127), BLUE]]
    wide = gray_row("uint16", 0, 257, 32896, 65535)
    cases: dict[str, tuple[Callable[[], bytes | Image.Image], Rows]] = {
        "bits": (lambda: encode(one_row("1", 0, 255), "PNG"), gray(0, 255)),
        "gray": (lambda: encode(one_row("L", 0, 7, 255), "PNG"), gray(0, 7, 255)),
        "rgb png": (lambda: encode(rgb, "PNG"), [[RED, (1, 2, 3)]]),
        "rgb bmp": (lambda: encode(rgb, "BMP"), [[RED, (1, 2, 3)]]),
        "rgb ppm": (lambda: encode(rgb, "PPM"), [[RED, (1, 2, 3)]]),
        "rgb webp": (lambda: encode(rgb, "WEBP", lossless=True, exact=True), [[RED, (1, 2, 3)]]),
        "rgb tiff": (lambda: encode(rgb, "TIFF", compression="tiff_lzw"), [[RED, (1, 2, 3)]]),
        "rgb jpeg 2000": (lambda: encode(rgb, "JPEG2000"), [[RED, (1, 2, 3)]]),
        "rgba png": (lambda: encode(transparent, "PNG"), on_white),
        "rgba webp": (lambda: encode(transparent, "WEBP", lossless=True, exact=True), on_white),
        "gray alpha": (lambda: encode(one_row("LA", (0, 0), (0, 128), (9, 255)), "PNG"), gray(255, 127, 9)),
        "gray premultiplied": (lambda: one_row("LA", (0, 0), (0, 128), (9, 255)).convert("La"), gray(255, 127, 9)),
        "rgba premultiplied": (lambda: transparent.convert("RGBa"), on_white),
        "gray, one value transparent": (lambda: encode(one_row("L", 0, 9), "PNG", transparency=0), gray(255, 9)),
        "rgb, one value transparent": (lambda: encode(rgb, "PNG", transparency=RED), [[WHITE, (1, 2, 3)]]),
        "palette": (lambda: encode(palette(RED, BLUE), "PNG"), [[RED, BLUE]]),
        "palette, one transparent": (lambda: encode(palette(RED, BLUE), "PNG", transparency=0), [[WHITE, BLUE]]),
        "palette, some transparent": (
            lambda: encode(palette(BLACK, BLACK, BLUE), "PNG", transparency=b"\x00\x80\xff"),
            on_white,
        ),
        "palette of rgba": (lambda: palette((*RED, 0), (*BLACK, 128), (*BLUE, 255), mode="RGBA"), on_white),
        "palette and alpha": (lambda: palette(RED, BLUE).convert("PA"), [[RED, BLUE]]),
        "gif, transparent": (lambda: encode(palette(RED, BLUE), "GIF", transparency=0), [[WHITE, BLUE]]),
        "cmyk tiff": (lambda: encode(one_row("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "TIFF"), [[RED, BLACK]]),
        "ycbcr": (lambda: one_row("YCbCr", (0, 128, 128), (255, 128, 128)), gray(0, 255)),
        "hsv": (lambda: one_row("HSV", (0, 255, 255), (0, 0, 9)), [[RED, (9, 9, 9)]]),
        "16 bit png": (lambda: encode(wide, "PNG"), gray(0, 1, 128, 255)),
        "16 bit tiff": (lambda: encode(wide, "TIFF"), gray(0, 1, 128, 255)),
        "16 bit pgm": (lambda: encode(wide, "PPM"), gray(0, 1, 128, 255)),
        "16 bit, big endian": (lambda: gray_row(">u2", 0, 257, 65535), gray(0, 1, 255)),
        "12 bit pgm": (lambda: b"P5 3 1 4095\n" + struct.pack(">3H", 0, 2048, 4095), gray(0, 128, 255)),
        "integers to 255": (lambda: gray_row("int32", 0, 9, 255), gray(0, 9, 255)),
        "integers to 65535": (lambda: gray_row("int32", 0, 257, 65535), gray(0, 1, 255)),
        "integers, own range": (lambda: encode(gray_row("int32", -100, 0, 100), "TIFF"), gray(0, 128, 255)),
        "floats to 1": (lambda: encode(gray_row("float32", 0, 0.2, 1), "TIFF"), gray(0, 51, 255)),
        "floats to 255": (lambda: gray_row("float32", 0, 51, 255), gray(0, 51, 255)),
        "floats, own range": (lambda: gray_row("float32", -1, 0, 3), gray(0, 64, 255)),
        "floats with holes": (lambda: gray_row("float32", 0, np.nan, 1, np.inf, -np.inf), gray(0, 0, 255, 255, 0)),
        "flat floats": (lambda: gray_row("float32", -5, -5), gray(0, 0)),
        "animated gif": (lambda: frames("GIF"), [[RED, RED]] * 2),
        "animated png": (lambda: frames("PNG"), [[RED, RED]] * 2),
        "animated webp": (lambda: frames("WEBP", lossless=True), [[RED, RED]] * 2),
        "pages of a tiff": (lambda: frames("TIFF"), [[RED, RED]] * 2),
        "1 x 1": (lambda: encode(one_row("RGB", (7, 8, 9)), "PNG"), [[(7, 8, 9)]]),
        "1 x 20000": (lambda: encode(Image.new("L", (1, 20_000), 9), "PNG"), gray(9) * 20_000),
        "20000 x 1": (lambda: encode(Image.new("L", (20_000, 1), 9), "PNG"), gray(*[9] * 20_000)),
    }
    upright = [row for values in UPRIGHT for row in gray(*values)]
    for orientation in (0, *STORED, 9):
        cases[f"exif {orientation}"] = (lambda number=orientation: rotated(number), upright)
    cases["exif 6 tiff"] = (lambda: rotated(6, "TIFF"), upright)
    cases["exif 6 webp"] = (lambda: rotated(6, "WEBP", lossless=True), upright)
    return cases


def encodings() -> dict[str, bytes]:
    """One small noisy image in all formats, including ICO and TGA, which are refused."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    formats: dict[str, tuple[str, dict[str, object]]] = {
        "png": ("PNG", {}),
        "jpeg": ("JPEG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
        "jpeg progressive": ("JPEG", {"progressive": True}),
        "bmp": ("BMP", {}),
        "tiff": ("TIFF", {}),
        "tiff lzw": ("TIFF", {"compression": "tiff_lzw"}),
        "tiff jpeg": ("TIFF", {"compression": "jpeg"}),
        "webp": ("WEBP", {}),
        "webp lossless": ("WEBP", {"lossless": True}),
        "ppm": ("PPM", {}),
        "avif": ("AVIF", {}),
        "jp2": ("JPEG2000", {}),
        "ico": ("ICO", {}),
        "tga": ("TGA", {}),
    }
    files = {name: encode(image, kind, **options) for name, (kind, options) in formats.items()}
    return files | {"gif": encode(image.quantize(64), "GIF"), "16 bit": encode(image.convert("I;16"), "PNG")}


def mutants(count: int, seed: int = 0) -> Iterator[bytes]:
    """Damaged files, equal for a seed: flipped bits (half of them near the start), truncation, splices of two files."""
    generator = random.Random(seed)
    files = list(encodings().values())
    for number in range(count):
        data = bytearray(files[number % len(files)])
        match number // len(files) % 3:
            case 0:
                reach = generator.choice((64, len(data)))
                for _ in range(generator.randint(1, 12)):
                    data[generator.randrange(min(reach, len(data)))] ^= 1 << generator.randrange(8)
            case 1:
                del data[generator.randrange(len(data)) :]
            case 2:
                other = generator.choice(files)
                position = generator.randrange(len(data))
                data[position:] = other[generator.randrange(len(other)) :]
        yield bytes(data)


def png(width: int, height: int, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A gray PNG whose header declares a size, whatever its content."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = _chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + _chunk(b"IEND", b"")


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def tags(count: int, length: int) -> bytes:
    """A TIFF with many tags that point to the same bytes: small, but every tag is a copy."""
    table = b"".join(struct.pack("<HHII", 1000 + number, 1, length, 8) for number in range(count))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", count) + table).ljust(length + 16, b"\0")


def malformed() -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes, last part of the expected error code)."""
    jpeg, gif = encode(Image.new("L", (8, 8)), "JPEG"), b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0, 0, 0)
    slow = encode(Image.new("L", (64, 64)), "JPEG", progressive=True)
    scan = slow[slow.rfind(b"\xff\xda") : -2]
    foreign = ("ICO", "TGA", "PCX", "QOI", "DDS", "ICNS", "SGI", "EPS")
    starts = b"\0", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"P6\n", b"BM", b"RIFF\0\0\0\0WEBP"
    others = b"not a picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"
    junk = b"\0" * 1000, b"\xff" * 1000, b"PK\x03\x04" + b"\0" * 100, "Text \u4f60".encode(), b"8BPS\0\x01"
    headers = png(0, 4), png(4, 0), b"P6 -4 4 255\n", b"P5 a b 255\n", b"P6 4 4 0\n", png(4, 4)[:30], jpeg[:20], gif
    boxes = tags(0, 0), tags(3, 10**5)[:200], b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x1cftypavif"
    claims = (20_000, 20_000), (2**30, 2**30), (2**31, 4), (13_000, 13_000), (50_000_001, 1), (7072, 7072)
    frame = b"GIF89a" + b"\xff" * 4 + b"\0\0\0,\0\0\0\0\x04\0\x04\0\0\x02\0;"
    cut = png(4, 4), png(4, 4, b"\0" * 19), png(7000, 7000), encodings()["jpeg"][:-100]
    comments = gif + b"!\xfe\x01a\0" * 50_000, gif + b"!\xfe" + b"\x01a" * 100_000 + b"\0", b"P6\n" + b"#" * 200_000
    segments = jpeg[:2] + b"\xff\xfe\x00\x04ab" * 50_000 + jpeg[2:], slow[:-2] + scan * 250 + slow[-2:]
    chunks = png(4, 4, b"\0" * 20, _chunk(b"tEXt", b"k\0v") * 50_000)
    cases: dict[str, list[bytes]] = {
        "empty": [b""],
        "format": [*starts, *others, *junk, *headers, *boxes, *(encode(Image.new("RGB", (4, 4)), k) for k in foreign)],
        "pixels": [*(png(*claim) for claim in claims), b"P6 20000 20000 255\n", b"P1 100000 100000\n", frame],
        "damaged": [*cut, b"P6 4 4 255\n\0", b"P1 4 4\n012", b"P6 4 4 255"],
        "effort": [tags(60_000, 10**6), *comments, *segments, chunks],
    }
    named: dict[str, tuple[bytes, str]] = {}
    for reason, group in cases.items():
        for number, data in enumerate(group):
            named[f"{reason} {number}"] = (data, reason)
    return named
