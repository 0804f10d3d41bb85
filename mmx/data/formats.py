"""Readers: a file or folder in a format people have -> a list of Examples. One function a format, one line in a table.

Formats: `manifest` (JSONL), `karpathy` (dataset_*.json), `coco` (captions JSON), `vqa` (VQAv2 questions + annotations),
`folder` (HF ImageFolder: metadata.jsonl), `scenes` (generated). Pictures are found, not opened, here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, get_args

from mmx.config.schema import DataConfig
from mmx.data.derived_questions import derive_questions
from mmx.data.examples import Example, TextTask
from mmx.data.json_fields import (
    load_json,
    optional_field,
    read_box,
    read_lines,
    required_field,
    resolve_path,
    single_spaced,
    text_fields,
)
from mmx.data.scene_texts import SceneQuestionType, captions, pointed_questions, questions
from mmx.data.scenes import MOST_OBJECTS, generate_scene, render_scene
from mmx.errors import DataError, suggest

TURN_FIELDS = {"captions", "caption", "question", "answer", "answers", "kind", "box", "evidence", "id", "question_id"}
IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", ".")
SCENE_QUESTION_TYPES = get_args(SceneQuestionType)
NEED_TWO = {"relation", "pointed"}


def read_examples(config: DataConfig, base: Path = Path()) -> Sequence[Example]:
    """The examples of one data set: its `part`, up to its `limit`. Raises DataError, naming file and line."""
    if config.path == "scenes" or config.format == "scenes":
        _refuse_split(config, "scenes")
        if config.derive_questions:
            raise DataError("scenes have questions of their own; leave derive_questions out.")
        return SceneExamples(config)
    path = (base / config.path).expanduser()
    if not path.exists():
        raise DataError(f"there is no data at {path}; expected a file or folder, set its path in the configuration.")
    name = detect_format(path) if config.format == "auto" else config.format
    if name != "karpathy":
        _refuse_split(config, name)
    examples = [example for example in READERS[name](path, config) if example.tasks]
    start, stop = (round(edge * len(examples)) for edge in config.fraction)
    taken = examples[start:stop]
    if config.derive_questions:  # after the cut: yes is to be as frequent as no in what is left
        taken = derive_questions(taken[: config.max_examples], config.seed)
    kept = [_only_wanted(example, config) for example in taken]
    kept = [example for example in kept if example.tasks][: config.max_examples]
    if not kept:
        kinds = f" of kinds {', '.join(config.question_types)}" if config.question_types else ""
        raise DataError(
            f"{path} holds no examples for the tasks {', '.join(config.tasks)}{kinds} in its part {list(config.fraction)}; "
            "change tasks, kinds or part."
        )
    return kept


def detect_format(path: Path) -> str:
    """The format of a file or folder, by its name and its first keys."""
    if path.is_dir():
        return "folder"
    if path.suffix == ".jsonl":
        return "manifest"
    document = _document(path)
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
    return _group(
        (_manifest_line(f"{path}:{number}", line) for number, line in read_lines(path, finite=False)), path.parent
    )


def read_folder(path: Path, config: DataConfig) -> list[Example]:
    """A folder with `metadata.jsonl` as HF ImageFolder writes it: `file_name` and `text`."""
    table = path / "metadata.jsonl"
    if not table.is_file():
        raise DataError(f"folder {path} has no metadata.jsonl; expected lines such as {{'file_name': …, 'text': …}}.")
    return _group((_folder_line(f"{table}:{number}", line) for number, line in read_lines(table, finite=False)), path)


def read_karpathy(path: Path, config: DataConfig) -> list[Example]:
    """The Karpathy-split JSON; `restval` counts as train, as everybody has it."""
    examples, splits = [], set()
    for number, image in enumerate(required_field(_document(path), "images", list, str(path))):
        where = f"{path}, image {number}"
        name, split = required_field(image, "filename", str, where), image.get("split")
        splits.add(str(split))
        if config.split in (None, split, "train" if split == "restval" else None):
            found = _find_picture(path.parent, Path(optional_field(image, "filepath", str, where) or "") / name)
            sentences = required_field(image, "sentences", list, where)
            said = tuple(single_spaced(required_field(sentence, "raw", str, where)) for sentence in sentences)
            examples.append(Example(name, {"image": found}, (TextTask(said),) if said else (), where))
    if config.split is not None and not examples:
        raise DataError(f"{path} has no split {config.split!r}; {suggest(config.split, sorted(splits))}")
    return examples


def read_coco(path: Path, config: DataConfig) -> list[Example]:
    """COCO captions JSON: images and annotations joined by image id."""
    document, examples = _document(path), []
    said: dict[int | str, list[str]] = {}
    for number, note in enumerate(required_field(document, "annotations", list, str(path))):
        where = f"{path}, annotation {number}"
        key = required_field(note, "image_id", (int, str), where)
        said.setdefault(key, []).append(single_spaced(required_field(note, "caption", str, where)))
    for number, image in enumerate(required_field(document, "images", list, str(path))):
        where = f"{path}, image {number}"
        key, name = required_field(image, "id", (int, str), where), required_field(image, "file_name", str, where)
        if key in said:
            found = _find_picture(path.parent, Path(name))
            examples.append(Example(str(key), {"image": found}, (TextTask(tuple(said[key])),), where))
    return examples


def read_vqa(path: Path, config: DataConfig) -> list[Example]:
    """VQAv2: a questions JSON, and the annotations JSON that `annotations` names (absent: no answers are known)."""
    document = _document(path)
    turns: dict[int | str, list[TextTask]] = {}
    answers = _vqa_answers(path.parent / config.annotations) if config.annotations else {}
    for number, asked in enumerate(required_field(document, "questions", list, str(path))):
        where = f"{path}, question {number}"
        said, kind = answers.get(required_field(asked, "question_id", (int, str), where), ((), None))
        turn = TextTask(said, required_field(asked, "question", str, where), kind)
        turns.setdefault(required_field(asked, "image_id", (int, str), where), []).append(turn)
    subtype = optional_field(document, "data_subtype", str, str(path))
    return [
        Example(str(image), {"image": _find_vqa_picture(path.parent, subtype, image)}, tuple(asked), str(path))
        for image, asked in turns.items()
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
        for kind in config.question_types:
            if kind not in SCENE_QUESTION_TYPES:
                raise DataError(
                    f"scenes have no questions of kind {kind!r}; {suggest(kind, list(SCENE_QUESTION_TYPES))}"
                )
        if (
            config.max_objects == 1
            and config.question_types
            and set(config.question_types) <= NEED_TWO
            and "caption" not in config.tasks
        ):
            kinds = " or ".join(repr(kind) for kind in config.question_types)
            raise DataError(f"scenes of one object have no questions of kind {kinds}; set objects to 2 or more.")
        self.config, self.size = config, 128
        first, last = (round(edge * config.num_examples) for edge in config.fraction)
        self.indices = range(first, last)[: config.max_examples]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        # A scene without anything that is wanted is replaced by one that stands for no other index.
        candidates = (self._example(number) for number in count(self.indices[index], self.config.num_examples))
        return next(example for example in candidates if example is not None)

    def _example(self, number: int) -> Example | None:
        config = self.config
        scene = generate_scene(config.seed, number, self.size)
        if len(scene.objects) > (config.max_objects or MOST_OBJECTS):
            return None
        asked = (*questions(scene), *pointed_questions(scene))
        said = [
            TextTask(captions(scene)),
            *(TextTask((q.answer,), q.question, q.question_type, q.box, q.evidence) for q in asked),
        ]
        turns = tuple(turn for turn in said if _is_wanted(turn, config))
        name = f"scene-{config.seed}-{number}"
        return Example(name, {"image": render_scene(scene, self.size)}, turns, name) if turns else None


# ---- pieces ----------------------------------------------------------------------------------------------------


def read_questions(path: Path) -> list[tuple[dict[str, Any], dict[str, Any], TextTask]]:
    """The questions of a manifest in their order: the inputs by source name as written, the same with their paths
    found from the manifest's folder, and what is asked. Raises DataError, naming file and line."""
    asked = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if not isinstance(line.get("question"), str):
            raise DataError(f'{where} has no \'question\'; expected {{"image": "a.jpg", "question": "…"}}.')
        _, sources, turn = _manifest_line(where, line)
        asked.append((sources, {n: _located(n, v, path.parent) for n, v in sources.items()}, turn))
    if not asked:
        raise DataError(f'{path} holds no questions; expected lines such as {{"image": "a.jpg", "question": "…"}}.')
    return asked


def _manifest_line(where: str, line: Mapping[str, Any]) -> tuple[str, dict[str, Any], TextTask]:
    """One manifest line -> where it stands, its sources, its turn."""
    sources = {key: value for key, value in line.items() if key not in TURN_FIELDS and value is not None}
    if not sources:
        raise DataError(f"{where} names no input; expected a field such as 'image' with a path.")
    for name in ("image", "text"):
        optional_field(sources, name, str, where)
    if "question" in line:
        asked, kind = required_field(line, "question", str, where), optional_field(line, "kind", str, where)
        return (
            where,
            sources,
            TextTask(
                text_fields(line, ("answers", "answer"), where),
                asked,
                kind,
                read_box(line, "box", where),
                read_box(line, "evidence", where),
            ),
        )
    said = text_fields(line, ("captions", "caption"), where)
    if not said:
        raise DataError(f"{where} has neither 'captions' nor 'question'; add one of them.")
    return where, sources, TextTask(said)


def _folder_line(where: str, line: Mapping[str, Any]) -> tuple[str, dict[str, Any], TextTask]:
    """One line of HF's metadata.jsonl, as a manifest line."""
    required_field(line, "file_name", str, where)
    renamed = {"file_name": "image", "text": "caption"}
    return _manifest_line(where, {renamed.get(key, key): value for key, value in line.items()})


def _document(path: Path) -> dict[str, Any]:
    return load_json(path, f"expected one of the formats {', '.join(READERS)}.")


def _vqa_answers(path: Path) -> dict[Any, tuple[tuple[str, ...], str | None]]:
    """Question id -> (answers, kind)."""
    found = {}
    for number, note in enumerate(required_field(_document(path), "annotations", list, str(path))):
        where = f"{path}, annotation {number}"
        said = tuple(
            required_field(given, "answer", str, where) for given in required_field(note, "answers", list, where)
        )
        found[required_field(note, "question_id", (int, str), where)] = (
            said,
            optional_field(note, "answer_type", str, where),
        )
    return found


def _group(lines: Iterator[tuple[str, dict[str, Any], TextTask]], base: Path) -> list[Example]:
    """Join the turns of lines that name the same inputs, in the order of their first appearance."""
    found: dict[str, tuple[str, dict[str, Any], list[TextTask]]] = {}
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
    return value if source == "text" or not isinstance(value, str) else resolve_path(value, base)


def _only_wanted(example: Example, config: DataConfig) -> Example:
    """The example with the turns of the configured tasks and kinds."""
    return replace(example, tasks=tuple(turn for turn in example.tasks if _is_wanted(turn, config)))


def _is_wanted(turn: TextTask, config: DataConfig) -> bool:
    if turn.question is None:
        return "caption" in config.tasks
    return (
        not config.reward
        and "ask" in config.tasks
        and (not config.question_types or turn.question_type in config.question_types)
    )


def _refuse_split(config: DataConfig, name: str) -> None:
    """A split that would be passed over in silence would train on what is to be measured."""
    if config.split is not None:
        raise DataError(
            f"{config.path} was asked for its split {config.split!r}, and {name} data has none; leave split out, or "
            "take a stretch of it, such as part: [0.9, 1.0]."
        )


def _find_picture(base: Path, name: Path) -> str:
    """Where a picture lies beside its list: in one of the usual folders, else where it would be expected."""
    for folder in IMAGE_FOLDERS:
        if (base / folder / name).exists():
            return str(base / folder / name)
    return str(base / IMAGE_FOLDERS[0] / name)


def _find_vqa_picture(base: Path, subtype: str | None, image: int | str) -> str:
    """VQAv2 names pictures by number: val2014/COCO_val2014_000000000042.jpg."""
    if isinstance(image, str):
        return _find_picture(base, Path(image))
    name = f"COCO_{subtype}_{image:012d}.jpg" if subtype else f"{image:012d}.jpg"
    return _find_picture(base, Path(subtype or "") / name)
