"""HEIC images through the extra, and AVIF always, behind the limits of all other formats."""

import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from mmx.errors import ImageError
from mmx.io import images
from mmx.io.heic import is_heic
from mmx.io.images import load_image


def image_bytes() -> Image.Image:
    image = Image.new("RGB", (64, 32), (200, 30, 40))
    image.paste((0, 0, 255), (0, 0, 16, 32))
    return image


def heic(**options: object) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra heic is not installed")
    buffer = BytesIO()
    pillow_heif.from_pillow(image_bytes()).save(buffer, quality=95, **options)
    return buffer.getvalue()


def load_error(data: object) -> str:
    with pytest.raises(ImageError) as error:
        load_image(data)
    return error.value.code


def test_heic_is_read_from_bytes_and_files(tmp_path: Path) -> None:
    path = tmp_path / "photo.HEIC"
    path.write_bytes(heic())
    for source in (path, path.read_bytes()):
        image = load_image(source)
        assert (image.size, image.mode, image.info) == ((64, 32), "RGB", {})
        assert all(
            abs(given - wanted) < 6 for given, wanted in zip(image.getpixel((50, 5)), (200, 30, 40), strict=True)
        )


def test_heic_is_turned_upright_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image = load_image(heic(exif=exif.tobytes()))
    assert image.size == (32, 64)
    assert image.getpixel((16, 4))[2] > 200, "the left end is at the top"


def test_heic_behind_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic()
    assert load_error(data[: len(data) // 2]) == "image.damaged"
    assert load_error(data[:40]) == "image.damaged"
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 32 - 1)
    assert load_error(data) == "image.pixels"
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    assert load_error(data) == "image.too_large"


def test_heic_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"mmx\[heic\]") as error:
        load_image(data)
    assert error.value.code == "image.heic_package"
    assert ".heic" in images.SUFFIXES


def test_avif_is_always_read_and_is_not_heic() -> None:
    buffer = BytesIO()
    image_bytes().save(buffer, "AVIF", quality=95)
    assert not is_heic(buffer.getvalue())
    assert load_image(buffer.getvalue()).size == (64, 32)
    assert not is_heic(b"")
    assert not is_heic(b"\0\0\0\x18ftypavif\0\0\0\0mif1heic")
    assert is_heic(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic")
