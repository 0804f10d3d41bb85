"""`find_files`: folders, patterns, hidden files and links."""

import glob
import os
from pathlib import Path

import pytest

from mmx.errors import DataError
from mmx.io.files import find_files, is_pattern


def is_image(path: str) -> bool:
    return Path(path).suffix.lower() in (".png", ".jpg", ".webp", ".tif", ".gif")


def test_files_in_folders(tmp_path: Path) -> None:
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
    assert found(str(tmp_path), tmp_path / "sub") == [*inside, *inside[2:4]]
    odd = [Path("none.xyz"), tmp_path / "sub/notes.txt", tmp_path / "b.png"]
    assert found(*odd, *odd, tmp_path / ".git") == [*odd, *odd, tmp_path / ".git/d.png"]
    assert found(tmp_path, tmp_path / ".git") == [*inside, tmp_path / ".git/d.png"]
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    assert found(tmp_path) == inside
    assert found(tmp_path, tmp_path / "link") == [*inside, tmp_path / "link/c.webp", tmp_path / "link/deep/e.tif"]
    assert found() == []


def found(*paths: object) -> list[object]:
    return list(find_files(paths, is_image))  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_listed_is_an_error_and_others_are_searched(tmp_path, monkeypatch) -> None:
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
    assert (refused.code, refused.details) == ("folder.unreadable", {"path": f"{tmp_path}/b"})


NAMES = ("a.png", "b/c.png", "b/d/e.png", "b/d/f.txt", ".h/i.png", "b/.j.png", "q.png/k.png")


@pytest.mark.parametrize(
    "pattern", ["*", "*.png", "**/*.png", "b/**", "**", "?/*", "b/*/e.png", "**/d/*", "[ab]*", "**/b/**/*.png", "x*/y"]
)
def test_patterns_match_what_glob_matches_in_order(tmp_path, pattern) -> None:
    """A folder that matches is searched, like a folder that is given."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = set()
    for path in map(Path, glob.glob(f"{tmp_path}/{pattern}", recursive=True)):
        inner = glob.glob(f"{path}/**/*", recursive=True) if path.is_dir() else [path]
        expected |= {Path(file) for file in inner if Path(file).is_file() and is_image(str(file))}
    assert found(f"{tmp_path}/{pattern}") == sorted(expected)


def test_folders_are_listed_when_they_are_reached(tmp_path, monkeypatch) -> None:
    for name in ("a/1.png", "b/2.png", "c/3.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    listed, real = [], os.scandir
    monkeypatch.setattr("os.scandir", lambda path: listed.append(Path(path).name) or real(path))
    files = find_files([tmp_path], is_image)
    assert next(files) == tmp_path / "a/1.png"
    assert listed == [tmp_path.name, "a"]
    assert is_pattern("a/*.png") and not is_pattern("a.png")
