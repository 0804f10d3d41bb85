"""Tar archives of samples and folders with sidecar texts."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mmx.config.schema import DataConfig
from mmx.data.examples import Example
from mmx.data.formats import read_examples
from mmx.data.manifest import read_questions
from mmx.errors import DataError, ImageError
from mmx.io.images import load_image

SOURCES = ("image",)


def image_bytes(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes | str], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read(path: Path, skipped: list[str] | None = None, **fields: object) -> list[Example]:
    report = [] if skipped is None else skipped
    return list(read_examples(DataConfig(path=str(path), **fields), sources=SOURCES, on_skipped=report.append))


def read_error(path: Path) -> DataError:
    with pytest.raises(DataError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return error.value


def shade_of(example: Example) -> int:
    return load_image(example.sources["image"]).getpixel((0, 0))[0]


def test_samples_of_a_tar(tmp_path: Path) -> None:
    members = {
        "d/a.png": image_bytes(10),
        "d/a.txt": "a dog\n",
        "d/a.json": json.dumps({"caption": "a dog", "url": "http://x", "question": "what?", "answer": "dog"}),
        "d/b.txt": "a cat",
        "d/b.png": image_bytes(20),
        "d/b.cls": "7",
    }
    path = write_tar(tmp_path / "a.tar", members)
    first, second = read(path)
    assert first.id == f"{path}/d/a.png"
    assert [task.targets for task in first.tasks] == [("a dog",), ("dog",)]
    assert second.tasks[0].targets == ("a cat",)
    assert [shade_of(second), shade_of(first), shade_of(second)] == [20, 10, 20]  # in any order
    write_tar(tmp_path / "q.tar", {"a.png": image_bytes(10), "a.json": '{"question": "what?"}'})
    (question,) = read_questions(tmp_path / "q.tar")
    assert (question.task.question, question.written) == ("what?", {"image": f"{tmp_path / 'q.tar'}/a.png"})
    assert load_image(question.sources["image"]).getpixel((0, 0))[0] == 10


def test_shards_in_a_folder_are_read_in_order(tmp_path: Path) -> None:
    for number in (1, 0):
        write_tar(tmp_path / f"{number}.tar", {"a.png": image_bytes(number), "a.txt": f"caption {number}"})
    assert [example.tasks[0].targets for example in read(tmp_path)] == [("caption 0",), ("caption 1",)]
    assert [shade_of(example) for example in read(tmp_path)] == [0, 1]


def test_incomplete_samples_are_named(tmp_path: Path) -> None:
    members = {"a.png": image_bytes(1), "b.txt": "x", "c.png": image_bytes(2), "c.txt": "c"}
    skipped: list[str] = []
    (example,) = read(write_tar(tmp_path / "a.tar", members), skipped)
    assert example.tasks[0].targets == ("c",)
    assert [sentence.split(": ")[-1] for sentence in skipped] == ["sample a", "sample b"]


@pytest.mark.parametrize(
    "members, code",
    [
        ({"a.png": b"1", "a.txt": b"\xff"}, "data.not_utf8"),
        ({"a.png": b"1", "a.txt": b"x\0y"}, "data.not_utf8"),
        ({"a.png": b"1", "a.json": b"[1]"}, "data.not_json"),
        ({"a.png": b"1", "a.jpg": b"2", "a.txt": b"x"}, "data.repeated_key"),
        ({"a.png": b"1", "a.txt": b"x", "a.json": b'{"caption": "y"}'}, "data.repeated_key"),
    ],
)
def test_refused_samples(tmp_path: Path, members: dict[str, bytes | str], code: str) -> None:
    error = read_error(write_tar(tmp_path / "a.tar", members))
    assert (error.code, error.details["record"]) == (code, "sample a")


def test_half_and_compressed_archives(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": image_bytes(1), "a.txt": "x", "b.png": image_bytes(2), "b.txt": "y"})
    path.write_bytes(path.read_bytes()[:2600])
    assert read_error(path).code == "tar.damaged"
    members: dict[str, bytes | str] = {"a.png": image_bytes(1), "a.txt": "x"}
    assert read_error(write_tar(tmp_path / "b.tar.gz", members, "w:gz")).code == "data.compressed_archive"


def test_an_archive_that_changes_after_it_was_listed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.txt": "x", "a.png": image_bytes(1)})
    (example,) = read(path)
    path.write_bytes(b"")
    with pytest.raises(ImageError) as error:
        load_image(example.sources["image"])
    assert error.value.code == "image.damaged"
    assert error.value.details["source"] == f"{path}/a.png"


def test_sidecar_texts(tmp_path: Path) -> None:
    texts = {"a.txt": " a dog,\nrunning \n", "deep/b.caption": "b", "c.txt": " ", "e.txt": "no image", ".h.txt": "x"}
    (tmp_path / "deep").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for name in ("a.png", "deep/b.png", "c.png", "d.png"):
        (tmp_path / name).write_bytes(image_bytes(1))
    skipped: list[str] = []
    examples = read(tmp_path, skipped)
    found = {example.id: example.tasks[0].targets for example in examples}
    assert found == {"a.png": ("a dog,\nrunning",), "deep/b.png": ("b",)}
    assert sorted(sentence.split(": ")[-1] for sentence in skipped) == ["c.png", "d.png", "e.txt"]
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    error = read_error(tmp_path)
    assert (error.code, error.details["path"]) == ("data.not_utf8", str(tmp_path / "a.txt"))


def test_a_folder_of_images_without_texts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    assert read_error(tmp_path).code == "data.no_metadata"


def test_a_text_beside_two_images_is_that_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog")
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).write_bytes(image_bytes(1))
    skipped: list[str] = []
    assert [example.id for example in read(tmp_path, skipped)] == ["a.jpg"]
    assert len(skipped) == 1
    assert "a.png" in skipped[0]
