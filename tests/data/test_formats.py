"""Readers: each format from a small file, and every error with its code, file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.config.schema import DataConfig
from mmx.data.examples import Example, TextTask
from mmx.data.formats import detect_format, read_examples
from mmx.data.json_fields import read_lines, resolve_path
from mmx.data.scene_texts import captions, pointed_questions, questions
from mmx.data.scenes import generate_scene
from mmx.errors import DataError


def write_lines(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def write_json(path: Path, document: Any) -> str:
    path.write_text(json.dumps(document))
    return str(path)


def read(path: str, **fields: Any) -> list[Example]:
    return list(read_examples(DataConfig(path=path, **fields)))


def read_error(path: str, **fields: Any) -> DataError:
    with pytest.raises(DataError) as error:
        read(path, **fields)
    assert "\n" not in str(error.value)
    return error.value


# ---- manifest ----------------------------------------------------------------------------------------------------


def test_manifest_joins_the_lines_of_one_input_in_order(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            {"image": "x/a.jpg", "captions": ["one", "two"]},
            "",
            {"image": "b.jpg", "caption": "alone"},
            {"image": "x/a.jpg", "question": "what?", "answers": ["this", "that"], "question_type": "other"},
            {"image": "x/a.jpg", "question": "where?", "answer": "here", "box": [0, 0.1, 0.5, 1]},
        ],
    )
    first, second = read(path)
    assert first.sources == {"image": str(tmp_path / "x/a.jpg")}
    assert first.tasks == (
        TextTask(("one", "two")),
        TextTask(("this", "that"), "what?", "other"),
        TextTask(("here",), "where?", None, (0.0, 0.1, 0.5, 1.0)),
    )
    assert (first.id, first.origin, second.origin) == ("x/a.jpg", f"{path}:1", f"{path}:3")
    assert second.tasks == (TextTask(("alone",)),)


def test_manifest_accepts_any_source_and_keeps_texts(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        [{"text": "read me", "audio": "b.wav", "numbers": [1, 2], "image": None, "caption": "c"}],
    )
    (example,) = read(path)
    assert example.sources == {"text": "read me", "audio": str(tmp_path / "b.wav"), "numbers": [1, 2]}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("answrs", {"answers"}),
        ("anwser", {"answer"}),
        ("answerss", {"answers"}),
        ("Answers", {"answers"}),
        ("evidense", {"evidence"}),
        ("question_tpye", {"question_type"}),
    ],
)
def test_a_misspelt_field_of_a_task_is_refused_with_the_right_one(tmp_path, name, meant):
    line = {"image": "a", "question": "what?", name: ["x"]}
    path = write_lines(tmp_path / "list.jsonl", [{"image": "a", "captions": ["x"]}, line])
    error = read_error(path)
    assert (error.code, error.details["line"], error.details["key"]) == ("data.misspelt_field", 2, name)
    assert error.details["expected"] in meant


def test_other_fields_are_not_taken_for_misspelt_ones(tmp_path):
    others = {"questions": 2, "ids": 1, "boxes": [], "answer_type": "x", "caption_id": 3, "split": "a", "captionss": 1}
    line = {"image": "a", "question": "what?", "answers": ["x"], "captions": ["y"], **others}
    (example,) = read_examples(DataConfig(path=write_lines(tmp_path / "list.jsonl", [line])), sources=["image"])
    assert [task.targets for task in example.tasks] == [("y",), ("x",)]
    named_so = {"image": "a", "question": "what?", "answerz": "z"}
    path = write_lines(tmp_path / "source.jsonl", [named_so])
    (example,) = read_examples(DataConfig(path=path), sources=["image", "answerz"])
    assert example.sources.keys() == {"image", "answerz"}


@pytest.mark.parametrize("question", ["", " \t", "?", "？ ؟", "..."])
def test_an_empty_question_of_a_manifest_is_refused_with_its_line(tmp_path, question):
    lines = [{"image": "a", "captions": ["x"]}, {"image": "a", "question": question, "answers": ["x"]}]
    path = write_lines(tmp_path / "list.jsonl", lines)
    error = read_error(path)
    assert (error.code, error.details["path"], error.details["line"]) == ("input.empty_question", path, 2)


def test_manifest_accepts_a_question_without_answers(tmp_path):
    (example,) = read(write_lines(tmp_path / "a.jsonl", [{"image": "a", "question": "q?"}]))
    assert example.tasks == (TextTask((), "q?"),)


@pytest.mark.parametrize("sources", [None, ["image"]])
def test_captions_of_an_image_on_several_lines_are_references_of_one_task(tmp_path, sources):
    rows = [
        {"image": "x/a.jpg", "caption": "one", "width": 640, "id": 1},
        {"image": "b.jpg", "caption": "alone"},
        '{"image": "./x//a.jpg", "caption": "two", "score": NaN, "id": 2}',
        {"image": str(tmp_path / "y" / ".." / "x" / "a.jpg"), "captions": ["three", "one"], "cropped": True},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    first, second = read_examples(DataConfig(path=path), sources=sources)
    assert first.tasks == (TextTask(("one", "two", "three", "one")),)
    assert (first.id, first.sources) == ("x/a.jpg", {"image": str(tmp_path / "x/a.jpg")})
    assert second.tasks == (TextTask(("alone",)),)


def test_fields_that_are_not_sources_do_not_separate_the_lines_of_an_image(tmp_path):
    rows = [{"image": "a.jpg", "caption": text, "author": f"by {text}", "boxes": [text]} for text in ("one", "two")]
    path = write_lines(tmp_path / "a.jsonl", [*rows, {"image": "a.jpg", "audio": "a.wav", "caption": "three"}])
    first, second = read_examples(DataConfig(path=path), sources=["image", "audio"])
    assert first.tasks == (TextTask(("one", "two")),)
    assert (second.id, second.tasks) == ("a.jpg + a.wav", (TextTask(("three",)),))
    assert len(read(path)) == 3, "without the names of the sources, a text may be an input"


def test_answers_to_a_question_on_several_lines_are_references_of_one_task(tmp_path):
    question = {"image": "a.jpg", "question": "what?"}
    rows = [
        {**question, "answer": "this"},
        {**question, "answer": "here", "box": [0, 0, 1, 0.5]},
        {**question, "answers": ["that", "this"]},
    ]
    (example,) = read(write_lines(tmp_path / "a.jsonl", rows))
    assert example.tasks == (
        TextTask(("this", "that", "this"), "what?"),
        TextTask(("here",), "what?", None, (0.0, 0.0, 1.0, 0.5)),
    )


def test_line_with_captions_and_a_question_keeps_both(tmp_path):
    rows = [
        {"image": "a.jpg", "question": "what?", "answer": "this", "captions": ["one"]},
        {"image": "a.jpg", "caption": "two"},
    ]
    (example,) = read(write_lines(tmp_path / "a.jsonl", rows))
    assert example.tasks == (TextTask(("one", "two")), TextTask(("this",), "what?"))


def test_texts_under_both_names_of_a_line_are_kept(tmp_path):
    rows = [
        {"image": "a.jpg", "captions": ["one", "two"], "caption": "three"},
        {"image": "a.jpg", "question": "what?", "answers": ["this", "this"], "answer": "that"},
        {"image": "b.jpg", "question": "what?", "answers": ["this", "that", "this"], "answer": "this"},
    ]
    first, second = read(write_lines(tmp_path / "a.jsonl", rows))
    assert first.tasks == (TextTask(("one", "two", "three")), TextTask(("this", "this", "that"), "what?"))
    assert second.tasks == (TextTask(("this", "that", "this"), "what?"),)
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "first", "caption": "second"}])
    (example,) = read(str(tmp_path))
    assert example.tasks == (TextTask(("first", "second")),)


def test_windows_separators_are_read_where_the_file_exists(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("images/a.jpg", "c\\d.jpg"):
        (tmp_path / name).touch()
    names = ["images\\a.jpg", "images/a.jpg", "c\\d.jpg", "images\\none.jpg"]
    path = write_lines(tmp_path / "a.jsonl", [{"image": name, "caption": name} for name in names])
    found = [Path(str(example.sources["image"])) for example in read(path)]
    assert found == [tmp_path / name for name in ("images/a.jpg", "c\\d.jpg", "images\\none.jpg")]
    images = [{"filename": name, "filepath": "..\\images", "sentences": [{"raw": "one"}]} for name in ("a.jpg", "b")]
    (tmp_path / "lists").mkdir()
    first, second = read(write_json(tmp_path / "lists" / "k.json", {"images": images}))
    assert Path(str(first.sources["image"])).resolve() == tmp_path / "images" / "a.jpg"
    assert not Path(str(second.sources["image"])).exists()


def test_line_without_a_source_of_the_model_is_refused(tmp_path):
    rows = [
        {"image": "a.jpg", "caption": "x", "width": 3, "score": 0.5, "id": 1, "split": "val"},
        {"image_path": "a.jpg", "caption": "x", "width": 3},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as error:
        read_examples(DataConfig(path=path), sources=["image", "audio"])
    details = error.value.details
    assert (error.value.code, details["path"], details["line"]) == ("data.unknown_source", path, 2)
    assert (details["unknown"], details["known"]) == (["image_path", "width"], ["audio", "image"])
    assert str(error.value).startswith(f"{path}:2 ")
    assert len(read_examples(DataConfig(path=path, max_examples=1))) == 1


def test_document_is_refused_for_a_model_without_a_source_for_images(tmp_path):
    for path in (karpathy(tmp_path), vqa(tmp_path)):
        with pytest.raises(DataError) as error:
            read_examples(DataConfig(path=path), sources=["text"])
        assert (error.value.code, error.value.details["unknown"]) == ("data.unknown_source", ["image"])
        assert error.value.details["origin"].startswith(path)


INVALID_LINES = {
    "not JSON": ("{broken", "not_json", None),
    "a list": ("[1, 2]", "not_json", None),
    "too deep": ("[" * 100_000, "not_json", None),
    "no input": ({"captions": ["x"]}, "no_input", None),
    "numbers only": ({"width": 3, "large": True, "captions": ["x"]}, "no_input", None),
    "no task": ({"image": "a"}, "no_task", None),
    "captions a number": ({"image": "a", "captions": 3}, "field_type", "captions"),
    "captions empty": ({"image": "a", "captions": []}, "field_type", "captions"),
    "captions with a number": ({"image": "a", "captions": ["x", 3]}, "field_type", "captions"),
    "caption blank": ({"image": "a", "caption": "  "}, "field_type", "caption"),
    "caption an object": ({"image": "a", "caption": {"en": "x"}}, "field_type", "caption"),
    "question a number": ({"image": "a", "question": 3, "answer": "x"}, "field_type", "question"),
    "question null": ({"image": "a", "question": None}, "field_type", "question"),
    "answers of numbers": ({"image": "a", "question": "q", "answers": [1, 2]}, "field_type", "answers"),
    "answer a number": ({"image": "a", "question": "q", "answer": 2}, "field_type", "answer"),
    "answers an object": ({"image": "a", "question": "q", "answers": [{"answer": "x"}]}, "field_type", "answers"),
    "question type a number": ({"image": "a", "question": "q", "question_type": 1}, "field_type", "question_type"),
    "box of three": ({"image": "a", "question": "q", "box": [0, 0, 1]}, "field_type", "box"),
    "box of texts": ({"image": "a", "question": "q", "box": ["0", "0", "1", "1"]}, "field_type", "box"),
    "box in pixels": ({"image": "a", "question": "q", "box": [0, 0, 120, 80]}, "field_type", "box"),
    "box reversed": ({"image": "a", "question": "q", "box": [0.9, 0, 0.1, 1]}, "field_type", "box"),
    "box nested": ({"image": "a", "question": "q", "box": [[0, 0, 1, 1]]}, "field_type", "box"),
    "box too large": ({"image": "a", "question": "q", "box": [0, 0, 10**400, 1]}, "field_type", "box"),
    "bbox for box": ({"image": "a", "question": "q", "bbox": [0, 0, 1, 1]}, "bbox", "bbox"),
    "box with NaN": ('{"image": "a", "question": "q", "box": [0, 0, NaN, 1]}', "field_type", "box"),
    "answer without a question": ({"image": "a", "caption": "x", "answer": "y"}, "no_question", "answer"),
    "box without a question": ({"image": "a", "caption": "x", "box": [0, 0, 1, 1]}, "no_question", "box"),
    "caption twice": ('{"image": "a", "caption": "x", "caption": "y"}', "repeated_key", "caption"),
    "captions good and caption blank": ({"image": "a", "captions": ["x"], "caption": ""}, "field_type", "caption"),
    "image a number": ({"image": 7, "caption": "x"}, "field_type", "image"),
    "text a list": ({"text": ["x"], "caption": "x"}, "field_type", "text"),
    "unpaired surrogate": ('{"image": "a", "caption": "\\ud83d"}', "not_utf8", None),
}


@pytest.mark.parametrize("name", INVALID_LINES)
def test_invalid_line_of_a_manifest_is_named_with_its_number(tmp_path, name):
    line, reason, key = INVALID_LINES[name]
    path = write_lines(tmp_path / "invalid.jsonl", [{"image": "ok", "caption": "fine"}, "", line])
    error = read_error(path)
    assert error.code == f"data.{reason}"
    assert (error.details["path"], error.details["line"]) == (path, 3)
    assert error.details.get("key") == key
    assert str(error).startswith(f"{path}:3 ")


# ---- the other files ---------------------------------------------------------------------------------------------


def karpathy(folder: Path) -> str:
    names = [("a", "train"), ("b", "restval"), ("c", "val"), ("d", "test"), ("e", "train")]
    images = [
        {"filename": f"{name}.jpg", "filepath": "p", "split": split, "sentences": [{"raw": f" {name} \n runs ."}]}
        for name, split in names
    ]
    return write_json(folder / "dataset_x.json", {"images": images})


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", "abe"), ("restval", "b"), ("val", "c"), ("test", "d"), (None, "abcde")],
)
def test_karpathy_restval_counts_as_train(tmp_path, split, expected):
    examples = read(karpathy(tmp_path), split=split)
    assert "".join(example.id[0] for example in examples) == expected
    assert examples[0].tasks[0].targets == (f"{expected[0]} \n runs .",), "as written"


def test_karpathy_finds_images_in_the_usual_folders(tmp_path):
    (tmp_path / "Images" / "p").mkdir(parents=True)
    (tmp_path / "Images" / "p" / "a.jpg").touch()
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "c.jpg").touch()
    first, _, third, fourth, _ = read(karpathy(tmp_path))
    assert first.sources["image"] == str(tmp_path / "Images" / "p" / "a.jpg")
    assert third.sources["image"] == str(tmp_path / "p" / "c.jpg")
    assert fourth.sources["image"] == str(tmp_path / "images" / "p" / "d.jpg")  # the first of the usual folders


def test_unknown_split_is_refused_with_the_known_ones(tmp_path):
    error = read_error(karpathy(tmp_path), split="dev")
    assert error.code == "data.unknown_split"
    assert error.details["known"] == ["restval", "test", "train", "val"]
    assert "'val'" in str(read_error(karpathy(tmp_path), split="vall"))


def test_split_is_refused_for_formats_without_splits(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"image": "a", "caption": "x"}])
    for name, format_name in ((path, "manifest"), ("scenes", "scenes")):
        error = read_error(name, split="val")
        assert (error.code, error.details["format"]) == ("data.no_splits", format_name)


def test_coco_joins_annotations_to_images(tmp_path):
    document = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}, {"id": 9, "file_name": "9.jpg"}],
        "annotations": [
            {"image_id": 9, "caption": "a nine\n"},
            {"image_id": 7, "caption": " one "},
            {"image_id": 7, "caption": "two"},
        ],
    }
    examples = read(write_json(tmp_path / "captions.json", document))
    assert [(e.id, e.tasks[0].targets) for e in examples] == [("7", ("one", "two")), ("9", ("a nine",))]


def read_with_skipped(path: str, **fields: Any) -> tuple[list[Example], list[str]]:
    """The examples, and the sentences about records that do not join, without the folder of their files."""
    sentences: list[str] = []
    examples = read_examples(DataConfig(path=path, **fields), on_skipped=sentences.append)
    folder = f"{Path(path).parent}/"
    assert all(sentence.startswith(folder) for sentence in sentences)
    return list(examples), [sentence.removeprefix(folder) for sentence in sentences]


def test_coco_ids_join_by_value_and_what_does_not_join_is_counted_and_named(tmp_path):
    images = [(1, "a.jpg"), ("2", "b.jpg"), (3, "c.jpg"), ("x", "d.jpg"), ("1", "e.jpg"), (4, "f.jpg")]
    annotations = [("1", "a dog"), (2, "a cat"), (2, " "), (3, ""), ("x", "an x")]
    annotations += [(number, "an orphan") for number in range(90, 95)]
    document = {
        "images": [{"id": key, "file_name": name} for key, name in images],
        "annotations": [{"image_id": key, "caption": text} for key, text in annotations],
    }
    examples, sentences = read_with_skipped(write_json(tmp_path / "c.json", document))
    expected = [("1", ("a dog",)), ("2", ("a cat",)), ("x", ("an x",))]
    assert [(e.id, e.tasks[0].targets) for e in examples] == expected
    assert examples[0].sources["image"].endswith("a.jpg")
    assert sentences == [
        "c.json: 2 records skipped, because the caption is empty: annotation 2, annotation 3",
        "c.json: 2 records skipped, because the image has no caption: image 2, image 5",
        "c.json: 1 record skipped, because an earlier image has the same id: image 4",
        "c.json: 5 records skipped, because no image has its image_id: annotation 5, annotation 6, annotation 7, ...",
    ]


def test_records_of_one_image_file_are_one_example(tmp_path):
    images = [{"filename": "a.jpg", "sentences": [{"raw": raw}]} for raw in ("one", "two")]
    examples, sentences = read_with_skipped(write_json(tmp_path / "k.json", {"images": images}))
    assert [example.tasks for example in examples] == [(TextTask(("one", "two")),)]
    assert sentences == []


@pytest.mark.parametrize("other", ["./a.jpg", "../images/a.jpg", "{folder}/images/a.jpg"])
def test_spellings_of_one_image_file_are_one_example(tmp_path, other):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    names = ["a.jpg", other.format(folder=tmp_path)]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    annotations = [{"image_id": number, "caption": text} for number, text in enumerate(("one", "two"))]
    (example,) = read(write_json(tmp_path / "c.json", {"images": images, "annotations": annotations}))
    assert example.tasks == (TextTask(("one", "two")),)
    records = [{"question_id": number, "image_id": name, "question": "what?"} for number, name in enumerate(names)]
    (example,) = read(write_json(tmp_path / "q.json", {"questions": records}))
    assert example.tasks == (TextTask((), "what?"), TextTask((), "what?")), "each question_id counts"


def test_vqa_image_may_be_named_by_its_id(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "42").touch()
    records = [{"question_id": f"of {key}", "image_id": key, "question": "what?"} for key in ("42", "a.jpg")]
    first, second = read(write_json(tmp_path / "q.json", {"questions": records}))
    assert first.sources == {"image": str(tmp_path / "images" / "42")}
    assert second.sources == {"image": str(tmp_path / "images" / "a.jpg")}


def test_karpathy_captions_that_are_empty_are_counted_and_named(tmp_path):
    texts = [["a", " "], [], [""]]
    images = [
        {"filename": f"{number}.jpg", "split": "val", "sentences": [{"raw": raw} for raw in raws]}
        for number, raws in enumerate(texts)
    ]
    images.append({"filename": "t.jpg", "split": "train", "sentences": []})
    examples, sentences = read_with_skipped(write_json(tmp_path / "k.json", {"images": images}), split="val")
    assert [(e.id, e.tasks[0].targets) for e in examples] == [("0.jpg", ("a",))]
    assert sentences == [
        "k.json: 2 records skipped, because the caption is empty: image 0, sentence 1, image 2, sentence 0",
        "k.json: 2 records skipped, because the image has no caption: image 1, image 2",
    ]


def test_vqa_ids_join_by_value_and_what_does_not_join_is_counted_and_named(tmp_path):
    questions = [("10", 1, "what?"), (11, "1", "where?"), (10, 1, "who?"), (12, "1", " "), (13, 2, "why?")]
    answers = [(10, "yes"), ("11", "here"), (11, "there"), (12, "no"), (13, " "), (99, "orphan")]
    records = [{"question_id": key, "image_id": image, "question": text} for key, image, text in questions]
    rows = [{"question_id": key, "answers": [{"answer": text}]} for key, text in answers]
    write_json(tmp_path / "a.json", {"annotations": rows})
    path = write_json(tmp_path / "q.json", {"questions": records})
    examples, sentences = read_with_skipped(path, annotations="a.json")
    assert [example.id for example in examples] == ["1", "2"]
    assert examples[0].tasks == (TextTask(("yes",), "what?"), TextTask(("here",), "where?"))
    assert examples[0].sources["image"].endswith("000000000001.jpg")
    assert sentences == [
        "a.json: 1 record skipped, because an earlier annotation has the same question_id: annotation 2",
        "a.json: 1 record skipped, because an answer is empty: annotation 4",
        "q.json: 1 record skipped, because an earlier question has the same question_id: question 2",
        "q.json: 1 record skipped, because the question is empty: question 3",
        "a.json: 1 record skipped, because no question has its question_id: annotation 5",
    ]


def test_records_that_do_not_join_are_a_warning_by_default(tmp_path):
    path = vqa(tmp_path)
    with pytest.warns(UserWarning, match="1 record without answers, because no annotation has its question_id") as log:
        read(path, annotations="notes.json")
    assert len(log) == 1


def test_ids_that_do_not_join_are_told_from_tasks_that_select_nothing(tmp_path):
    images = [{"id": 7, "file_name": "7.jpg"}]
    document = {"images": images, "annotations": [{"image_id": 9, "caption": "a nine"}]}
    path = write_json(tmp_path / "captions.json", document)
    assert read_error(path).code == "data.not_joined"
    document["annotations"][0]["image_id"] = 7
    path = write_json(tmp_path / "captions.json", document)
    assert read_error(path, tasks=["ask"]).code == "data.nothing_selected"


def test_data_without_texts_is_refused(tmp_path):
    path = write_json(tmp_path / "dataset.json", {"images": [{"filename": "a.jpg", "sentences": []}]})
    assert read_error(path).code == "data.no_texts"


def vqa(folder: Path) -> str:
    rows = [(1, 42, "how many?"), (2, 42, "what?"), (3, 5, "where?")]
    records = [{"question_id": number, "image_id": image, "question": text} for number, image, text in rows]
    write_json(
        folder / "notes.json",
        {
            "annotations": [
                {"question_id": 1, "answers": [{"answer": "two"}, {"answer": "2"}], "answer_type": "number"},
                {"question_id": 3, "answers": [{"answer": "here"}]},
            ]
        },
    )
    return write_json(folder / "questions.json", {"data_subtype": "val2014", "questions": records})


def test_document_may_begin_with_a_byte_order_mark(tmp_path):
    images = [{"id": 1, "file_name": "a.jpg"}]
    annotations = [{"image_id": 1, "caption": "a dog"}]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8-sig")
    assert [example.tasks for example in read(str(path))] == [(TextTask(("a dog",)),)]


def test_vqa_joins_answers_and_groups_by_image(tmp_path):
    first, second = read(vqa(tmp_path), annotations="notes.json")
    assert first.tasks == (TextTask(("two", "2"), "how many?", "number"), TextTask((), "what?"))
    assert second.tasks == (TextTask(("here",), "where?"),)
    assert first.sources["image"] == str(tmp_path / "images" / "val2014" / "COCO_val2014_000000000042.jpg")


def test_vqa_without_annotations_has_questions_only(tmp_path):
    assert [task.targets for example in read(vqa(tmp_path)) for task in example.tasks] == [(), (), ()]


def test_vqa_keeps_only_the_selected_question_types(tmp_path):
    (example,) = read(vqa(tmp_path), annotations="notes.json", question_types=["number"])
    assert [task.question for task in example.tasks] == ["how many?"]
    error = read_error(vqa(tmp_path), annotations="notes.json", question_types=["yes/no"])
    assert (error.code, error.details["question_types"]) == ("data.nothing_selected", ("yes/no",))


def test_folder_in_the_layout_of_image_folder(tmp_path):
    write_lines(tmp_path / "set" / "metadata.jsonl", [{"file_name": "a.png", "text": "first"}])
    (example,) = read(str(tmp_path / "set"))
    assert example.sources == {"image": str(tmp_path / "set" / "a.png")}
    assert example.tasks == (TextTask(("first",)),)


def test_invalid_folder_is_named(tmp_path):
    assert read_error(str(tmp_path)).code == "data.no_metadata"
    metadata = write_lines(tmp_path / "metadata.jsonl", [{"file": "a.png", "text": "x"}])
    error = read_error(str(tmp_path))
    assert (error.code, error.details["key"]) == ("data.missing_field", "file_name")
    assert (error.details["path"], error.details["line"]) == (metadata, 1)


INVALID_DOCUMENTS = {
    "images an object": ({"images": {}, "annotations": []}, "coco", "field_type", "images", None),
    "image without id": ({"images": [{"file_name": "a"}], "annotations": []}, "coco", "missing_field", "id", "image 0"),
    "id a list": (
        {"images": [{"id": [1], "file_name": "a"}], "annotations": []},
        "coco",
        "field_type",
        "id",
        "image 0",
    ),
    "annotation a text": ({"images": [], "annotations": ["x"]}, "coco", "not_object", "image_id", "annotation 0"),
    "caption a number": (
        {"images": [], "annotations": [{"image_id": 1, "caption": 2}]},
        "coco",
        "field_type",
        "caption",
        "annotation 0",
    ),
    "no sentences": (
        {"images": [{"filename": "a", "split": "x"}]},
        "karpathy",
        "missing_field",
        "sentences",
        "image 0",
    ),
    "sentence a text": (
        {"images": [{"filename": "a", "sentences": ["x"]}]},
        "karpathy",
        "not_object",
        "raw",
        "image 0",
    ),
    "raw a number": (
        {"images": [{"filename": "a", "sentences": [{"raw": 1}]}]},
        "karpathy",
        "field_type",
        "raw",
        "image 0",
    ),
    "no question id": (
        {"questions": [{"question": "q", "image_id": 1}]},
        "vqa",
        "missing_field",
        "question_id",
        "question 0",
    ),
    "question a list": (
        {"questions": [{"question": ["q"], "image_id": 1, "question_id": 1}]},
        "vqa",
        "field_type",
        "question",
        "question 0",
    ),
}


@pytest.mark.parametrize("name", INVALID_DOCUMENTS)
def test_invalid_record_of_a_document_is_named(tmp_path, name):
    document, format_name, reason, key, record = INVALID_DOCUMENTS[name]
    path = write_json(tmp_path / "invalid.json", document)
    error = read_error(path, format=format_name)
    assert error.code == f"data.{reason}"
    assert (error.details["path"], error.details["record"], error.details["key"]) == (path, record, key)
    assert str(error).startswith(path)


def test_key_that_a_document_has_twice_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"images": [{"id": 1, "file_name": "a", "id": 2}], "annotations": []}')
    error = read_error(str(path))
    assert (error.code, error.details["path"], error.details["key"]) == ("data.repeated_key", str(path), "id")


def test_document_that_is_not_json_is_named_with_its_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"images": [\n{"id": 1},\n oh\n]}')
    error = read_error(str(path))
    assert (error.code, error.details["line"]) == ("data.not_json", 3)
    path.write_bytes(b"[1]")
    error = read_error(str(path))
    assert (error.code, error.details["path"]) == ("data.not_json", str(path))
    write_json(path, {"photos": []})
    assert read_error(str(path)).code == "data.format"


def test_an_image_is_no_data_set(tmp_path):
    path = tmp_path / "photo.JPG"
    path.write_bytes(b"\xff\xd8\xff")
    assert read_error(str(path)).code == "data.format"


def test_vqa_answers_of_wrong_types_are_named(tmp_path):
    path = vqa(tmp_path)
    notes = write_json(tmp_path / "n.json", {"annotations": [{"question_id": 1, "answers": ["two"]}]})
    error = read_error(path, annotations="n.json")
    assert (error.code, error.details["path"]) == ("data.not_object", notes)
    assert error.details["record"] == "annotation 0"
    assert read_error(path, annotations="missing.json").code == "data.not_json"


def test_formats_are_detected(tmp_path):
    (tmp_path / "f").mkdir()
    assert detect_format(Path(karpathy(tmp_path))) == "karpathy"
    assert detect_format(Path(vqa(tmp_path))) == "vqa"
    assert detect_format(Path(write_json(tmp_path / "c.json", {"images": [], "annotations": []}))) == "coco"
    assert detect_format(Path(write_lines(tmp_path / "m.jsonl", []))) == "manifest"
    assert detect_format(tmp_path / "f") == "folder"


# ---- selection -------------------------------------------------------------------------------------------------


@pytest.fixture
def ten(tmp_path) -> str:
    rows: list[Any] = [{"image": f"{i}.jpg", "caption": "c"} for i in range(10)]
    return write_lines(tmp_path / "ten.jsonl", [*rows, {"image": "3.jpg", "question": "q?", "answer": "a"}])


def ids(examples: list[Example]) -> str:
    return "".join(example.id[0] for example in examples)


def test_fraction_is_applied_before_max_examples(ten):
    assert ids(read(ten, fraction=(0, 0.7))) + ids(read(ten, fraction=(0.7, 1))) == "0123456789"
    assert ids(read(ten, fraction=(0.5, 1), max_examples=2)) == "56"
    assert ids(read(ten, max_examples=99)) == "0123456789"


@given(st.lists(st.floats(0.01, 0.99), max_size=4, unique=True))
@settings(max_examples=50, deadline=None)
def test_fractions_of_scenes_are_disjoint_and_complete(cuts):
    edges = [0.0, *sorted(cuts), 1.0]
    indices: list[int] = []
    for fraction in zip(edges, edges[1:]):
        examples = read_examples(DataConfig(path="scenes", num_examples=57, fraction=fraction))
        indices.extend(examples.indices)
    assert indices == list(range(57))


def test_tasks_are_selected(ten):
    assert [len(example.tasks) for example in read(ten)] == [1, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    assert ids(read(ten, tasks=["ask"])) == "3"
    assert all(example.tasks == (TextTask(("c",)),) for example in read(ten, tasks=["caption"]))
    error = read_error(ten, tasks=["ask"], fraction=(0.5, 1))
    assert (error.code, error.details["tasks"]) == ("data.nothing_selected", ("ask",))


def test_byte_order_mark_is_not_part_of_the_first_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('\ufeff{"image": "a.jpg", "caption": "c"}\n', encoding="utf-8")
    assert [number for number, _ in read_lines(path)] == [1]
    assert read(str(path))[0].sources == {"image": str(tmp_path / "a.jpg")}


@pytest.mark.parametrize(("encoding", "line", "byte"), [("latin-1", 2, 34), ("utf-16", 1, 0), ("utf-16-le", 1, 1)])
def test_manifest_that_is_not_utf8_is_refused_with_line_and_byte(tmp_path, encoding, line, byte):
    path = tmp_path / "m.jsonl"
    path.write_text('{"image": "a.jpg", "caption": "c"}\n{"image": "a.jpg", "caption": "caf\xe9"}\n', encoding=encoding)
    error = read_error(str(path))
    assert (error.code, error.details["path"]) == ("data.not_utf8", str(path))
    assert (error.details["line"], error.details["byte"]) == (line, byte)


def test_document_that_is_not_utf8_is_refused_with_line_and_byte(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"images": [],\n"annotations": [{"image_id": 1, "caption": "caf\xe9"}]}')
    error = read_error(str(path))
    assert (error.code, error.details["path"]) == ("data.not_utf8", str(path))
    assert (error.details["line"], error.details["byte"]) == (2, 47)
    path.write_text('{"images": []}', encoding="utf-16-be")
    assert (read_error(str(path)).code, read_error(str(path)).details["byte"]) == ("data.not_utf8", 0)


def test_image_folder_line_with_two_images_is_refused(tmp_path):
    rows = [{"file_name": "a.png", "text": "x", "image": None}, {"file_name": "a.png", "text": "x", "image": "b.png"}]
    metadata = write_lines(tmp_path / "metadata.jsonl", rows)
    error = read_error(str(tmp_path))
    assert (error.code, error.details["path"], error.details["line"]) == ("data.two_images", metadata, 2)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_by_line(tmp_path, number):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"image": "a.jpg", "x": 1e300}}\n{{"image": "a.jpg", "x": [{number}]}}\n', encoding="utf-8")
    with pytest.raises(DataError) as error:
        list(read_lines(path))
    assert (error.value.code, error.value.details["line"]) == ("data.not_finite", 2)


def test_url_is_kept_unless_a_file_has_its_name(tmp_path):
    assert resolve_path("http://a.b/c.jpg", tmp_path) == "http://a.b/c.jpg"
    assert resolve_path("data:image/png;base64,a//b", tmp_path) == "data:image/png;base64,a//b"
    assert resolve_path("a//b.jpg", tmp_path) == str(tmp_path / "a" / "b.jpg")
    (tmp_path / "data:1.jpg").touch()
    assert resolve_path("data:1.jpg", tmp_path) == str(tmp_path / "data:1.jpg")


def test_missing_data_is_named(tmp_path):
    error = read_error(str(tmp_path / "missing.jsonl"))
    assert (error.code, error.details["path"]) == ("data.missing", str(tmp_path / "missing.jsonl"))


# ---- scenes ------------------------------------------------------------------------------------------------------


def test_scenes_are_generated_when_read():
    examples = read_examples(DataConfig(path="scenes", num_examples=20, seed=5, fraction=(0.5, 1), max_examples=4))
    assert (len(examples), len(examples[1:3])) == (4, 2)
    scene = generate_scene(5, 11)
    example = examples[1]
    assert example.id == "scene-5-11"
    assert example.tasks[0].targets == captions(scene)
    expected = [question.question for question in (*questions(scene), *pointed_questions(scene))]
    assert [task.question for task in example.tasks[1:]] == expected
    assert example.sources["image"].size == (128, 128)
    assert examples[1].sources["image"].tobytes() == example.sources["image"].tobytes()
    with pytest.raises(IndexError):
        examples[4]


def test_selected_scenes_are_all_different_and_have_selected_tasks_only():
    config = DataConfig(
        path="scenes", num_examples=40, seed=5, tasks=["ask"], question_types=["color", "position"], max_objects=2
    )
    examples = list(read_examples(config))
    assert len({example.id for example in examples}) == 40
    assert {task.question_type for example in examples for task in example.tasks} == {"color", "position"}
    assert all(example.tasks for example in examples)
    for example in examples:
        assert len(generate_scene(5, int(example.id.split("-")[2])).objects) <= 2


def test_impossible_question_types_of_scenes_are_refused():
    error = read_error("scenes", question_types=["colour"])
    assert (error.code, error.details["question_type"]) == ("data.question_type", "colour")
    assert "'color'" in str(error)
    for types in (["relation"], ["relation", "pointed"]):
        error = read_error("scenes", question_types=types, max_objects=1, tasks=["ask"])
        assert error.code == "data.max_objects"
