"""Reading data sets in published formats: one reader a format, which returns a list of examples.

Formats: `manifest` (JSONL), `karpathy` (dataset_*.json), `coco` (captions JSON), `vqa` (VQAv2 questions + annotations),
`folder` (HF ImageFolder: metadata.jsonl) and `scenes` (generated). Readers find image files but do not open them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from mmx.config.schema import DataConfig
from mmx.data.derived_questions import derive_questions
from mmx.data.examples import Example, TextTask, check_sources, join_tasks
from mmx.data.json_fields import (
    JsonObject,
    RecordLocation,
    absolute_path,
    id_field,
    list_field,
    load_json,
    optional_text_field,
    text_field,
)
from mmx.data.manifest import read_folder, read_manifest
from mmx.data.scene_examples import SceneExamples
from mmx.data.selection import select_tasks
from mmx.data.skipped import ReportSkipped, SkippedRecords, warn_skipped
from mmx.errors import DataError, suggest
from mmx.text.prompts import is_empty_question

IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", ".")
EMPTY_CAPTION = "the caption is empty"
NO_CAPTION = "the image has no caption"


class VqaAnswers(NamedTuple):
    """The answers of annotators to one question, the type that VQAv2 gives them, and where they were read."""

    answers: tuple[str, ...] = ()
    answer_type: str | None = None
    location: RecordLocation | None = None


def read_examples(
    config: DataConfig,
    base: Path = Path(),
    sources: Collection[str] | None = None,
    on_skipped: ReportSkipped = warn_skipped,
) -> Sequence[Example]:
    """Return the examples of one data set: its `fraction`, then at most `max_examples`.

    Args:
        base: folder that a relative path starts from.
        sources: names of the model's sources, see `read_manifest`; None if they are unknown.
        on_skipped: called with a sentence about records that are not used, such as annotations without an image: their
            number, and the first of them. By default it is a Python warning.

    Raises:
        DataError: the data is missing, damaged (the message names file and line), has an example without an input for
            any of the sources, or nothing is selected.
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
    skipped = SkippedRecords()
    examples = [example for example in READERS[name](path, config, sources, skipped) if example.tasks]
    for sentence in skipped.sentences():
        on_skipped(sentence)
    if sources is not None:
        for example in examples:
            check_sources(example, sources)
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
        examples = derive_questions(examples[: config.max_examples], config.seed, config.wordings, config.unanswerable)
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


def read_karpathy(
    path: Path, config: DataConfig, sources: Collection[str] | None, skipped: SkippedRecords
) -> list[Example]:
    """Read the JSON of the Karpathy splits. Images of the split `restval` count as train, as is usual."""
    examples = []
    splits = set()
    for number, image in enumerate(list_field(_load_document(path), "images", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"image {number}")
        name = text_field(image, "filename", location)
        split = image.get("split") if isinstance(image, Mapping) else None
        splits.add(str(split))
        if config.split in (None, split, "train" if split == "restval" else None):
            examples.append(_karpathy_example(image, name, path.parent, location, skipped))
    if config.split is not None and not examples:
        raise DataError(
            f"{path} has no split {config.split!r}; {suggest(config.split, sorted(splits))}",
            code="data.unknown_split",
            path=str(path),
            split=config.split,
            known=sorted(splits),
        )
    return _join_equal_images(examples)


def _karpathy_example(
    image: object, name: str, base: Path, location: RecordLocation, skipped: SkippedRecords
) -> Example:
    folder = optional_text_field(image, "filepath", location) or ""
    captions = []
    for number, sentence in enumerate(list_field(image, "sentences", location)):
        caption = text_field(sentence, "raw", location).strip()
        if caption:
            captions.append(caption)
        else:
            skipped.add(RecordLocation(location.path, record=f"{location.record}, sentence {number}"), EMPTY_CAPTION)
    if not captions:
        skipped.add(location, NO_CAPTION)
    has_id = isinstance(image, Mapping) and image.get("cocoid") is not None
    key = id_field(image, "cocoid", location) if has_id else None
    tasks = (TextTask(tuple(captions), id=key),) if captions else ()
    return Example(name, {"image": _find_image(base, Path(folder) / name)}, tasks, str(location))


def read_coco(
    path: Path, config: DataConfig, sources: Collection[str] | None, skipped: SkippedRecords
) -> list[Example]:
    """Read COCO captions JSON: images and annotations, joined by image id."""
    document = _load_document(path)
    captions = _read_coco_captions(document, path, skipped)
    examples: dict[int | str, Example] = {}
    for number, image in enumerate(list_field(document, "images", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"image {number}")
        key = id_field(image, "id", location)
        name = text_field(image, "file_name", location)
        if key in examples:
            skipped.add(location, "an earlier image has the same id")
            continue
        texts = [text for _, text in captions.pop(key, []) if text]
        if not texts:
            skipped.add(location, NO_CAPTION)
        tasks = (TextTask(tuple(texts), id=key),) if texts else ()
        examples[key] = Example(str(key), {"image": _find_image(path.parent, Path(name))}, tasks, str(location))
    for orphans in captions.values():
        for location, text in orphans:
            if text:
                skipped.add(location, "no image has its image_id")
    return _join_equal_images(examples.values())


def _read_coco_captions(
    document: JsonObject, path: Path, skipped: SkippedRecords
) -> dict[int | str, list[tuple[RecordLocation, str]]]:
    """Return the captions by image id, and where they were read. Those that are empty are reported."""
    captions: dict[int | str, list[tuple[RecordLocation, str]]] = {}
    for number, annotation in enumerate(list_field(document, "annotations", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"annotation {number}")
        key = id_field(annotation, "image_id", location)
        text = text_field(annotation, "caption", location).strip()
        if not text:
            skipped.add(location, EMPTY_CAPTION)
        captions.setdefault(key, []).append((location, text))
    return captions


def read_vqa(path: Path, config: DataConfig, sources: Collection[str] | None, skipped: SkippedRecords) -> list[Example]:
    """Read VQAv2: a questions JSON, and the annotations JSON of `config.annotations` (without it, no answers)."""
    document = _load_document(path)
    answers = _read_vqa_answers(path.parent / config.annotations, skipped) if config.annotations else {}
    tasks: dict[int | str, list[TextTask]] = {}
    question_ids = set()
    for number, question in enumerate(list_field(document, "questions", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"question {number}")
        key = id_field(question, "question_id", location)
        image = id_field(question, "image_id", location)
        text = text_field(question, "question", location)
        if key in question_ids:
            skipped.add(location, "an earlier question has the same question_id")
            continue
        question_ids.add(key)
        if is_empty_question(text):
            skipped.add(location, "the question is empty")
            continue
        if config.annotations and key not in answers:
            skipped.add(location, "no annotation has its question_id", "without answers")
        found = answers.get(key, VqaAnswers())
        tasks.setdefault(image, []).append(TextTask(found.answers, text, found.answer_type, id=key))
    for key, orphan in answers.items():
        if key not in question_ids and orphan.location is not None:
            skipped.add(orphan.location, "no question has its question_id")
    subtype = optional_text_field(document, "data_subtype", RecordLocation(str(path)))
    examples = []
    for image, image_tasks in tasks.items():
        image_path = _find_vqa_image(path.parent, subtype, image)
        examples.append(Example(str(image), {"image": image_path}, tuple(image_tasks), str(path)))
    return _join_equal_images(examples, join=tuple)  # equal questions with ids of their own are not joined


Reader = Callable[[Path, DataConfig, Collection[str] | None, SkippedRecords], list[Example]]
READERS: dict[str, Reader] = {
    "manifest": lambda path, config, sources, skipped: read_manifest(path, config, sources),
    "karpathy": read_karpathy,
    "coco": read_coco,
    "vqa": read_vqa,
    "folder": lambda path, config, sources, skipped: read_folder(path, config, sources),
}


def _load_document(path: Path) -> JsonObject:
    return load_json(path, f"expected one of the formats {', '.join(READERS)}.")


def _read_vqa_answers(path: Path, skipped: SkippedRecords) -> dict[int | str, VqaAnswers]:
    """Return the answers by question id. Of several annotations with one id, the first is used."""
    found: dict[int | str, VqaAnswers] = {}
    for number, annotation in enumerate(list_field(_load_document(path), "annotations", RecordLocation(str(path)))):
        location = RecordLocation(str(path), record=f"annotation {number}")
        key = id_field(annotation, "question_id", location)
        answers = []
        for answer in list_field(annotation, "answers", location):
            text = text_field(answer, "answer", location)
            if text.strip():
                answers.append(text)
            else:
                skipped.add(location, "an answer is empty")
        answer_type = optional_text_field(annotation, "answer_type", location)
        if key in found:
            skipped.add(location, "an earlier annotation has the same question_id")
        else:
            found[key] = VqaAnswers(tuple(answers), answer_type, location)
    return found


def _join_equal_images(
    examples: Iterable[Example], join: Callable[[Iterable[TextTask]], tuple[TextTask, ...]] = join_tasks
) -> list[Example]:
    """Make one example of all records of one image file, in the order in which the images first appear."""
    joined: dict[str, Example] = {}
    for example in examples:
        image = absolute_path(str(example.sources["image"]))
        if image in joined:
            first = joined[image]
            example = replace(first, tasks=join((*first.tasks, *example.tasks)))
        joined[image] = example
    return list(joined.values())


def _find_image(base: Path, name: Path) -> str:
    """Return the path of an image in one of the usual folders next to its list, or in the first if it is in none."""
    for spelling in dict.fromkeys((name, Path(PureWindowsPath(name).as_posix()))):
        for folder in IMAGE_FOLDERS:
            if (base / folder / spelling).exists():
                return str(base / folder / spelling)
    return str(base / IMAGE_FOLDERS[0] / name)


def _find_vqa_image(base: Path, subtype: str | None, image: int | str) -> str:
    """VQAv2 names images by number: val2014/COCO_val2014_000000000042.jpg. An id may also be the name of a file."""
    by_id = _find_image(base, Path(str(image)))
    if isinstance(image, str) or Path(by_id).is_file():
        return by_id
    name = f"COCO_{subtype}_{image:012d}.jpg" if subtype else f"{image:012d}.jpg"
    return _find_image(base, Path(subtype or "") / name)
