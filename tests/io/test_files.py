"""Finding files in folders."""

import glob
import os
from pathlib import Path

import pytest

from mmx.errors import DataError
from mmx.io.files import find_files, is_pattern


def is_picture(path: str) -> bool:
    return Path(path).suffix.lower() in (".png", ".jpg", ".webp", ".tif", ".gif")


def test_find_files(tmp_path: Path) -> None:
    names = [
        "b.png",
        "a.JPG",
        "sub/c.webp",
        ".hidden.png",
        ".git/d.png",
        "sub/notes.txt",
        "sub/deep/e.tif",
        "z.png/f.gif",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    inside = [tmp_path / name for name in ("a.JPG", "b.png", "sub/c.webp", "sub/deep/e.tif", "z.png/f.gif")]
    assert found(tmp_path) == inside
    assert found(str(tmp_path), tmp_path / "sub", f"{tmp_path}/sub/..") == inside  # each once
    assert found(tmp_path / "sub", tmp_path) == [*inside[2:4], *inside[:2], inside[4]]
    odd = [Path("none.xyz"), tmp_path / "sub/notes.txt", tmp_path / "b.png"]
    assert found(*odd, *odd, tmp_path / ".git") == [*odd, *odd, tmp_path / ".git/d.png"]
    assert found(tmp_path, tmp_path / ".git") == [*inside, tmp_path / ".git/d.png"]  # what is hidden was not found
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    assert found(tmp_path) == inside
    assert found(tmp_path, tmp_path / "link") == [*inside, tmp_path / "link/c.webp", tmp_path / "link/deep/e.tif"]
    assert found() == []


def found(*paths: object) -> list[object]:
    return list(find_files(paths, is_picture))  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_listed_is_named_and_the_others_are_walked(tmp_path, monkeypatch) -> None:
    for name in ("a/1.png", "b/2.png", "c/3.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    real = os.scandir

    def deny(path: str) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", deny)
    first, refused, last = found(tmp_path)
    assert (first, last) == (tmp_path / "a/1.png", tmp_path / "c/3.png")
    assert isinstance(refused, DataError)
    assert str(refused) == f"folder '{tmp_path}/b' cannot be listed: Permission denied; check its permissions."


NAMES = ("a.png", "b/c.png", "b/d/e.png", "b/d/f.txt", ".h/i.png", "b/.j.png", "q.png/k.png")


@pytest.mark.parametrize(
    "pattern", ["*", "*.png", "**/*.png", "b/**", "**", "?/*", "b/*/e.png", "**/d/*", "[ab]*", "**/b/**/*.png", "x*/y"]
)
def test_patterns_find_what_the_library_finds_in_order(tmp_path, pattern) -> None:
    """Beside glob; a folder that a pattern names is walked, as one that is typed."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = set()
    for path in map(Path, glob.glob(f"{tmp_path}/{pattern}", recursive=True)):
        inner = glob.glob(f"{path}/**/*", recursive=True) if path.is_dir() else [path]
        expected |= {Path(file) for file in inner if Path(file).is_file() and is_picture(str(file))}
    assert found(f"{tmp_path}/{pattern}") == sorted(expected)


def test_names_come_one_after_the_other(tmp_path, monkeypatch) -> None:
    for name in ("a/1.png", "b/2.png", "c/3.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    listed, real = [], os.scandir
    monkeypatch.setattr("os.scandir", lambda path: listed.append(Path(path).name) or real(path))
    files = find_files([tmp_path], is_picture)
    assert next(files) == tmp_path / "a/1.png"
    assert listed == [tmp_path.name, "a"]
    assert is_pattern("a/*.png") and not is_pattern("a.png")
