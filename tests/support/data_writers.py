"""Writes a generated data set in each form that is read, disturbed as real data is.

Records are shuffled, spread over lines, spelled differently, given fields that are not read, and mixed with records
that cannot be used. Some data sets are spoiled: they must be refused with the place.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from random import Random

from data_disturbances import (
    Record,
    Refusal,
    WrittenData,
    add_unread_fields,
    blurred,
    id,
    spelling,
    spoil_record,
    write_document,
    write_text,
)
from generated_data import GeneratedImage, GeneratedQuestion

from mmx.config.schema import DataConfig

# ---- lines -------------------------------------------------------------------------------------------------------


def write_manifest(random: Random, folder: Path, images: Sequence[GeneratedImage]) -> WrittenData:
    """Write a manifest with paths in several spellings."""
    sources = random.choice([None, ("image",), ("audio", "image")])
    lines = []
    for image in images:
        for line in _image_lines(random, image, "caption", "captions"):
            lines.append({"image": spelling(random, folder, f"images/{image.name}"), **line})
    return _write_line_form(random, folder / "list.jsonl", lines, list(images), sources)


def write_folder(random: Random, folder: Path, images: Sequence[GeneratedImage]) -> WrittenData:
    """Write metadata.jsonl of an ImageFolder; questions are lines without a text."""
    lines = []
    for image in images:
        for line in _image_lines(random, image, "text", "captions"):
            lines.append({"file_name": spelling(random, folder, f"images/{image.name}"), **line})
    written = _write_line_form(random, folder / "metadata.jsonl", lines, list(images), ("image",))
    written.config = DataConfig(path=str(folder))
    return written


def write_table(random: Random, folder: Path, images: Sequence[GeneratedImage]) -> WrittenData:
    """Write a CSV or TSV list: cells with commas, quotes and line breaks, lists as JSON or as numbered columns."""
    name, image_column, caption_column = random.choice(
        [("list.csv", "image", "caption"), ("list.tsv", "image", "caption"), ("metadata.csv", "file_name", "text")]
    )
    path = folder / name
    sources = random.choice([None, ("image",), ("audio", "image")])
    lines: list[Record] = []
    for image in images:
        for line in _image_lines(random, image, caption_column, "captions"):
            lines.append({image_column: spelling(random, folder, f"images/{image.name}"), **line})
    random.shuffle(lines)
    numbered = random.random() < 0.3 and all("captions" not in line or len(line["captions"]) < 4 for line in lines)
    if numbered:
        lines = [_with_numbered_captions(line) for line in lines]
    columns = list(dict.fromkeys(column for line in lines for column in line))
    random.shuffle(columns)
    config = DataConfig(path=str(folder if name.startswith("metadata") else path))
    written = WrittenData(config, list(images), sum(_num_texts(line) for line in lines), sources=sources)
    delimiter = "\t" if name.endswith("tsv") else ","
    rows = [[_cell(line.get(column)) for column in columns] for line in lines]
    spoiled = random.randrange(len(lines)) if random.random() < 0.15 else None
    if spoiled is not None:
        rows[spoiled], code = _spoiled_row(random, columns, rows[spoiled])
    buffer = StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=random.choice(["\n", "\r\n"]))
    writer.writerow(columns)
    for number, row in enumerate(rows):
        line_number = buffer.getvalue().count("\n") + 1
        writer.writerow(row)
        if number == spoiled:
            written.refusal = Refusal(code, path, line_number)
    write_text(random, path, buffer.getvalue(), written)
    return written


def _with_numbered_captions(line: Record) -> Record:
    captions = line.get("captions")
    if not isinstance(captions, list):
        return line
    others = {name: value for name, value in line.items() if name != "captions"}
    return {**others, **{f"caption_{number}": caption for number, caption in enumerate(captions)}}


def _cell(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _spoiled_row(random: Random, columns: list[str], cells: list[str]) -> tuple[list[str], str]:
    """Return a row that must be refused, and the code."""
    texts = [index for index, name in enumerate(columns) if name not in ("image", "file_name")]
    without_texts = ["" if index in texts else cell for index, cell in enumerate(cells)]
    choices = [
        ([*cells, "one more"], "data.row_length"),
        (cells[:-1] or ["", ""], "data.row_length"),
        (without_texts, "data.no_task"),
    ]
    for name, wrong in (("captions", '["a dog'), ("captions", "['a dog', 'a cat']"), ("box", "0, 0, 1, 1")):
        if name in columns:
            changed = list(cells)
            changed[columns.index(name)] = wrong
            if name == "captions" or "question" in columns and changed[columns.index("question")]:
                choices.append((changed, "data.field_type"))
    return random.choice(choices)


def _image_lines(random: Random, image: GeneratedImage, one: str, several: str) -> list[Record]:
    """Return the texts of an image as lines: one text or several a line, captions with a question or without."""
    lines: list[Record] = []
    captions = list(image.captions)
    while captions:
        count = random.randint(1, len(captions))
        texts = [blurred(random, caption) for caption in captions[:count]]
        del captions[:count]
        if len(texts) > 1 and texts[0] not in texts[1:] and random.random() < 0.3:
            lines.append({one: texts[0], several: texts[1:]})
        else:
            lines.append({one: texts[0]} if len(texts) == 1 else {several: texts})
    for question in image.questions:
        for record in _question_lines(random, question):
            if lines and "question" not in lines[0] and random.random() < 0.3:
                lines[0].update(record)
            else:
                lines.append(record)
    return lines


def _question_lines(random: Random, question: GeneratedQuestion) -> list[Record]:
    """Return a question in one line, or in one for each of its answers."""
    record: Record = {"question": question.text}
    if question.question_type or random.random() < 0.5:
        record["question_type"] = question.question_type
    if question.box or random.random() < 0.3:
        record["box"] = question.box
    answers = list(question.answers)
    if len(answers) > 1 and random.random() < 0.5:
        return [{**record, "answer": answer} for answer in answers]
    if len(answers) == 1:
        return [{**record, "answer": answers[0]}]
    return [{**record, "answers": answers} if answers else record]


def _write_line_form(
    random: Random, path: Path, lines: list[Record], images: list[GeneratedImage], sources: tuple[str, ...] | None
) -> WrittenData:
    random.shuffle(lines)
    for line in lines:
        add_unread_fields(random, line, texts=sources is not None)
    rows = sum(_num_texts(line) for line in lines)
    written = WrittenData(DataConfig(path=str(path)), images, rows, sources=sources)
    spoiled = random.randrange(len(lines)) if random.random() < 0.15 else None
    texts: list[str] = []
    for index, line in enumerate(lines):
        if index == spoiled:
            text, code = _spoiled_line(random, line, sources)
            texts.append(text)
            written.refusal = Refusal(code, path, len(texts))
        else:
            texts.append(json.dumps(line, ensure_ascii=random.random() < 0.3))
        if random.random() < 0.1:
            texts.append(random.choice(["", "   "]))
    end = random.choice(["\n", "\r\n"])
    write_text(random, path, "".join(text + end for text in texts), written)
    return written


def _num_texts(line: Record) -> int:
    """Return the number of captions and questions of a line; a question counts by its answers, if it has any."""
    captions = line.get("captions", [])
    answers = line.get("answers", [])
    assert isinstance(captions, list) and isinstance(answers, list)
    numbered = sum(name.startswith("caption_") for name in line)
    count = len(captions) + numbered + ("caption" in line) + ("text" in line)
    return count + max(1, len(answers)) if "question" in line else count


def _spoiled_line(random: Random, line: Record, sources: tuple[str, ...] | None) -> tuple[str, str]:
    """Return a line that must be refused, and the code."""
    image = "image" if "image" in line else "file_name"
    texts = {"caption", "captions", "text", "question"}
    changes: list[tuple[Record, str]] = [
        ({key: value for key, value in line.items() if key not in texts}, "data.no_task"),
        ({**line, "caption": 7, "captions": None, "text": None}, "data.field_type"),
        ({**line, "question": "where?", "box": [0, 0, 300, 200]}, "data.field_type"),
        ({**line, "question": "where?", "box": None, "answers": ["x", " "]}, "data.field_type"),
        ({image: line[image], "caption": "a dog", "answer": "yes"}, "data.no_question"),
    ]
    if image == "file_name":
        changes.append(({key: value for key, value in line.items() if key != image}, "data.missing_field"))
    elif sources is not None:
        changes.append(({"image_path": "x", **{k: v for k, v in line.items() if k != image}}, "data.unknown_source"))
    changed, code = random.choice(changes)
    if code == "data.no_task":  # an answer or a box without a question is another error
        changed = {key: value for key, value in changed.items() if key not in ("answer", "answers", "box")}
    if image == "file_name" and code == "data.field_type" and changed.get("caption") == 7:
        changed["text"] = 7
        del changed["caption"]
    text = json.dumps(changed)
    repeated = f'{{"{image}": "first.jpg", {json.dumps({image: "second.jpg", **line})[1:]}'
    return random.choice([(text, code), (text[:-3], "data.not_json"), (repeated, "data.repeated_key")])


# ---- documents ---------------------------------------------------------------------------------------------------


def write_karpathy(random: Random, folder: Path, images: Sequence[GeneratedImage]) -> WrittenData:
    """Write a Karpathy document: records of one image may be several, and some sentences are empty."""
    split = random.choice([None, images[0].split])
    wanted = {None: None, "train": ("train", "restval")}.get(split, (split,))
    records: list[Record] = []
    for image in images:
        for captions in _parts(random, image.captions):
            sentences: list[Record] = [{"raw": blurred(random, caption)} for caption in captions]
            record: Record = {"sentences": sentences, "split": image.split, **_file_fields(random, folder, image.name)}
            records.append(add_unread_fields(random, record))
    random.shuffle(records)
    for _ in range(random.choice([0, 0, 1, 5])):
        records.insert(random.randint(0, len(records)), {"filename": "none.jpg", "split": images[0].split})
    selected = [image for image in images if wanted is None or image.split in wanted]
    path = folder / "dataset_x.json"
    written = WrittenData(DataConfig(path=str(path), split=split), _with_captions_only(selected), 0)
    for number, record in enumerate(records):
        _finish_karpathy_record(random, number, record, written, wanted)
    spoil_record(random, written, path, "image", records, ("filename",), {})
    write_document(random, path, {"images": records, "dataset": "x"}, written)
    return written


def _finish_karpathy_record(
    random: Random, number: int, record: Record, written: WrittenData, splits: Sequence[str | None] | None
) -> None:
    """Insert empty sentences, and count rows and skipped records if the record is selected."""
    sentences = record.setdefault("sentences", [])
    assert isinstance(sentences, list)
    is_empty = not sentences
    for _ in range(random.choice([0, 0, 0, 1, 2])):
        sentences.insert(random.randint(0, len(sentences)), {"raw": random.choice(["", " \n"])})
    if splits is not None and record["split"] not in splits:
        return
    for index, sentence in enumerate(sentences):
        written.rows += 1
        if not sentence["raw"].strip():
            written.skipped.append(f"image {number}, sentence {index}")
    if is_empty:
        written.rows += 1
        written.skipped.append(f"image {number}")


def write_coco(random: Random, folder: Path, images: Sequence[GeneratedImage]) -> WrittenData:
    """Write COCO captions: ids as numbers or texts, orphans, duplicate ids, images without captions."""
    path = folder / "captions.json"
    written = WrittenData(DataConfig(path=str(path)), _with_captions_only(images), 0)
    records: list[Record] = []
    annotations: list[Record] = []
    for image in images:
        for index, captions in enumerate(_parts(random, image.captions)):
            key = image.number + 1000 * index
            name = spelling(random, folder, image.name)
            records.append(add_unread_fields(random, {"id": id(random, key), "file_name": name}))
            annotations += [{"image_id": id(random, key), "caption": blurred(random, text)} for text in captions]
    random.shuffle(records)
    originals = len(records)
    for _ in range(random.choice([0, 0, 1, 5])):
        kind = random.choice(["duplicate", "no caption"])
        key = records[random.randrange(originals)]["id"] if kind == "duplicate" else id(random, 9000 + len(records))
        written.skipped.append(f"image {len(records)}")
        records.append({"id": key, "file_name": "other.jpg"})
    random.shuffle(annotations)
    for _ in range(random.choice([0, 0, 1, 5])):
        unusable = random.choice([{"image_id": 8000, "caption": "lost"}, {"image_id": records[0]["id"], "caption": ""}])
        annotations.insert(random.randint(0, len(annotations)), dict(unusable))
    for number, annotation in enumerate(annotations):
        if annotation["image_id"] == 8000 or annotation["caption"] == "":
            written.skipped.append(f"annotation {number}")
    written.rows = len(annotations) + len(records) - originals
    spoil_record(random, written, path, "image", records, ("id", "file_name"), {"file_name": 7, "id": [1]})
    spoil_record(random, written, path, "annotation", annotations, ("image_id", "caption"), {"caption": 7})
    write_document(random, path, {"images": records, "annotations": annotations, "info": {"year": 1}}, written)
    return written


def write_vqa(random: Random, folder: Path, images: Sequence[GeneratedImage]) -> WrittenData:
    """Write questions and annotations of VQAv2: ids as numbers or texts, orphans, duplicates, missing answers."""
    questions: list[Record] = []
    annotations: list[Record] = []
    expected = []
    for image in images:
        kept = []
        by_number = random.random() < 0.3  # as VQAv2 names images
        if by_number:
            image = replace(image, name=f"{image.number:012d}.jpg")
            (folder / "images" / image.name).touch()
        for index, question in enumerate(image.questions):
            key = 10 * image.number + index
            image_id = id(random, image.number) if by_number else spelling(random, folder, image.name)
            questions.append({"question_id": id(random, key), "image_id": image_id, "question": question.text})
            if question.answers or random.random() < 0.5:
                annotations.append(_annotation(random, key, question))
                kept.append(replace(question, box=None))
            else:
                kept.append(replace(question, box=None, question_type=None))
        expected.append(replace(image, captions=(), questions=tuple(kept)))
    random.shuffle(questions)
    random.shuffle(annotations)
    path = folder / "questions.json"
    written = WrittenData(DataConfig(path=str(path), annotations="answers.json"), expected, 0)
    answered = {str(annotation["question_id"]) for annotation in annotations}
    for number, record in enumerate(questions):
        if str(record["question_id"]) not in answered:
            written.without_answers.append(f"question {number}")
    questions_given = _add_unusable_questions(random, questions, written)
    annotations_given = _add_unusable_annotations(random, annotations, written)
    written.rows = questions_given + annotations_given
    keys = ("question_id", "image_id", "question")
    spoil_record(random, written, path, "question", questions, keys, {"question": ["q"], "question_id": None})
    answers = folder / "answers.json"
    spoil_record(random, written, answers, "annotation", annotations, ("question_id", "answers"), {"answers": "two"})
    write_document(random, answers, {"annotations": annotations, "license": {}}, written)
    write_document(random, path, {"questions": questions, "task_type": "Open-Ended"}, written)
    return written


def _annotation(random: Random, key: int, question: GeneratedQuestion) -> Record:
    answers: list[Record] = [{"answer": answer, "answer_confidence": "yes"} for answer in question.answers]
    record: Record = {"question_id": id(random, key), "answers": answers, "answer_type": question.question_type}
    return add_unread_fields(random, record)


def _add_unusable_questions(random: Random, questions: list[Record], written: WrittenData) -> int:
    """Append questions that are empty or have the id of an earlier one. Returns how many questions there are."""
    for _ in range(random.choice([0, 0, 1, 5])):
        written.skipped.append(f"question {len(questions)}")
        if random.random() < 0.5:
            questions.append({**questions[0], "question": "another?"})
        else:
            questions.append({"question_id": 80000 + len(questions), "image_id": "x.jpg", "question": " "})
    return len(questions)


def _add_unusable_annotations(random: Random, annotations: list[Record], written: WrittenData) -> int:
    """Append orphans and duplicates, and insert empty answers. Returns how many records these are."""
    originals = len(annotations)
    given = 0
    for number, annotation in enumerate(annotations):
        answers = annotation["answers"]
        assert isinstance(answers, list)
        if random.random() < 0.2:
            answers.append({"answer": " "})
            written.skipped.append(f"annotation {number}")
            given += 1
    for _ in range(random.choice([0, 0, 1, 5])):
        key = annotations[0]["question_id"] if originals and random.random() < 0.5 else 90000 + len(annotations)
        written.skipped.append(f"annotation {len(annotations)}")
        annotations.append({"question_id": key, "answers": [{"answer": "lost"}]})
        given += 1
    return given


def _parts(random: Random, captions: Sequence[str]) -> list[tuple[str, ...]]:
    """Divide captions over one record of an image, or two."""
    cut = random.randint(1, len(captions))
    parts = [tuple(captions[:cut]), tuple(captions[cut:])]
    return [part for part in parts if part]


def _with_captions_only(images: Sequence[GeneratedImage]) -> list[GeneratedImage]:
    return [replace(image, questions=()) for image in images]


def _file_fields(random: Random, folder: Path, name: str) -> Record:
    """Return the name of a file, in one field or two."""
    return random.choice(
        [{"filename": spelling(random, folder, name)}, {"filepath": "images/.", "filename": name}, {"filename": name}]
    )


WRITERS: dict[str, Callable[[Random, Path, Sequence[GeneratedImage]], WrittenData]] = {
    "manifest": write_manifest,
    "folder": write_folder,
    "table": write_table,
    "karpathy": write_karpathy,
    "coco": write_coco,
    "vqa": write_vqa,
}
