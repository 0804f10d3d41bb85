"""Tar shards: members one after the other, and nothing that a stranger's archive could do."""

import gzip
import tarfile
import tracemalloc
from pathlib import Path
from random import Random

import pytest
from batch_cases import as_file

from mmx.errors import DataError
from mmx.io import tar as shards
from mmx.io.tar import TarMember, is_tar, read_tar


def is_picture(name):
    return name.endswith(".jpg")


def write_shard(path: Path, members, mode="w") -> str:
    """(name, bytes or a TarInfo's changes) -> a tar file."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                file, info.size = as_file(content)
                archive.addfile(info, file)
            else:
                for field, value in content.items():
                    setattr(info, field, value)
                archive.addfile(info)
    return str(path)


def read(path, most=1000):
    return list(read_tar(path, is_picture, most))


@pytest.mark.parametrize(
    ("ending", "mode"),
    [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz")],
)
def test_members_come_in_order_whatever_the_compression(tmp_path, ending, mode):
    members = [(f"{n:03}.{kind}", f"{n}{kind}".encode() * n) for n in range(30) for kind in ("jpg", "json", "cls")]
    path = write_shard(tmp_path / f"a{ending}", [("folder", {"type": tarfile.DIRTYPE}), *members], mode)
    assert is_tar(path)
    assert read(path) == [TarMember(name, data) for name, data in members if is_picture(name)]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("a.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a link, a device"),
        ("a.jpg", {"type": tarfile.LNKTYPE, "linkname": "0.jpg"}, "a link, a device"),
        ("a.jpg", {"type": tarfile.FIFOTYPE}, "a link, a device"),
        ("a.jpg", {"type": tarfile.CHRTYPE}, "a link, a device"),
        ("../a.jpg", b"x", "leads out of its folder"),
        ("b/../../a.jpg", b"x", "leads out of its folder"),
        ("/etc/a.jpg", b"x", "leads out of its folder"),
        ("c:\\a.jpg", b"x", "leads out of its folder"),
        ("..\\a.jpg", b"x", "leads out of its folder"),
        ("a.jpg", b"x" * 1001, "over 0 MB"),
    ],
)
def test_what_is_no_plain_member_is_told_and_the_rest_is_read(tmp_path, name, change, reason):
    path = write_shard(tmp_path / "a.tar", [("0.jpg", b"0"), (name, change), ("1.jpg", b"1")])
    first, odd, last = read(path)
    assert (first, last) == (("0.jpg", b"0"), ("1.jpg", b"1"))
    assert isinstance(odd.data, DataError)
    assert reason in str(odd.data)
    assert name.split("\\")[-1] in str(odd.data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"], "nothing is unpacked"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("._a.jpg", b"x"),
        ("b/._a.jpg", b"x"),
        (".a.jpg", b"x" * 1001),
        ("./.git/a.jpg", b"x"),
        ("a.txt", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("tty", {"type": tarfile.CHRTYPE}),
        ("a.json", b"x" * 1001),
        ("a.jpg", {"type": tarfile.DIRTYPE}),
    ],
)
def test_what_is_hidden_or_nobody_asked_for_is_passed_over(tmp_path, name, change):
    path = write_shard(tmp_path / "a.tar", [("./0.jpg", b"0"), (name, change), ("1.jpg", b"1")])
    assert read(path) == [TarMember("./0.jpg", b"0"), TarMember("1.jpg", b"1")]


@pytest.mark.parametrize(("name", "kinds"), [("0.jpg", [DataError]), ("0.mp4", [])])
def test_a_compressed_shard_is_left_where_too_much_would_be_unpacked(tmp_path, name, kinds):
    path = Path(write_shard(tmp_path / "a.tar.gz", [("a.jpg", b"a"), (name, {"size": 2**30})], "w:gz"))
    found = read(str(path))
    assert [member.name for member in found] == ["a.jpg", *([name] if kinds else []), ""]
    said = f"shard {str(path)!r} holds 1,024 MB or more that is not read, up to {name!r}, and would have"
    assert str(found[-1].data).startswith(said)
    plain = tmp_path / "a.tar"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    assert "damaged or cut short" in str(read(str(plain))[-1].data), "there, passing over is free: it is the end"


@pytest.mark.parametrize(("between", "names"), [([], ["a.jpg", ""]), ([("b.jpg", b"b")], ["a.jpg", "b.jpg", "c.jpg"])])
def test_what_is_passed_over_counts_from_the_last_that_was_read(tmp_path, monkeypatch, between, names):
    monkeypatch.setattr(shards, "_MOST_PASSED", 1500)
    members = [("a.jpg", b"a"), ("1.txt", b"x" * 1000), *between, ("2.txt", b"x" * 1000), ("c.jpg", b"c")]
    path = write_shard(tmp_path / "a.tar.xz", members, "w:xz")
    assert [member.name for member in read(path)] == names


def test_a_huge_member_is_passed_over_without_being_held(tmp_path):
    path = write_shard(tmp_path / "a.tar.gz", [("0.jpg", bytes(50 * 2**20)), ("1.jpg", b"1")], "w:gz")
    tracemalloc.start()
    found = read(path)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(member.data) for member in found] == [DataError, bytes]
    assert held < 4e6


def test_a_header_of_many_megabytes_is_damage(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("0.jpg", b"0"), ("x", {"type": tarfile.XHDTYPE, "size": 2**33})])
    assert [member.name for member in read(path)] == ["0.jpg", ""]


def test_many_members_take_no_memory(tmp_path):
    path = write_shard(tmp_path / "a.tar", [(f"{n}.jpg", b"x") for n in range(3000)])
    tracemalloc.start()
    assert sum(1 for _ in read_tar(path, is_picture, 1000)) == 3000
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 3e5, "a hundred bytes a member, were their headers kept"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_shard_that_is_cut_short_gives_what_it_has_and_its_reason(tmp_path, mode):
    members = [("0.jpg", b"0"), ("1.jpg", Random(0).randbytes(900))]
    path = Path(write_shard(tmp_path / ("a.tar.gz" if "gz" in mode else "a.tar"), members, mode))
    path.write_bytes(path.read_bytes()[: 1800 if mode == "w" else 600])
    found = read(str(path))
    assert [member.name for member in found][-1] == ""
    assert "damaged" in str(found[-1].data)


@pytest.mark.parametrize("left", [1024, 1024 + 200, 2048])
def test_a_shard_that_ends_where_a_header_should_be_is_cut_short(tmp_path, left):
    """Each member of up to 512 bytes takes 1024: here after one, in the header of the second, and after both."""
    path = Path(write_shard(tmp_path / "a.tar", [("0.jpg", b"0"), ("1.jpg", b"1")], "w"))
    path.write_bytes(path.read_bytes()[:left])
    found = read(str(path))
    assert [member.name for member in found] == ["0.jpg", "1.jpg"][: left // 1024] + [""]
    assert "cut short" in str(found[-1].data)


@pytest.mark.parametrize("content", [b"", b"no tar file", b"\x1f\x8b junk", b"x" * 2000])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz"])
def test_what_is_no_archive_is_one_reason(tmp_path, content, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    found = read(str(path))
    assert len(found) == 1
    assert isinstance(found[0].data, DataError)
    assert str(path) in str(found[0].data)


def test_a_header_that_is_damaged_in_the_middle_is_no_silent_end(tmp_path):
    path = Path(write_shard(tmp_path / "a.tar", [(f"{n}.jpg", b"x") for n in range(3)]))
    data = bytearray(path.read_bytes())
    data[1024 + 10 : 1024 + 300] = b"\xff" * 290
    path.write_bytes(data)
    found = read(str(path))
    assert [member.name for member in found] == ["0.jpg", ""]


def test_a_missing_shard_is_told(tmp_path):
    (missing,) = read(str(tmp_path / "gone.tar"))
    assert "No such file" in str(missing.data)
    assert not is_tar("a.jpg")
