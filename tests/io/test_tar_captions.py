"""Captions in tar archives: what was there is copied in its bytes."""

import gzip
import json
import tarfile

import pytest
from batch_cases import as_file

from mmx.errors import DataError
from mmx.io.tar_captions import CaptionedTar, TarCaption, sample_key

LONG = "deep/" * 40 + "é.jpg"


def is_image(name):
    return name.endswith((".jpg", ".png"))


def write_archive(path, members, tar_format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=tar_format, pax_headers={"comment": "global"}) as archive:
        for number, (name, content) in enumerate(members.items()):
            info = tarfile.TarInfo(name)
            info.mtime = 1000.5 + number
            info.uname = "owner"
            file, info.size = as_file(content)
            archive.addfile(info, file)
        link = tarfile.TarInfo("link.jpg")
        link.type = tarfile.SYMTYPE
        link.linkname = "a.jpg"
        archive.addfile(link)
    return str(path)


def read_archive(path):
    with tarfile.open(path) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive if info.isreg()}


def captions(**texts):
    return {f"{key}.jpg": TarCaption(text, {"score": -0.5}) for key, text in texts.items()}


def add(path, out, texts, suffixes=(".txt",), existing="skip"):
    return CaptionedTar(path, suffixes, existing, is_image).write(out, texts)


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_copied_with_their_headers_and_followed_by_captions(tmp_path, tar_format):
    members = {"a.jpg": b"A" * 700, "b.cls": b"3", "b.jpg": b"", LONG: b"L" * 512, "x/a.jpg": b"other"}
    path = write_archive(tmp_path / "in.tar", members, tar_format)
    texts = {**captions(a="a cat", b="é"), LONG: TarCaption("long", {}), "x/a.jpg": TarCaption("in x", {})}
    assert add(path, tmp_path / "out.tar", texts) == []
    written = read_archive(tmp_path / "out.tar")
    long_key = LONG.removesuffix(".jpg")
    added = {"a.txt": b"a cat", "b.txt": "é".encode(), f"{long_key}.txt": b"long", "x/a.txt": b"in x"}
    assert written == {**members, **added}
    order = ["a.jpg", "a.txt", "b.cls", "b.jpg", "b.txt", LONG, f"{long_key}.txt", "x/a.jpg", "x/a.txt"]
    assert list(written) == order
    with tarfile.open(path) as old, tarfile.open(tmp_path / "out.tar") as new:
        assert new.pax_headers == old.pax_headers
        for info in old:
            assert new.getmember(info.name).get_info() == info.get_info()
    assert (tmp_path / "out.tar").stat().st_size % tarfile.RECORDSIZE == 0
    assert add(path, tmp_path / "same.tar", {}) == []
    assert (tmp_path / "same.tar").read_bytes() == (tmp_path / "in.tar").read_bytes()


def test_a_compressed_archive_is_read(tmp_path):
    path = write_archive(tmp_path / "in.tar", {"a.jpg": b"A" * 100_000})
    (tmp_path / "in.tar.gz").write_bytes(gzip.compress((tmp_path / "in.tar").read_bytes()))
    add(path, tmp_path / "1.tar", captions(a="x"))
    add(f"{path}.gz", tmp_path / "2.tar", captions(a="x"))
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()


@pytest.mark.parametrize(
    ("existing", "expected"),
    [("skip", b"old\n"), ("overwrite", b"new"), ("append", b"old\nnew"), ("prepend", b"new\nold")],
)
@pytest.mark.parametrize("first", [True, False])
def test_captions_that_the_archive_has(tmp_path, existing, expected, first):
    members = {"a.txt": b"old\n", "a.jpg": b"A", "a.json": b'{"width": 5}'}
    if not first:
        members = dict(reversed(members.items()))
    path = write_archive(tmp_path / "in.tar", members)
    assert add(path, tmp_path / "out.tar", captions(a="new"), (".txt", ".json"), existing) == []
    written = read_archive(tmp_path / "out.tar")
    assert list(written) == list(members)
    assert written["a.txt"] == expected
    assert json.loads(written["a.json"]) == {"width": 5, "caption": "new", "score": -0.5}


def test_images_whose_captions_exist_need_no_caption(tmp_path):
    path = write_archive(tmp_path / "in.tar", {"a.txt": b"old", "a.jpg": b"A", "b.jpg": b"B"})
    tar = CaptionedTar(path, (".txt",), "skip", is_image)
    assert [tar.is_done(name) for name in ("a.jpg", "b.jpg")] == [True, False]
    assert not CaptionedTar(path, (".txt",), "append", is_image).is_done("a.jpg")
    assert not CaptionedTar(path, (".txt", ".json"), "skip", is_image).is_done("a.jpg")


def test_a_second_image_of_a_sample_has_no_caption(tmp_path):
    path = write_archive(tmp_path / "in.tar", {"a.jpg": b"A", "a.2.png": b"B", "x/a.jpg": b"C"})
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("link.png"))  # the other link.jpg is a link, which has no caption
    tar = CaptionedTar(path, (".txt",), "skip", is_image)
    tar.check("a.jpg")
    tar.check("x/a.jpg")
    tar.check("link.png")
    with pytest.raises(DataError) as caught:
        tar.check("a.2.png")
    assert (caught.value.code, caught.value.details["owner"]) == ("sidecar.shared", "a.jpg")
    assert sample_key("x.y/a.b.jpg") == "x.y/a"


def test_a_member_that_cannot_be_changed_stays_and_is_named(tmp_path):
    members = {"a.jpg": b"A", "a.json": b"[1]", "b.json": b"{}", "b.jpg": b"B"}
    path = write_archive(tmp_path / "in.tar", members)
    errors = add(path, tmp_path / "out.tar", captions(a="x", b="y"), (".json",), "overwrite")
    assert [error.code for error in errors] == ["sidecar.not_json"]
    written = read_archive(tmp_path / "out.tar")
    assert written["a.json"] == b"[1]"
    assert json.loads(written["b.json"])["caption"] == "y"


def test_a_half_archive_is_refused_and_an_older_file_stays(tmp_path):
    path = write_archive(tmp_path / "in.tar", {"a.jpg": b"A" * 5000, "b.jpg": b"B" * 5000})
    tar = CaptionedTar(path, (".txt",), "skip", is_image)
    content = (tmp_path / "in.tar").read_bytes()
    (tmp_path / "in.tar").write_bytes(content[:8000])
    (tmp_path / "out.tar").write_bytes(b"older")
    with pytest.raises(DataError):
        CaptionedTar(path, (".txt",), "skip", is_image)
    with pytest.raises(DataError):
        tar.write(tmp_path / "out.tar", captions(a="x"))
    assert (tmp_path / "out.tar").read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tar", "out.tar"]
