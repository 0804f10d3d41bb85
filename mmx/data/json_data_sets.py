"""Readers of published JSON data sets: Karpathy splits, COCO captions, and VQAv2 questions with annotations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from mmx.config.schema import DataConfig
from mmx.data.examples import Example, TextTask
from mmx.data.image_files import find_image, find_vqa_image, join_equal_images
from mmx.data.json_fields import (
    JsonObject,
    RecordLocation,
    id_field,
    list_field,
    load_json,
    optional_text_field,
    text_field,
)
from mmx.data.skipped import SkippedRecords
from mmx.errors import DataError, suggest
from mmx.text.prompts import is_empty_question

EMPTY_CAPTION = "the caption is empty"
NO_CAPTION = "the image has no caption"


class VqaAnswers(NamedTuple):
    """The answers of annotators to one question, the type that VQAv2 gives them, and where they were read."""

    answers: tuple[str, ...] = ()
    answer_type: str | None = None
    location: RecordLocation | None = None


def read_karpathy(
    path: Path, config: DataConfig, sources: Collection[str] | None, skipped: SkippedRecords
) -> list[Example]:
    """Read the JSON of the Karpathy splits. Images of the split `restval` count as train, as is usual."""
    examples = []
    splits = set()
    for number, image in enumerate(list_field(load_document(path), "images", RecordLocation(str(path)))):
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
    return join_equal_images(examples)


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
    return Example(name, {"image": find_image(base, Path(folder) / name)}, tasks, str(location))


def read_coco(
    path: Path, config: DataConfig, sources: Collection[str] | None, skipped: SkippedRecords
) -> list[Example]:
    """Read COCO captions JSON: images and annotations, joined by image id."""
    document = load_document(path)
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
        examples[key] = Example(str(key), {"image": find_image(path.parent, Path(name))}, tasks, str(location))
    for orphans in captions.values():
        for location, text in orphans:
            if text:
                skipped.add(location, "no image has its image_id")
    return join_equal_images(examples.values())


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
    document = load_document(path)
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
        image_path = find_vqa_image(path.parent, subtype, image)
        examples.append(Example(str(image), {"image": image_path}, tuple(image_tasks), str(path)))
    return join_equal_images(examples, join=tuple)  # equal questions with ids of their own are not joined


def load_document(path: Path) -> JsonObject:
    """Return the content of the file. Raises DataError if it is not a JSON object."""
    return load_json(path, "expected one of the formats karpathy, coco and vqa, or a list with one JSON object a line.")


def _read_vqa_answers(path: Path, skipped: SkippedRecords) -> dict[int | str, VqaAnswers]:
    """Return the answers by question id. Of several annotations with one id, the first is used."""
    found: dict[int | str, VqaAnswers] = {}
    for number, annotation in enumerate(list_field(load_document(path), "annotations", RecordLocation(str(path)))):
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
