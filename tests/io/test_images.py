"""`load_image`: 56 image modes to the pixel, all input types, damaged files, decompression bombs, refused inputs."""

import contextlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import GREEN, STORED, UPRIGHT, encode, encodings, image_modes, malformed, mutants, png, rotated, tags
from PIL import Image, ImageFile

from mmx.errors import ImageError
from mmx.io.images import FORMATS, MAX_BYTES, MAX_PIXELS, SUFFIXES, load_image

pytestmark = pytest.mark.filterwarnings("ignore")  # the library warns about damaged files
HEIC = {".heic", ".heif", ".hif"}  # read by pillow-heif, see test_heic.py
FOREIGN = ("0x", "PIL", "BytesIO", "Error", "Exception", "Warning", "Plugin", "ImageFile", "Traceback", "<")


def load_error(source: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    check_message(caught.value)
    return caught.value


def check_message(error: ImageError) -> None:
    """One short line: no memory address, no class name of a library, no chained exception."""
    text = str(error)
    assert 20 <= len(text) <= 200, text
    assert text.isprintable(), text
    assert text.endswith("."), text
    assert text.count("; ") == 2, text  # the problem; what was expected; what to do
    assert not [word for word in FOREIGN if word in text], text
    assert error.__cause__ is None
    assert error.__context__ is None


def pixels(image: Image.Image) -> list[list[tuple[int, int, int]]]:
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


# ---- image modes


@pytest.mark.parametrize("name", image_modes())
def test_image_mode(name: str) -> None:
    make, expected = image_modes()[name]
    image = load_image(make())
    assert image.mode == "RGB"
    assert type(image) is Image.Image
    assert image.info == {}
    assert pixels(image) == expected
    assert pixels(load_image(image)) == expected  # loading again changes nothing


def test_number_of_image_modes() -> None:
    assert len(image_modes()) == 56


@pytest.mark.parametrize("kind, sampling", [("JPEG", 0), ("AVIF", "4:4:4")])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_of_lossy_formats(orientation: int, kind: str, sampling: object) -> None:
    image = np.asarray(load_image(rotated(orientation, kind, quality=100, subsampling=sampling)))[..., 0]
    assert image.shape == (2, 3)
    assert np.abs(image.astype(int) - UPRIGHT).max() <= 3  # quality 100 rounds twice


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_lossy_color_is_close(kind: str) -> None:
    image = np.asarray(load_image(encode(Image.new("RGB", (16, 16), (200, 100, 50)), kind))).astype(int)
    assert image.shape == (16, 16, 3)
    assert np.abs(image - (200, 100, 50)).max() <= 4


def test_cmyk_jpeg_is_close() -> None:
    image = load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(np.asarray(image).astype(int) - (255, 0, 0)).max() <= 4


def test_the_mean_of_16_bit_images() -> None:
    ramp = np.linspace(0, 65535, 10_000).astype(np.uint16).reshape(100, 100)
    assert abs(np.asarray(load_image(encode(Image.fromarray(ramp), "PNG"))).mean() - 127.5) < 0.05


def test_a_dark_16_bit_image_stays_dark() -> None:
    assert np.asarray(load_image(encode(Image.fromarray(np.full((4, 4), 200, np.uint16)), "PNG"))).max() == 1


def test_a_pil_image_is_not_changed() -> None:
    image = Image.open(BytesIO(rotated(6)))
    assert pixels(load_image(image)) == pixels(load_image(rotated(1)))
    assert (image.size, image.getexif()[0x0112], "exif" in image.info) == ((2, 3), 6, True)


def test_the_current_frame_of_a_pil_image_is_used() -> None:
    image = Image.open(BytesIO(image_modes()["animated webp"][0]()))
    image.seek(1)
    assert pixels(load_image(image)) == [[GREEN, GREEN]] * 2
    assert image.tell() == 1


def test_damaged_exif_is_ignored() -> None:
    data = rotated(6, "JPEG").replace(b"MM\0*", b"XX\0*")
    assert load_image(data).size == (2, 3)


def test_a_tiff_with_one_strip_per_row() -> None:
    image = Image.effect_noise((50, 3000), 60)
    assert (
        pixels(load_image(encode(image, "TIFF", strip_size=1, compression="tiff_lzw")))[7]
        == pixels(load_image(image))[7]
    )


def test_paths_and_bytes_give_equal_images(tmp_path: Path) -> None:
    for name, data in encodings().items():
        file = tmp_path / name
        file.write_bytes(data)
        if name in ("ico", "tga"):
            assert load_error(file).code == load_error(data).code == "image.format"
        else:
            assert pixels(load_image(file)) == pixels(load_image(str(file))) == pixels(load_image(data))
            assert load_image(data).size == ((20, 24) if name == "jpeg" else (24, 20))


# ---- refused inputs


@pytest.mark.parametrize("name", malformed())
def test_malformed_file(name: str) -> None:
    data, reason = malformed()[name]
    start = time.perf_counter()
    assert load_error(data).code == f"image.{reason}"
    assert time.perf_counter() - start < 2  # at most 0.2 s on an idle core; without the limits twenty times that


def test_number_of_malformed_files() -> None:
    assert len(malformed()) == 61


@pytest.mark.parametrize("count, good", [(500, 88), pytest.param(5000, 851, marks=pytest.mark.slow)])
def test_mutated_files(count: int, good: int) -> None:
    loaded, slowest = 0, 0.0
    for data in mutants(count):
        start = time.perf_counter()
        try:
            image = load_image(data)
            assert image.mode == "RGB"
            loaded += 1
        except ImageError as error:
            check_message(error)
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 1
    assert abs(loaded - good) <= count // 50  # decoder versions differ in a few files


@pytest.mark.parametrize("name", [name for name in encodings() if name not in ("ico", "tga")])
def test_a_truncated_file_is_refused(name: str) -> None:
    data = encodings()[name]
    for part in (0.3, 0.5, 0.7, 0.9):
        assert load_error(data[: int(len(data) * part)]).code in ("image.damaged", "image.format")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"P6 ", b"\xff\xd8\xff"]), st.binary())
def test_any_bytes_give_an_image_or_an_image_error(front: bytes, rest: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert load_image(front + rest).mode == "RGB"
        except ImageError as error:
            check_message(error)


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    inside = tmp_path / "empty.png" / "x.png"
    reasons = {
        tmp_path / "empty.png": "empty",
        tmp_path / "pipe.png": "not_a_file",
        tmp_path / "loop.png": "unreadable",
        tmp_path / "none.png": "missing",
        tmp_path: "folder",
        inside: "missing",
        "/dev/zero": "not_a_file",
        "": "missing",
        "a\0b": "missing",
        "two\nlines\x1b[31m.png": "missing",
        "\udcff.png": "missing",
        "x" * 5000: "unreadable",
        "https://example.org/cat.png": "url",
        "data:image/png;base64," + "A" * 5000: "url",
    }
    for source, reason in reasons.items():
        error = load_error(source)
        assert (error.code, error.details["source"]) == (f"image.{reason}", str(source))


def test_messages_keep_the_end_of_long_paths() -> None:
    error = load_error("/a/very/long" * 20 + "/cat.png")
    assert "/cat.png': there is no such file" in str(error)
    assert len(str(error)) < 150


@pytest.mark.parametrize("source", [None, 3, [b""], {"image": "a.png"}, object(), StringIO("x")])
def test_other_types_are_named(source: object) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert caught.value.code == "image.type"
    assert f"type {type(source).__name__}" in str(caught.value) or isinstance(source, StringIO)


# ---- input types


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_bytes_like_objects_and_binary_files(tmp_path: Path) -> None:
    data = encode(Image.fromarray(PIXELS), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    buffer = BytesIO(data)
    buffer.seek(0, os.SEEK_END)  # as after writing: files are read from their start
    with path.open("rb") as file, path.open("rb", buffering=0) as unbuffered:
        for source in (data, bytearray(data), memoryview(data), buffer, file, unbuffered, file):
            assert np.array_equal(np.asarray(load_image(source)), PIXELS)
    with path.open("rb") as file:
        path.write_bytes(b"x")
        assert load_error(file).details["source"] == str(path)
    assert load_error(BytesIO(b"")).code == "image.empty"
    assert load_error(BytesIO(bytes(MAX_BYTES + 1))).code == "image.too_large"


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_arrays_and_tensors(channels: int | None, dtype: str) -> None:
    alpha = np.full((5, 7, 1), 255, np.uint8)
    values = {None: PIXELS[..., 0], 1: PIXELS[..., :1], 3: PIXELS, 4: np.concatenate([PIXELS, alpha], 2)}[channels]
    expected = PIXELS if channels in (3, 4) else PIXELS[..., :1].repeat(3, 2)
    array = values if dtype == "uint8" else (values / 255).astype(dtype)
    sources = [array, array[::-1][::-1], torch.from_numpy(array)]
    if channels is not None:
        sources.append(torch.from_numpy(array).permute(2, 0, 1))
    for source in sources:
        assert np.array_equal(np.asarray(load_image(source)), expected)


def test_tensors_of_other_devices_and_types_are_converted() -> None:
    tensor = torch.rand(3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    expected = (tensor.detach().float() * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(load_image(tensor)), expected)
    assert load_image(torch.zeros(3, 3, 9)).size == (9, 3), "channels first if both fit"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((2, 2, 2), np.uint8), "shape"),
        (np.zeros((3, 4, 5), np.uint8), "shape"),
        (np.zeros((1, 4, 4, 3), np.uint8), "shape"),
        (np.zeros(4, np.uint8), "shape"),
        (torch.zeros(1, 3, 8, 8), "shape"),
        (np.zeros((0, 4), np.uint8), "pixels"),
        (np.broadcast_to(np.uint8(0), (MAX_PIXELS + 1, 1)), "pixels"),
        (np.zeros((4, 4), np.int64), "dtype"),
        (np.zeros((4, 4), bool), "dtype"),
        (np.array([["a"]]), "dtype"),
        (torch.zeros(4, 4, dtype=torch.int32), "dtype"),
        (np.full((4, 4), 1.5), "range"),
        (np.full((4, 4), np.nan), "range"),
        (torch.randn(3, 8, 8), "range"),
    ],
)
def test_arrays_that_are_refused(source: object, reason: str) -> None:
    assert load_error(source).code == f"image.{reason}"


class Handler(BaseHTTPRequestHandler):
    """/image is an image, /moved redirects to it, /large is over the limit, /file redirects to a local file."""

    def do_GET(self) -> None:
        location = {"/moved": "/image", "/file": "file:///etc/passwd"}.get(self.path)
        self.send_response(302 if location else 404 if self.path == "/gone" else 200)
        if location:
            self.send_header("Location", location)
        self.end_headers()
        if self.path == "/image":
            self.wfile.write(encode(Image.fromarray(PIXELS), "PNG"))
        if self.path == "/large":
            with contextlib.suppress(OSError):
                self.wfile.write(bytes(MAX_BYTES + 2))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_urls_are_downloaded_only_on_request(host: str) -> None:
    error = load_error(f"{host}/image")
    assert (error.code, "allow_urls" in str(error)) == ("image.url", True)
    for path in ("/image", "/moved"):
        assert np.array_equal(np.asarray(load_image(f"{host}{path}", allow_urls=True)), PIXELS)


@pytest.mark.parametrize(
    ("path", "reason"), [("/gone", "download"), ("/large", "too_large"), ("/file", "download"), ("/empty", "empty")]
)
def test_downloads_that_fail(host: str, path: str, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(host + path, allow_urls=True)
    check_message(caught.value)
    assert caught.value.code == f"image.{reason}"


def test_other_protocols_are_not_downloaded() -> None:
    for url in ("ftp://127.0.0.1/a.png", "file:///etc/passwd", "data:image/png;base64,AAAA"):
        with pytest.raises(ImageError) as caught:
            load_image(url, allow_urls=True)
        assert caught.value.code == "image.url"


def test_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"x")

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("builtins.open", deny)  # as root, no mode bits would stop us
    assert load_error(file).code == "image.permission"


def test_too_many_bytes(tmp_path: Path) -> None:
    file = tmp_path / "big.png"
    with open(file, "wb") as out:
        out.truncate(MAX_BYTES + 1)
    assert load_error(file).code == "image.too_large"
    assert load_error(bytes(MAX_BYTES + 1)).code == "image.too_large"
    assert load_error(bytes(MAX_BYTES)).code == "image.format"


def test_limits_of_pil_images() -> None:
    assert load_error(Image.new("L", (0, 5))).code == "image.pixels"
    assert load_error(Image.new("1", (MAX_PIXELS + 1, 1))).code == "image.pixels"
    assert load_error(Image.new("LAB", (2, 2))).code == "image.color_mode"
    assert load_error(Image.fromarray(np.full((2, 2), np.nan, np.float32))).code == "image.damaged"
    closed = Image.open(BytesIO(png(2, 2, b"\0" * 6)))
    closed.close()
    assert load_error(closed).code == "image.damaged"


def test_the_message_names_the_size() -> None:
    assert "of 13000 x 13000: too many pixels" in str(load_error(png(13_000, 13_000)))


# ---- decompression bombs


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
    result = "loaded"
except ImageError as error:
    result = error.code
print(result, time.perf_counter() - start, peak() - before)
"""


def gif_of_comments() -> bytes:
    return b"GIF89a\x04\0\x04\0\0\0\0" + b"!\xfe\x01a\0" * 1_000_000


BOMBS = {
    "20000 x 20000": (lambda: png(20_000, 20_000, b"\0" * 10**7), "pixels"),
    "13000 x 13000": (lambda: png(13_000, 13_000, b"\0" * 10**7), "pixels"),
    "just over": (lambda: png(7072, 7072, b"\0" * 10**7), "pixels"),
    "tags": (lambda: tags(60_000, 10**6), "effort"),
    "comments": (gif_of_comments, "effort"),
    "exif": (lambda: exif_in_pieces(10_000, 120_000), "loaded"),
    "text": (lambda: png(4, 4, b"\0" * 20, png(1, 1, b"\0" * 10**8)[33:-12].replace(b"IDAT", b"zTXt")), "format"),
}


def exif_in_pieces(count: int, length: int) -> bytes:
    """A JPEG whose EXIF blocks, joined, are a TIFF of many large tags."""
    jpeg = encode(Image.new("L", (8, 8)), "JPEG")
    exif = tags(count, length)
    blocks = [b"Exif\0\0" + exif[start : start + 65_000] for start in range(0, len(exif), 65_000)]
    return jpeg[:2] + b"".join(b"\xff\xe1" + (len(b) + 2).to_bytes(2, "big") + b for b in blocks) + jpeg[20:]


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little_time_and_memory(name: str, tmp_path: Path) -> None:
    make, expected = BOMBS[name]
    file = tmp_path / "bomb"
    file.write_bytes(make())
    command = [sys.executable, "-c", MEASURE, str(file)]
    result, seconds, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert result == (expected if expected == "loaded" else f"image.{expected}")
    assert float(seconds) < 2  # 0.1 s on an idle core
    assert float(megabytes) < 50


def test_bombs_are_refused_where_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_error(png(13_000, 13_000)).code == "image.pixels"


def test_an_image_below_the_limit_is_loaded() -> None:
    assert load_image(png(5000, 2000, b"\0" * 5001 * 2000)).size == (5000, 2000)


# ---- side effects


def test_no_global_state_changes() -> None:
    state = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    for data in [*encodings().values(), *(data for data, _ in malformed().values())]:
        with contextlib.suppress(ImageError):
            load_image(data)
    assert state == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


def test_threads_give_equal_results() -> None:
    files = [data for name, data in encodings().items() if name not in ("ico", "tga")]
    sequential = [pixels(load_image(data)) for data in files]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda data: pixels(load_image(data)), files * 8))
    assert parallel == sequential * 8


def test_import_loads_no_decoder_and_no_torch() -> None:
    code = "import sys, mmx.io.images; print('torch' in sys.modules, 'PIL.PngImagePlugin' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_known_suffixes_can_be_read() -> None:
    Image.init()
    assert {Image.EXTENSION.get(suffix) for suffix in SUFFIXES - HEIC} <= {*FORMATS, "MPO"}
    assert len(SUFFIXES) == 27
