"""Reading data sets in published formats: one reader a format, which returns a list of examples.

Formats: `manifest` (JSONL), `karpathy` (dataset_*.json), `coco` (captions JSON), `vqa` (VQAv2 questions + annotations),
`folder` (HF ImageFolder: metadata.jsonl) and `scenes` (generated). Readers find image files but do not open them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmx.config.schema import DataConfig
from mmx.data.derived_questions import derive_questions
from mmx.data.examples import Example, TextTask
from mmx.data.json_fields import (
    JsonObject,
    RecordLocation,
    id_field,
    list_field,
    load_json,
    optional_text_field,
    single_spaced,
    text_field,
)
from mmx.data.manifest import read_folder, read_manifest
from mmx.data.scene_examples import SceneExamples
from mmx.data.selection import select_tasks
from mmx.errors import DataError, suggest

IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", ".")


class VqaAnswers(NamedTuple):
    """The answers of annotators to one question, and the type that VQAv2 gives them."""

    answers: tuple[str, ...] = ()
    answer_type: str | None = None


def read_examples(config: DataConfig, base: Path = Path()) -> Sequence[Example]:
    """Return the examples of one data set: its `fraction`, then at most `max_examples`.

    Args:
        base: folder that a relative path starts from.

    Raises:
        DataError: the data is missing, damaged (the message names file and line), or nothing is selected.
    """
    if config.path == "scenes" or config.format == "scenes":
        _refuse_split(config, "scenes")
        if config.derive_questions:
            raise DataError(
                "scenes have their own questions; leave derive_questions out.", code="data.derive_questions"
            )
        return SceneExamples(config)
    path = (base / config.path).expanduser()
    if not path.exists():
        raise DataError(
            f"there is no data at {path}; expected a file or folder, set its path in the configuration.",
            code="data.missing",
            path=str(path),
        )
    name = detect_format(path) if config.format == "auto" else config.format
    if name != "karpathy":
        _refuse_split(config, name)
    examples = [example for example in READERS[name](path, config) if example.tasks]
    selected = _select_examples(examples, config)
    if not examples:
        raise _no_texts(path, name)
    if not selected:
        raise _nothing_selected(path, config)
    return selected


def detect_format(path: Path) -> str:
    """Return the format of a file or folder, detected from its name and its first keys. Raises DataError."""
    if path.is_dir():
        return "folder"
    if path.suffix == ".jsonl":
        return "manifest"
    document = _load_document(path)
    if "images" in document and "annotations" in document:
        return "coco"
    if "questions" in document:
        return "vqa"
    if "images" in document:
        return "karpathy"
    raise DataError(
        f"{path} has an unknown format; expected one of {', '.join(READERS)}.", code="data.format", path=str(path)
    )


def _select_examples(examples: Sequence[Example], config: DataConfig) -> list[Example]:
    start, stop = (round(edge * len(examples)) for edge in config.fraction)
    examples = examples[start:stop]
    if config.derive_questions:
        # Cut first: "yes" and "no" are balanced over the examples that remain.
        examples = derive_questions(examples[: config.max_examples], config.seed)
    selected = [select_tasks(example, config) for example in examples]
    return [example for example in selected if example.tasks][: config.max_examples]


def _no_texts(path: Path, name: str) -> DataError:
    """The error for data in which no example has a caption or a question, whatever is selected."""
    if name == "coco":
        return DataError(
            f"no image of {path} has an annotation; compare the ids of its images with image_id of its annotations.",
            code="data.not_joined",
            path=str(path),
        )
    return DataError(
        f"{path} holds no captions and no questions; expected texts.", code="data.no_texts", path=str(path)
    )


def _nothing_selected(path: Path, config: DataConfig) -> DataError:
    types = f" of types {', '.join(config.question_types)}" if config.question_types else ""
    return DataError(
        f"{path} holds no examples for the tasks {', '.join(config.tasks)}{types} in its fraction "
        f"{list(config.fraction)}; change tasks, question_types or fraction.",
        code="data.nothing_selected",
        path=str(path),
        tasks=config.tasks,
        question_types=config.question_types,
    )


def _refuse_split(config: DataConfig, format_name: str) -> None:
    """Refuse a split that the format does not have; ignoring it would train on the data of an evaluation."""
    if config.split is not None:
        raise DataError(
            f"{config.path} was given with split {config.split!r}, and {format_name} data has no splits; leave split "
            "out, or select a part of the data by fraction, such as fraction: [0.9, 1.0].",
            code="data.no_splits",
            format=format_name,
            split=config.split,
        )


# ---- readers ---------------------------------------------------------------------------------------------------


def read_karpathy(path: Path, config: DataConfig) -> list[Example]:
    """Read the JSON of the Karpathy splits. Images of the split `restval` count as train, as is usual."""
    examples = []
    splits = set()
    for number, image in enumerate(list_field(_load_document(path), "images", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"image {number}")
        name = text_field(image, "filename", location)
        split = image.get("split") if isinstance(image, Mapping) else None
        splits.add(str(split))
        if config.split in (None, split, "train" if split == "restval" else None):
            examples.append(_karpathy_example(image, name, path.parent, location))
    if config.split is not None and not examples:
        raise DataError(
            f"{path} has no split {config.split!r}; {suggest(config.split, sorted(splits))}",
            code="data.unknown_split",
            path=str(path),
            split=config.split,
            known=sorted(splits),
        )
    return examples


def _karpathy_example(image: object, name: str, base: Path, location: RecordLocation) -> Example:
    folder = optional_text_field(image, "filepath", location) or ""
    sentences = list_field(image, "sentences", location)
    captions = tuple(single_spaced(text_field(sentence, "raw", location)) for sentence in sentences)
    tasks = (TextTask(captions),) if captions else ()
    return Example(name, {"image": _find_image(base, Path(folder) / name)}, tasks, str(location))


def read_coco(path: Path, config: DataConfig) -> list[Example]:
    """Read COCO captions JSON: images and annotations, joined by image id."""
    document = _load_document(path)
    captions: dict[int | str, list[str]] = {}
    for number, annotation in enumerate(list_field(document, "annotations", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"annotation {number}")
        key = id_field(annotation, "image_id", location)
        captions.setdefault(key, []).append(single_spaced(text_field(annotation, "caption", location)))
    examples = []
    for number, image in enumerate(list_field(document, "images", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"image {number}")
        key = id_field(image, "id", location)
        name = text_field(image, "file_name", location)
        if key in captions:
            image_path = _find_image(path.parent, Path(name))
            task = TextTask(tuple(captions[key]))
            examples.append(Example(str(key), {"image": image_path}, (task,), str(location)))
    return examples


def read_vqa(path: Path, config: DataConfig) -> list[Example]:
    """Read VQAv2: a questions JSON, and the annotations JSON of `config.annotations` (without it, no answers)."""
    document = _load_document(path)
    answers = _read_vqa_answers(path.parent / config.annotations) if config.annotations else {}
    tasks: dict[int | str, list[TextTask]] = {}
    for number, question in enumerate(list_field(document, "questions", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"question {number}")
        found = answers.get(id_field(question, "question_id", location), VqaAnswers())
        task = TextTask(found.answers, text_field(question, "question", location), found.answer_type)
        tasks.setdefault(id_field(question, "image_id", location), []).append(task)
    subtype = optional_text_field(document, "data_subtype", RecordLocation(str(path)))
    examples = []
    for image, image_tasks in tasks.items():
        image_path = _find_vqa_image(path.parent, subtype, image)
        examples.append(Example(str(image), {"image": image_path}, tuple(image_tasks), str(path)))
    return examples


READERS: dict[str, Callable[[Path, DataConfig], list[Example]]] = {
    "manifest": read_manifest,
    "karpathy": read_karpathy,
    "coco": read_coco,
    "vqa": read_vqa,
    "folder": read_folder,
}


def _load_document(path: Path) -> JsonObject:
    return load_json(path, f"expected one of the formats {', '.join(READERS)}.")


def _read_vqa_answers(path: Path) -> dict[int | str, VqaAnswers]:
    """Return the answers by question id."""
    found = {}
    for number, annotation in enumerate(list_field(_load_document(path), "annotations", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"annotation {number}")
        answers = tuple(
            text_field(answer, "answer", location) for answer in list_field(annotation, "answers", location)
        )
        answer_type = optional_text_field(annotation, "answer_type", location)
        found[id_field(annotation, "question_id", location)] = VqaAnswers(answers, answer_type)
    return found


def _find_image(base: Path, name: Path) -> str:
    """Return the path of an image in one of the usual folders next to its list, or in the first if it is in none."""
    for folder in IMAGE_FOLDERS:
        if (base / folder / name).exists():
            return str(base / folder / name)
    return str(base / IMAGE_FOLDERS[0] / name)


def _find_vqa_image(base: Path, subtype: str | None, image: int | str) -> str:
    """VQAv2 names images by number: val2014/COCO_val2014_000000000042.jpg."""
    if isinstance(image, str):
        return _find_image(base, Path(image))
    name = f"COCO_{subtype}_{image:012d}.jpg" if subtype else f"{image:012d}.jpg"
    return _find_image(base, Path(subtype or "") / name)
