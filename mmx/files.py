"""Files: what stands in the folders that a person names."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from mmx.errors import DataError


def find_files(paths: Iterable[str | os.PathLike[str]], accepts: Callable[[str], bool]) -> list[Path]:
    """The files among `paths` as given, whatever they are, and in place of each folder those in and below it whose
    path is accepted.

    The files of a folder are sorted by path; hidden files and folders and links to folders are left out. A file found
    through two folders is listed once. Raises DataError for a folder that cannot be listed.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        wanted = sorted(file for file in _walk(path) if accepts(str(file)))
        fresh = [file for file in wanted if os.path.abspath(file) not in seen]
        seen.update(map(os.path.abspath, fresh))
        found += fresh
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder, onerror=_cannot_list):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in files if not name.startswith("."))


def _cannot_list(error: OSError) -> NoReturn:
    name = os.fsdecode(error.filename)
    raise DataError(f"folder {name!r} cannot be listed: {error.strerror}; check its permissions.") from None
