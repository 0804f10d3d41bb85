"""The door for pictures: 56 meanings to the pixel, damaged files, bombs, and everything that is no picture."""

import contextlib
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import GREEN, STORED, UPRIGHT, encode, encodings, handmade, meanings, mutants, png, tags, turned
from PIL import Image, ImageFile

from mmx.errors import ImageError
from mmx.io.images import FORMATS, MAX_BYTES, MAX_PIXELS, SUFFIXES, load_image

pytestmark = pytest.mark.filterwarnings("ignore")  # the library warns about damage; what counts is what comes out
FOREIGN = ("0x", "PIL", "BytesIO", "Error", "Exception", "Warning", "Plugin", "ImageFile", "Traceback", "<")


def refusal(source: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    check(caught.value)
    return caught.value


def check(error: ImageError) -> None:
    """One line, short, ours: no address, no class name, nothing of another error hanging on it."""
    text = str(error)
    assert 20 <= len(text) <= 200, text
    assert text.isprintable(), text
    assert text.endswith("."), text
    assert text.count("; ") == 2, text  # what was given; what was expected; what to do
    assert not [word for word in FOREIGN if word in text], text
    assert error.__cause__ is None
    assert error.__context__ is None


def pixels(image: Image.Image) -> list[list[tuple[int, int, int]]]:
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


# What pictures mean


@pytest.mark.parametrize("name", meanings())
def test_meaning(name: str) -> None:
    make, expected = meanings()[name]
    image = load_image(make())
    assert image.mode == "RGB"
    assert type(image) is Image.Image
    assert image.info == {}
    assert pixels(image) == expected
    assert pixels(load_image(image)) == expected  # loading again changes nothing


def test_no_meaning_was_lost() -> None:
    assert len(meanings()) == 56


@pytest.mark.parametrize("kind, sampling", [("JPEG", 0), ("AVIF", "4:4:4")])
@pytest.mark.parametrize("orientation", STORED)
def test_lossy_pictures_are_turned_too(orientation: int, kind: str, sampling: object) -> None:
    image = np.asarray(load_image(turned(orientation, kind, quality=100, subsampling=sampling)))[..., 0]
    assert image.shape == (2, 3)
    assert np.abs(image.astype(int) - UPRIGHT).max() <= 3  # quality 100 rounds twice


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_lossy_colour_is_near(kind: str) -> None:
    image = np.asarray(load_image(encode(Image.new("RGB", (16, 16), (200, 100, 50)), kind))).astype(int)
    assert image.shape == (16, 16, 3)
    assert np.abs(image - (200, 100, 50)).max() <= 4


def test_cmyk_jpeg_is_near() -> None:
    image = load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(np.asarray(image).astype(int) - (255, 0, 0)).max() <= 4


def test_16_bits_keep_their_mean() -> None:
    ramp = np.linspace(0, 65535, 10_000).astype(np.uint16).reshape(100, 100)
    assert abs(np.asarray(load_image(encode(Image.fromarray(ramp), "PNG"))).mean() - 127.5) < 0.05


def test_a_dark_16_bit_picture_stays_dark() -> None:
    assert np.asarray(load_image(encode(Image.fromarray(np.full((4, 4), 200, np.uint16)), "PNG"))).max() == 1


def test_an_open_picture_is_left_alone() -> None:
    image = Image.open(BytesIO(turned(6)))
    assert pixels(load_image(image)) == pixels(load_image(turned(1)))
    assert (image.size, image.getexif()[0x0112], "exif" in image.info) == ((2, 3), 6, True)


def test_an_open_picture_gives_the_frame_it_stands_at() -> None:
    image = Image.open(BytesIO(meanings()["animated webp"][0]()))
    image.seek(1)
    assert pixels(load_image(image)) == [[GREEN, GREEN]] * 2
    assert image.tell() == 1


def test_damaged_exif_counts_as_upright() -> None:
    data = turned(6, "JPEG").replace(b"MM\0*", b"XX\0*")
    assert load_image(data).size == (2, 3)


def test_rows_may_be_stored_one_by_one() -> None:
    image = Image.effect_noise((50, 3000), 60)
    assert (
        pixels(load_image(encode(image, "TIFF", strip_size=1, compression="tiff_lzw")))[7]
        == pixels(load_image(image))[7]
    )


def test_paths_and_bytes_are_the_same(tmp_path: Path) -> None:
    for name, data in encodings().items():
        file = tmp_path / name
        file.write_bytes(data)
        if name in ("ico", "tga"):
            assert refusal(file).kind == refusal(data).kind == "format"
        else:
            assert pixels(load_image(file)) == pixels(load_image(str(file))) == pixels(load_image(data))
            assert load_image(data).size == ((20, 24) if name == "jpeg" else (24, 20))


# What is refused


@pytest.mark.parametrize("name", handmade())
def test_handmade(name: str) -> None:
    data, kind = handmade()[name]
    start = time.perf_counter()
    assert refusal(data).kind == kind
    assert time.perf_counter() - start < 2  # they take 0.2 s at most; twenty times that before the limits


def test_none_was_lost_from_those_made_by_hand() -> None:
    assert len(handmade()) == 61


@pytest.mark.parametrize("count, good", [(500, 88), pytest.param(5000, 851, marks=pytest.mark.slow)])
def test_mutants(count: int, good: int) -> None:
    loaded, slowest = 0, 0.0
    for data in mutants(count):
        start = time.perf_counter()
        try:
            image = load_image(data)
            assert image.mode == "RGB"
            loaded += 1
        except ImageError as error:
            check(error)
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 1
    assert abs(loaded - good) <= count // 50  # versions of the decoders differ over a handful


@pytest.mark.parametrize("name", [name for name in encodings() if name not in ("ico", "tga")])
def test_half_a_file_is_never_a_picture(name: str) -> None:
    data = encodings()[name]
    for part in (0.3, 0.5, 0.7, 0.9):
        assert refusal(data[: int(len(data) * part)]).kind in ("damaged", "format")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"P6 ", b"\xff\xd8\xff"]), st.binary())
def test_any_bytes_give_a_picture_or_our_refusal(front: bytes, rest: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert load_image(front + rest).mode == "RGB"
        except ImageError as error:
            check(error)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    inside = tmp_path / "empty.png" / "x.png"
    kinds = {
        tmp_path / "empty.png": "empty",
        tmp_path / "pipe.png": "special",
        tmp_path / "loop.png": "unreadable",
        tmp_path / "none.png": "missing",
        tmp_path: "folder",
        inside: "missing",
        "/dev/zero": "special",
        "": "missing",
        "a\0b": "missing",
        "two\nlines\x1b[31m.png": "missing",
        "\udcff.png": "missing",
        "x" * 5000: "unreadable",
        "https://example.org/cat.png": "address",
        "data:image/png;base64," + "A" * 5000: "address",
    }
    for source, kind in kinds.items():
        error = refusal(source)
        assert (error.kind, error.source) == (kind, str(source))


def test_long_paths_keep_their_end() -> None:
    error = refusal("/a/very/long" * 20 + "/cat.png")
    assert "/cat.png': there is no such file" in str(error)
    assert len(str(error)) < 150


@pytest.mark.parametrize("source", [None, 3, [b""], bytearray(b"x"), BytesIO(b"x"), np.zeros((2, 2, 3), np.uint8)])
def test_other_values(source: object) -> None:
    assert refusal(source).kind == "type"


def test_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"x")

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("builtins.open", deny)  # as root, no mode bits would stop us
    assert refusal(file).kind == "permission"


def test_too_many_bytes(tmp_path: Path) -> None:
    file = tmp_path / "big.png"
    with open(file, "wb") as out:
        out.truncate(MAX_BYTES + 1)
    assert refusal(file).kind == "bytes"
    assert refusal(bytes(MAX_BYTES + 1)).kind == "bytes"
    assert refusal(bytes(MAX_BYTES)).kind == "format"


def test_open_pictures_have_limits_too() -> None:
    assert refusal(Image.new("L", (0, 5))).kind == "pixels"
    assert refusal(Image.new("1", (MAX_PIXELS + 1, 1))).kind == "pixels"
    assert refusal(Image.new("LAB", (2, 2))).kind == "colours"
    assert refusal(Image.fromarray(np.full((2, 2), np.nan, np.float32))).kind == "damaged"
    closed = Image.open(BytesIO(png(2, 2, b"\0" * 6)))
    closed.close()
    assert refusal(closed).kind == "damaged"


def test_the_size_is_named() -> None:
    assert "of 13000 x 13000: too many pixels" in str(refusal(png(13_000, 13_000)))


# Bombs


MEASURE = """
import resource, sys, time, warnings
warnings.simplefilter("ignore")
from mmx.errors import ImageError
from mmx.io.images import load_image
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
data = open(sys.argv[1], "rb").read()
before, start = peak(), time.perf_counter()
try:
    load_image(data)
    kind = "picture"
except ImageError as error:
    kind = error.kind
print(kind, time.perf_counter() - start, peak() - before)
"""


def gif_of_comments() -> bytes:
    return b"GIF89a\x04\0\x04\0\0\0\0" + b"!\xfe\x01a\0" * 1_000_000


BOMBS = {
    "20000 x 20000": (lambda: png(20_000, 20_000, b"\0" * 10**7), "pixels"),
    "13000 x 13000": (lambda: png(13_000, 13_000, b"\0" * 10**7), "pixels"),
    "just over": (lambda: png(7072, 7072, b"\0" * 10**7), "pixels"),
    "tags": (lambda: tags(60_000, 10**6), "effort"),
    "comments": (gif_of_comments, "effort"),
    "exif": (lambda: exif_in_pieces(10_000, 120_000), "picture"),
    "text": (lambda: png(4, 4, b"\0" * 20, png(1, 1, b"\0" * 10**8)[33:-12].replace(b"IDAT", b"zTXt")), "format"),
}


def exif_in_pieces(count: int, length: int) -> bytes:
    """A JPEG whose many EXIF blocks, joined, are a TIFF of many large tags."""
    jpeg, note = encode(Image.new("L", (8, 8)), "JPEG"), tags(count, length)
    blocks = [b"Exif\0\0" + note[at : at + 65_000] for at in range(0, len(note), 65_000)]
    return jpeg[:2] + b"".join(b"\xff\xe1" + (len(b) + 2).to_bytes(2, "big") + b for b in blocks) + jpeg[20:]


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little(name: str, tmp_path: Path) -> None:
    make, expected = BOMBS[name]
    file = tmp_path / "bomb"
    file.write_bytes(make())
    command = [sys.executable, "-c", MEASURE, str(file)]
    kind, seconds, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert kind == expected
    assert float(seconds) < 2  # 0.1 s on an idle core
    assert float(megabytes) < 50


def test_bombs_are_refused_where_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(png(13_000, 13_000)).kind == "pixels"


def test_the_limit_itself_is_a_picture() -> None:
    assert load_image(png(5000, 2000, b"\0" * 5001 * 2000)).size == (5000, 2000)


# Neighbours


def test_nothing_global_changes() -> None:
    state = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    for data in [*encodings().values(), *(data for data, _ in handmade().values())]:
        with contextlib.suppress(ImageError):
            load_image(data)
    assert state == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


def test_many_threads_agree() -> None:
    files = [data for name, data in encodings().items() if name not in ("ico", "tga")]
    alone = [pixels(load_image(data)) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: pixels(load_image(data)), files * 8))
    assert together == alone * 8


def test_importing_loads_no_decoder() -> None:
    code = "import sys, mmx.io.images; print('torch' in sys.modules, 'PIL.PngImagePlugin' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_known_suffixes_can_be_read() -> None:
    Image.init()
    assert {Image.EXTENSION.get(suffix) for suffix in SUFFIXES} <= {*FORMATS, "MPO"}
    assert len(SUFFIXES) == 24
