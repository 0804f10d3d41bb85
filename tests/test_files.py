"""Finding files in folders."""

from pathlib import Path

import pytest

from mmx.errors import DataError
from mmx.files import find_files


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
    assert find_files([tmp_path], is_picture) == inside
    assert find_files([str(tmp_path), tmp_path / "sub", f"{tmp_path}/sub/.."], is_picture) == inside  # each once
    assert find_files([tmp_path / "sub", tmp_path], is_picture) == [*inside[2:4], *inside[:2], inside[4]]
    odd = [Path("none.xyz"), tmp_path / "sub/notes.txt", tmp_path / "b.png"]
    assert find_files([*odd, *odd, tmp_path / ".git"], is_picture) == [*odd, *odd, tmp_path / ".git/d.png"]
    assert find_files([], is_picture) == find_files(iter(()), is_picture) == []


def test_find_files_names_a_folder_it_cannot_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", deny)
    with pytest.raises(DataError, match="cannot be listed: Permission denied; check its permissions") as caught:
        find_files([tmp_path], is_picture)
    assert str(tmp_path) in str(caught.value)
