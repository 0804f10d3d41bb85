"""Readers: a file or folder in a format people have -> a list of Examples. One function a format, one line in a table.

Formats: `manifest` (JSONL), `karpathy` (dataset_*.json), `coco` (captions JSON), `vqa` (VQAv2 questions + annotations),
`folder` (HF ImageFolder: metadata.jsonl), `scenes` (generated). Pictures are found, not opened, here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmx.config import DataConfig
from mmx.data.examples import Example, Turn
from mmx.data.scene_texts import captions, questions
from mmx.data.scenes import draw_scene, picture
from mmx.errors import DataError

TURN_FIELDS = {"captions", "caption", "question", "answer", "answers", "kind", "box", "id", "question_id"}
PICTURE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", ".")


def read_examples(config: DataConfig, base: Path = Path()) -> Sequence[Example]:
    """The examples of one data set: its `part`, up to its `limit`. Raises DataError, naming file and line."""
    if config.path == "scenes" or config.format == "scenes":
        return SceneExamples(config)
    path = (base / config.path).expanduser()
    if not path.exists():
        raise DataError(f"there is no data at {path}; expected a file or folder, set its path in the configuration.")
    name = sniff(path) if config.format == "auto" else config.format
    examples = [example for example in READERS[name](path, config) if example.turns]
    start, stop = (round(edge * len(examples)) for edge in config.part)
    kept = [_of_tasks(example, config.tasks) for example in examples[start:stop]]
    kept = [example for example in kept if example.turns][: config.limit]
    if not kept:
        raise DataError(f"{path} holds no examples of split {config.split!r} and tasks {', '.join(config.tasks)}.")
    return kept


def sniff(path: Path) -> str:
    """The format of a file or folder, by its name and its first keys."""
    if path.is_dir():
        return "folder"
    if path.suffix == ".jsonl":
        return "manifest"
    document = _load_json(path)
    if "images" in document and "annotations" in document:
        return "coco"
    if "questions" in document:
        return "vqa"
    if "images" in document:
        return "karpathy"
    raise DataError(f"{path} is in no format mmx knows; expected one of {', '.join(READERS)}.")


# ---- readers ---------------------------------------------------------------------------------------------------


def read_manifest(path: Path, config: DataConfig) -> list[Example]:
    """JSONL: one object a line with its sources by name and captions or a question; lines of one input are joined."""
    return _group((_manifest_line(path, number, line) for number, line in read_lines(path)), path.parent)


def read_folder(path: Path, config: DataConfig) -> list[Example]:
    """A folder with `metadata.jsonl` as HF ImageFolder writes it: `file_name` and `text`."""
    table = path / "metadata.jsonl"
    if not table.is_file():
        raise DataError(f"folder {path} has no metadata.jsonl; expected lines such as {{'file_name': …, 'text': …}}.")
    renamed = {"file_name": "image", "text": "caption"}
    lines = ((n, {renamed.get(key, key): value for key, value in line.items()}) for n, line in read_lines(table))
    return _group((_manifest_line(table, number, line) for number, line in lines), path)


def read_karpathy(path: Path, config: DataConfig) -> list[Example]:
    """The Karpathy-split JSON; `restval` counts as train, as everybody has it."""
    wanted = {"train", "restval"} if config.split == "train" else {config.split}
    examples = []
    for number, image in enumerate(_field(_load_json(path), "images", path)):
        if config.split is None or image.get("split") in wanted:
            where = _find_picture(path.parent, Path(image.get("filepath", "")) / _field(image, "filename", path))
            said = tuple(" ".join(s["raw"].split()) for s in _field(image, "sentences", path))
            examples.append(Example(image["filename"], {"image": where}, (Turn(said),), f"{path}, image {number}"))
    return examples


def read_coco(path: Path, config: DataConfig) -> list[Example]:
    """COCO captions JSON: images and annotations joined by image id."""
    document, said = _load_json(path), {}
    for note in _field(document, "annotations", path):
        said.setdefault(_field(note, "image_id", path), []).append(" ".join(_field(note, "caption", path).split()))
    return [
        Example(
            str(image["id"]),
            {"image": _find_picture(path.parent, Path(_field(image, "file_name", path)))},
            (Turn(tuple(said[image["id"]])),),
            f"{path}, image {image['id']}",
        )
        for image in _field(document, "images", path)
        if image["id"] in said
    ]


def read_vqa(path: Path, config: DataConfig) -> list[Example]:
    """VQAv2: a questions JSON, and the annotations JSON that `annotations` names (absent: no answers are known)."""
    document, answers, kinds = _load_json(path), {}, {}
    if config.annotations:
        for note in _field(_load_json(path.parent / config.annotations), "annotations", path):
            answers[note["question_id"]] = tuple(a["answer"] for a in _field(note, "answers", path))
            kinds[note["question_id"]] = note.get("answer_type")
    turns: dict[Any, list[Turn]] = {}
    for asked in _field(document, "questions", path):
        key = asked["question_id"]
        turn = Turn(answers.get(key, ()), _field(asked, "question", path), kinds.get(key))
        turns.setdefault(_field(asked, "image_id", path), []).append(turn)
    prefix = f"COCO_{document.get('data_subtype', '')}_" if document.get("data_subtype") else ""
    return [
        Example(str(image), {"image": _find_vqa_picture(path.parent, prefix, image)}, tuple(said), str(path))
        for image, said in turns.items()
    ]


READERS: dict[str, Callable[[Path, DataConfig], list[Example]]] = {
    "manifest": read_manifest,
    "karpathy": read_karpathy,
    "coco": read_coco,
    "vqa": read_vqa,
    "folder": read_folder,
}


class SceneExamples(Sequence[Example]):
    """Generated scenes as examples, drawn when they are asked for: example i is a pure function of (seed, i)."""

    def __init__(self, config: DataConfig) -> None:
        self.config, self.size = config, 128
        first, last = (round(edge * config.count) for edge in config.part)
        self.indices = range(first, last)[: config.limit]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = self.indices[index]
        scene = draw_scene(self.config.seed, number, self.size)
        turns = []
        if "caption" in self.config.tasks:
            turns.append(Turn(captions(scene)))
        if "ask" in self.config.tasks:
            turns += [Turn((q.answer,), q.question, q.kind, q.box) for q in questions(scene)]
        name = f"scene-{self.config.seed}-{number}"
        return Example(name, {"image": picture(scene, self.size)}, tuple(turns), name)


# ---- pieces ----------------------------------------------------------------------------------------------------


def _manifest_line(path: Path, number: int, line: Mapping[str, Any]) -> tuple[str, dict[str, Any], Turn]:
    """One manifest line -> where it stands, its sources, its turn."""
    origin = f"{path}:{number}"
    sources = {key: value for key, value in line.items() if key not in TURN_FIELDS}
    if not sources:
        raise DataError(f"{origin} names no input; expected a field such as 'image' with a path.")
    if "question" in line:
        given = line.get("answers", line.get("answer", ()))
        said = (given,) if isinstance(given, str) else tuple(given)
        box = tuple(line["box"]) if line.get("box") else None
        return origin, sources, Turn(said, line["question"], line.get("kind"), box)
    given = line.get("captions", line.get("caption"))
    if given is None:
        raise DataError(f"{origin} has neither 'captions' nor 'question'; add one of them.")
    said = (given,) if isinstance(given, str) else tuple(given)
    if not said or not all(isinstance(text, str) and text.strip() for text in said):
        raise DataError(f"{origin} has captions {json.dumps(given)[:60]}; expected one or more texts.")
    return origin, sources, Turn(said)


def _group(lines: Iterator[tuple[str, dict[str, Any], Turn]], base: Path) -> list[Example]:
    """Join the turns of lines that name the same inputs, in the order of their first appearance."""
    found: dict[str, tuple[str, dict[str, Any], list[Turn]]] = {}
    for origin, sources, turn in lines:
        key = json.dumps(sources, sort_keys=True)
        found.setdefault(key, (origin, sources, []))[2].append(turn)
    return [
        Example(_name(sources), {n: _located(n, v, base) for n, v in sources.items()}, tuple(turns), origin)
        for origin, sources, turns in found.values()
    ]


def _name(sources: Mapping[str, Any]) -> str:
    return " + ".join(str(value) for value in sources.values())


def _located(source: str, value: Any, base: Path) -> Any:
    """Paths are relative to the manifest; a text is itself."""
    return value if source == "text" or not isinstance(value, str) else str(base / value)


def _of_tasks(example: Example, tasks: Sequence[str]) -> Example:
    wanted = tuple(t for t in example.turns if ("caption" if t.question is None else "ask") in tasks)
    return example if len(wanted) == len(example.turns) else Example(example.id, example.sources, wanted, example.origin)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file. Raises DataError, naming file and line, for one that is no object."""
    if not path.is_file():
        raise DataError(f"there is no file {path}; expected JSON lines, one object each.")
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                try:
                    line = json.loads(text)
                except ValueError:
                    line = None
                if not isinstance(line, dict):
                    raise DataError(f"{path}:{number} is no JSON object; expected a line such as {{\"image\": …}}.")
                yield number, line


def _load_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON; expected one of the formats {', '.join(READERS)}.") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} holds no JSON object; expected one of the formats {', '.join(READERS)}.")
    return document


def _field(record: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in record:
        raise DataError(f"{path} has a record without {name!r}; it has {', '.join(sorted(record)) or 'nothing'}.")
    return record[name]


def _find_picture(base: Path, name: Path) -> str:
    """Where a picture lies beside its list: in one of the usual folders, else where it would be expected."""
    for folder in PICTURE_FOLDERS:
        if (base / folder / name).exists():
            return str(base / folder / name)
    return str(base / PICTURE_FOLDERS[0] / name)


def _find_vqa_picture(base: Path, prefix: str, image: Any) -> str:
    if isinstance(image, str):
        return _find_picture(base, Path(image))
    subtype = prefix.removeprefix("COCO_").rstrip("_")
    return _find_picture(base, Path(subtype) / f"{prefix}{image:012d}.jpg")
