"""Reading generated texts: result rows, COCO and VQA results, tables; and what is refused."""

import json

import pytest

from mmx.errors import DataError
from mmx.evaluation.predictions import read_predictions
from mmx.io.tables import write_table


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_rows_of_captions_answers_and_errors(tmp_path):
    rows = [
        {"image": "a.jpg", "id": "7", "caption": "a dog", "score": -0.1},
        {"image": "a.jpg", "question": "what?", "answer": ""},
        {"image": "b.jpg", "error": "there is no such file"},
        {"id": "c.jpg", "question": None, "prediction": "a cat", "targets": ["x"]},
        {"id": 3, "question": "who?", "prediction": "me", "targets": ["x"]},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    first, answer, error, caption, evaluated = read_predictions(write(tmp_path / "rows.jsonl", lines))
    assert (first.text, first.is_answer, first.ids, first.inputs) == ("a dog", False, {"id": 7}, {"image": "a.jpg"})
    assert (answer.text, answer.is_answer, answer.question) == ("", True, "what?")
    assert (error.text, error.is_answer) == (None, False)
    assert (caption.text, caption.is_answer) == ("a cat", False)
    assert (evaluated.text, evaluated.is_answer) == ("me", True)
    assert (error.location.path, error.location.line) == (str(tmp_path / "rows.jsonl"), 3)


def test_coco_and_vqa_results(tmp_path):
    (caption,) = read_predictions(write(tmp_path / "c.json", [{"image_id": 42, "caption": "a dog"}]))
    (answer,) = read_predictions(write(tmp_path / "v.json", [{"question_id": 42001, "answer": "yes"}]))
    assert (caption.text, caption.is_answer, caption.ids) == ("a dog", False, {"image_id": 42})
    assert (answer.text, answer.is_answer, answer.ids) == ("yes", True, {"question_id": 42001})


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.tsv", "\t")])
def test_tables(tmp_path, name, delimiter):
    lines = ["\ufefffile_name,image_id,caption", 'a.jpg,1,"one; ""two""\nlines"', "b.jpg,,", ""]
    rows = read_predictions(write(tmp_path / name, "\r\n".join(lines).replace(",", delimiter)))
    assert [row.text for row in rows] == ['one; "two"\nlines', ""]
    assert [row.inputs for row in rows] == [{"image": "a.jpg"}, {"image": "b.jpg"}]
    assert [row.ids for row in rows] == [{"image_id": 1}, {}]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    {
        "no text": ("a.jsonl", '{"image": "a.jpg"}', "data.no_text"),
        "two texts": ("a.jsonl", '{"caption": "a", "answer": "b"}', "data.several_texts"),
        "a number": ("a.jsonl", '{"caption": 3}', "data.field_type"),
        "not JSON": ("a.jsonl", "caption", "data.not_json"),
        "empty": ("a.jsonl", "\n", "predictions.empty"),
        "an object": ("a.json", {"1": "a dog"}, "predictions.format"),
        "a list of texts": ("a.json", ["a dog"], "data.not_object"),
        "half a list": ("a.json", '[{"image_id": 1, "caption": "a"},', "data.not_json"),
        "another column": ("a.csv", "image,text\na.jpg,a dog\n", "data.no_text"),
        "too many cells": ("a.csv", "image,caption\na.jpg,a dog, and a cat\n", "data.row_length"),
        "too few cells": ("a.csv", "image,caption\na.jpg\n", "data.row_length"),
        "two columns of a name": ("a.csv", "image,image,caption\na.jpg,b.jpg,a dog\n", "data.repeated_key"),
        "other delimiters": ("a.csv", "image;caption\na.jpg;a dog\n", "data.delimiter"),
        "parquet": ("a.parquet", "PAR1", "predictions.format"),
        "an open quote": ("a.csv", 'image,caption\na.jpg,"a dog', "data.damaged_row"),
    }.values(),
)
def test_what_is_refused(tmp_path, name, content, code):
    with pytest.raises(DataError) as caught:
        read_predictions(write(tmp_path / name, content))
    assert caught.value.code == code


def test_files_that_are_missing_or_not_utf8(tmp_path):
    with pytest.raises(DataError) as caught:
        read_predictions(tmp_path / "none.csv")
    assert caught.value.code == "data.missing"
    (tmp_path / "latin.csv").write_bytes("image,caption\na.jpg,café\n".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        read_predictions(tmp_path / "latin.csv")
    assert caught.value.code == "data.not_utf8"
    assert caught.value.details["line"] == 2


def test_a_table_of_results_is_read_as_its_json_lines(tmp_path):
    """Rows of errors have no text, and boxes stay boxes."""
    rows = [
        {"image": "a.jpg", "question": "what?", "box": [0.1, 0.1, 0.5, 0.5], "answer": "dog"},
        {"image": "a.jpg", "question": "what?", "answer": ""},
        {"image": "b.jpg", "question": "what?", "error": "there is no such file"},
    ]
    lines = write(tmp_path / "rows.jsonl", "\n".join(json.dumps(row) for row in rows))
    write_table(tmp_path / "rows.csv", "csv", lines, ["image"])
    read = read_predictions(tmp_path / "rows.csv")
    assert [row.text for row in read] == ["dog", "", None]
    assert [row.box for row in read] == [(0.1, 0.1, 0.5, 0.5), None, None]
    assert [row.inputs for row in read] == [{"image": "a.jpg"}, {"image": "a.jpg"}, {"image": "b.jpg"}]
