"""`read_tar`: members one by one, damaged archives, and members that are refused."""

import gzip
import tarfile
import tracemalloc
from pathlib import Path
from random import Random

import pytest
from batch_cases import as_file

from mmx.errors import DataError
from mmx.io import tar
from mmx.io.tar import TarMember, is_tar, read_tar


def is_image(name):
    return name.endswith(".jpg")


def write_archive(path: Path, members, mode="w") -> str:
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


def read(path, max_bytes=1000):
    return list(read_tar(path, is_image, max_bytes))


@pytest.mark.parametrize(
    ("ending", "mode"),
    [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz")],
)
def test_members_are_read_in_order_with_any_compression(tmp_path, ending, mode):
    members = [(f"{n:03}.{kind}", f"{n}{kind}".encode() * n) for n in range(30) for kind in ("jpg", "json", "cls")]
    path = write_archive(tmp_path / f"a{ending}", [("folder", {"type": tarfile.DIRTYPE}), *members], mode)
    assert is_tar(path)
    assert read(path) == [TarMember(name, data) for name, data in members if is_image(name)]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("a.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "member_type"),
        ("a.jpg", {"type": tarfile.LNKTYPE, "linkname": "0.jpg"}, "member_type"),
        ("a.jpg", {"type": tarfile.FIFOTYPE}, "member_type"),
        ("a.jpg", {"type": tarfile.CHRTYPE}, "member_type"),
        ("../a.jpg", b"x", "member_path"),
        ("b/../../a.jpg", b"x", "member_path"),
        ("/etc/a.jpg", b"x", "member_path"),
        ("c:\\a.jpg", b"x", "member_path"),
        ("..\\a.jpg", b"x", "member_path"),
        ("a.jpg", b"x" * 1001, "member_too_large"),
    ],
)
def test_irregular_members_are_errors_and_the_rest_is_read(tmp_path, name, change, reason):
    path = write_archive(tmp_path / "a.tar", [("0.jpg", b"0"), (name, change), ("1.jpg", b"1")])
    first, odd, last = read(path)
    assert (first, last) == (("0.jpg", b"0"), ("1.jpg", b"1"))
    assert isinstance(odd.data, DataError)
    assert odd.data.code == f"tar.{reason}"
    assert odd.data.details == {"path": path, "member": name}
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
def test_hidden_and_unselected_members_are_skipped(tmp_path, name, change):
    path = write_archive(tmp_path / "a.tar", [("./0.jpg", b"0"), (name, change), ("1.jpg", b"1")])
    assert read(path) == [TarMember("./0.jpg", b"0"), TarMember("1.jpg", b"1")]


@pytest.mark.parametrize(("name", "kinds"), [("0.jpg", [DataError]), ("0.mp4", [])])
def test_a_compressed_archive_ends_where_too_much_would_be_decompressed(tmp_path, name, kinds):
    path = Path(write_archive(tmp_path / "a.tar.gz", [("a.jpg", b"a"), (name, {"size": 2**30})], "w:gz"))
    found = read(str(path))
    assert [member.name for member in found] == ["a.jpg", *([name] if kinds else []), ""]
    assert found[-1].data.code == "tar.too_much_skipped"
    assert found[-1].data.details == {"path": str(path), "member": name}
    plain = tmp_path / "a.tar"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    assert read(str(plain))[-1].data.code == "tar.damaged", "skipping costs nothing there, and the archive ends"


@pytest.mark.parametrize(("between", "names"), [([], ["a.jpg", ""]), ([("b.jpg", b"b")], ["a.jpg", "b.jpg", "c.jpg"])])
def test_skipped_bytes_are_counted_from_the_last_member_read(tmp_path, monkeypatch, between, names):
    monkeypatch.setattr(tar, "_MAX_SKIPPED", 1500)
    members = [("a.jpg", b"a"), ("1.txt", b"x" * 1000), *between, ("2.txt", b"x" * 1000), ("c.jpg", b"c")]
    path = write_archive(tmp_path / "a.tar.xz", members, "w:xz")
    assert [member.name for member in read(path)] == names


def test_a_large_member_is_skipped_without_being_held_in_memory(tmp_path):
    path = write_archive(tmp_path / "a.tar.gz", [("0.jpg", bytes(50 * 2**20)), ("1.jpg", b"1")], "w:gz")
    tracemalloc.start()
    found = read(path)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(member.data) for member in found] == [DataError, bytes]
    assert held < 4e6


def test_a_header_of_many_megabytes_is_damaged(tmp_path):
    path = write_archive(tmp_path / "a.tar", [("0.jpg", b"0"), ("x", {"type": tarfile.XHDTYPE, "size": 2**33})])
    assert [member.name for member in read(path)] == ["0.jpg", ""]


def test_many_members_take_little_memory(tmp_path):
    path = write_archive(tmp_path / "a.tar", [(f"{n}.jpg", b"x") for n in range(3000)])
    tracemalloc.start()
    assert sum(1 for _ in read_tar(path, is_image, 1000)) == 3000
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 3e5, "a hundred bytes a member if headers were kept"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_truncated_archive_gives_its_members_and_an_error(tmp_path, mode):
    members = [("0.jpg", b"0"), ("1.jpg", Random(0).randbytes(900))]
    path = Path(write_archive(tmp_path / ("a.tar.gz" if "gz" in mode else "a.tar"), members, mode))
    path.write_bytes(path.read_bytes()[: 1800 if mode == "w" else 600])
    found = read(str(path))
    assert [member.name for member in found][-1] == ""
    assert found[-1].data.code == "tar.damaged"


@pytest.mark.parametrize("size", [1024, 1024 + 200, 2048])
def test_an_archive_that_ends_before_a_header_is_truncated(tmp_path, size):
    """A member of up to 512 bytes takes 1024: after one, in the header of the second, and after both."""
    path = Path(write_archive(tmp_path / "a.tar", [("0.jpg", b"0"), ("1.jpg", b"1")], "w"))
    path.write_bytes(path.read_bytes()[:size])
    found = read(str(path))
    assert [member.name for member in found] == ["0.jpg", "1.jpg"][: size // 1024] + [""]
    assert found[-1].data.code == "tar.damaged"


@pytest.mark.parametrize("content", [b"", b"no tar file", b"\x1f\x8b junk", b"x" * 2000])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz"])
def test_a_file_that_is_not_an_archive_is_one_error(tmp_path, content, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    found = read(str(path))
    assert len(found) == 1
    assert isinstance(found[0].data, DataError)
    assert found[0].data.details["path"] == str(path)


def test_a_damaged_header_in_the_middle_is_an_error(tmp_path):
    path = Path(write_archive(tmp_path / "a.tar", [(f"{n}.jpg", b"x") for n in range(3)]))
    data = bytearray(path.read_bytes())
    data[1024 + 10 : 1024 + 300] = b"\xff" * 290
    path.write_bytes(data)
    found = read(str(path))
    assert [member.name for member in found] == ["0.jpg", ""]


def test_a_missing_archive_is_an_error(tmp_path):
    (missing,) = read(str(tmp_path / "gone.tar"))
    assert missing.data.code == "tar.unreadable"
    assert not is_tar("a.jpg")
