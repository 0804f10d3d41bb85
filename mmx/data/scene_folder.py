"""A folder of generated scenes: images, captions, questions and the objects of each scene."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from mmx.data.scene_texts import captions, pointed_questions, questions
from mmx.data.scenes import Scene, generate_scene, render_scene
from mmx.errors import DataError

MIN_IMAGE_SIZE = 32


def write_scenes(folder: Path, count: int, seed: int = 0, size: int = 128) -> Path:
    """Write `count` scenes of `size` pixels a side to a new or empty folder; after an error, nothing is left of them.

    Raises:
        DataError: the folder is in use, or `count` or `size` is too small.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{str(folder)!r} already exists, and scenes are only written to a new or empty folder: "
            f"give another one, for example {str(folder) + '-2'!r}.",
            code="data.folder_in_use",
            path=str(folder),
        )
    if count < 1 or size < MIN_IMAGE_SIZE:
        raise DataError(
            f"count={count} and size={size} were given; give a count from 1 and a size from {MIN_IMAGE_SIZE} pixels.",
            code="data.scene_numbers",
            count=count,
            size=size,
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        scenes = [generate_scene(seed, index, size) for index in range(count)]
        finished = _write_files(Path(temporary) / folder.name, scenes)
        if folder.exists():
            folder.rmdir()  # it is empty; not every system renames onto a folder
        finished.rename(folder)
    return folder


def _write_files(folder: Path, scenes: Sequence[Scene]) -> Path:
    (folder / "images").mkdir(parents=True)
    pairs = [(f"images/{index:06d}.png", scene) for index, scene in enumerate(scenes)]
    for name, scene in pairs:
        render_scene(scene).save(folder / name)
    _write_lines(folder / "captions.jsonl", ({"image": name, "captions": captions(scene)} for name, scene in pairs))
    _write_lines(folder / "questions.jsonl", _question_rows(pairs))
    _write_lines(folder / "scenes.jsonl", ({"image": name, **asdict(scene)} for name, scene in pairs))
    return folder


def _question_rows(pairs: Sequence[tuple[str, Scene]]) -> Iterator[dict[str, object]]:
    for name, scene in pairs:
        for question in (*questions(scene), *pointed_questions(scene)):
            fields = {key: value for key, value in asdict(question).items() if value is not None}
            yield {"image": name, **fields}


def _write_lines(path: Path, rows: Iterable[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
