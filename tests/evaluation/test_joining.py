"""Joining predictions to references by id, path and question; what does not join is counted and named."""

import json

import pytest

from mmx.config.schema import DataConfig
from mmx.data.formats import read_examples
from mmx.errors import DataError
from mmx.evaluation.joining import CaptionedImages, References
from mmx.evaluation.predictions import read_predictions


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def document(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def join(data, predictions, **fields):
    examples = read_examples(DataConfig(path=str(data), **fields))
    return References(str(data), examples).join(read_predictions(predictions))


def pairs(joined):
    return [(text.prediction, text.targets) for text in joined.texts]


@pytest.fixture
def captions(tmp_path):
    """A manifest of four images in two folders; two of them have equal names."""
    return lines(
        tmp_path / "data" / "list.jsonl",
        {"image": "x/a.jpg", "captions": ["a one", "a two"], "id": 1},
        {"image": "x/b.jpg", "caption": "b", "id": 2},
        {"image": "y/a.jpg", "caption": "other a", "id": 3},
        {"image": "y/c.jpg", "caption": "c", "id": 4},
    )


def test_paths_start_from_the_current_folder_or_from_that_of_the_file(tmp_path, captions, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ({"image": "data/x/a.jpg", "caption": "1"}, {"image": str(tmp_path / "data/y/../y/a.jpg"), "caption": "2"})
    here = join(captions, lines(tmp_path / "elsewhere" / "rows.jsonl", *rows))
    assert pairs(here) == [("1", ("a one", "a two")), ("2", ("other a",))]
    assert (here.num_predictions, here.num_references, here.num_by_name) == (0, 2, 0)
    of_data = join(captions, lines(tmp_path / "elsewhere" / "rows.jsonl", {"image": "y/a.jpg", "caption": "4"}))
    assert (pairs(of_data), of_data.num_by_name) == ([("4", ("other a",))], 0)
    beside = join(captions, lines(tmp_path / "data" / "rows.jsonl", {"image": "x/b.jpg", "caption": "3"}))
    assert pairs(beside) == [("3", ("b",))]


def test_names_of_files_join_only_if_one_image_has_them(tmp_path, captions):
    rows = [{"image": f"/other/{name}.jpg", "caption": name} for name in ("a", "b", "c")]
    joined = join(captions, lines(tmp_path / "rows.jsonl", *rows))
    assert pairs(joined) == [("b", ("b",)), ("c", ("c",))]
    assert (joined.num_by_name, joined.num_predictions, joined.num_references) == (2, 1, 2)
    assert len(joined.problems) == 2


def test_ids_join_and_must_agree_with_paths(tmp_path, captions):
    rows = (
        {"id": "1", "caption": "one"},
        {"id": 2, "image": "data/x/b.jpg", "caption": "two"},
        {"id": 2, "image": "data/y/c.jpg", "caption": "of different images"},
        {"id": 3, "image": "/other/zebra.jpg", "caption": "the id of another data set"},
        {"id": 99, "caption": "unknown"},
        {"id": 1, "caption": "again"},
        {"image": "data/y/a.jpg", "error": "damaged"},
    )
    joined = join(captions, lines(tmp_path / "rows.jsonl", *rows))
    assert pairs(joined) == [("one", ("a one", "a two")), ("two", ("b",))]
    assert (joined.num_predictions, joined.num_references) == (5, 2)
    named = [sum(f"rows.jsonl:{number}" in problem for problem in joined.problems) for number in range(1, 8)]
    assert named == [0, 0, 1, 1, 1, 1, 1]
    assert "x/b.jpg" not in joined.problems[-1] and "y/c.jpg" in joined.problems[-1]


def test_coco_results_join_coco_and_karpathy_references_by_image_id(tmp_path):
    results = document(tmp_path / "results.json", [{"image_id": 42, "caption": "b"}, {"image_id": 7, "caption": "a"}])
    coco = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 42, "file_name": "42.jpg"}],
        "annotations": [{"image_id": 42, "caption": "forty"}, {"image_id": 7, "caption": "seven"}],
    }
    sentences = {7: "seven", 42: "forty"}
    images = [
        {"filename": f"{key}.jpg", "cocoid": key, "imgid": 0, "split": "test", "sentences": [{"raw": text}]}
        for key, text in sentences.items()
    ]
    expected = [("a", ("seven",)), ("b", ("forty",))]
    assert pairs(join(document(tmp_path / "coco.json", coco), results)) == expected
    assert pairs(join(document(tmp_path / "karpathy.json", {"images": images}), results)) == expected


def test_answers_join_by_question_id_or_by_image_and_question(tmp_path):
    questions = [
        {"question_id": 70, "image_id": 7, "question": "What is it?"},
        {"question_id": 71, "image_id": 7, "question": "Where is it?"},
        {"question_id": 80, "image_id": 8, "question": "What is it?"},
    ]
    annotations = [{"question_id": q["question_id"], "answers": [{"answer": str(q["question_id"])}]} for q in questions]
    data = document(tmp_path / "questions.json", {"questions": questions})
    document(tmp_path / "annotations.json", {"annotations": annotations})
    results = document(
        tmp_path / "results.json", [{"question_id": 71, "answer": "x"}, {"question_id": 80, "answer": "y"}]
    )
    joined = join(data, results, annotations="annotations.json")
    assert pairs(joined) == [("x", ("71",)), ("y", ("80",))]
    assert joined.num_references == 1
    assert [text.example for text in joined.texts] == [0, 1]
    rows = (
        {"image": "000000000007.jpg", "question": "what is it", "answer": "a"},
        {"image_id": 8, "question": "What is it?", "answer": "b"},
        {"image_id": 7, "answer": "which question?"},
        {"image_id": 8, "question": "Why?", "answer": "c"},
    )
    joined = join(data, lines(tmp_path / "rows.jsonl", *rows), annotations="annotations.json")
    assert pairs(joined) == [("a", ("70",)), ("b", ("80",))]
    assert (joined.num_predictions, joined.num_references) == (2, 1)


def test_equal_questions_join_by_their_boxes(tmp_path):
    left = [0.0, 0.0, 0.5, 1.0]
    right = [0.5, 0, 1, 1]
    question = {"image": "a.jpg", "question": "what is this?"}
    rows = ({**question, "box": left, "answer": "left"}, {**question, "box": right, "answer": "right"})
    data = lines(tmp_path / "list.jsonl", *rows)
    joined = join(data, lines(tmp_path / "rows.jsonl", *rows))
    assert pairs(joined) == [("left", ("left",)), ("right", ("right",))]
    joined = join(data, lines(tmp_path / "rows.jsonl", rows[0], {**question, "answer": "which?"}))
    assert (pairs(joined), joined.num_predictions) == ([("left", ("left",))], 1)


def test_questions_are_not_missed_where_only_captions_are_predicted(tmp_path):
    data = lines(tmp_path / "list.jsonl", {"image": "a.jpg", "caption": "x", "question": "what?", "answer": "y"})
    joined = join(data, lines(tmp_path / "rows.jsonl", {"image": "a.jpg", "caption": "z"}))
    assert (pairs(joined), joined.problems) == ([("z", ("x",))], [])


def test_texts_as_inputs_join_by_the_text(tmp_path):
    data = lines(
        tmp_path / "list.jsonl", {"text": "Guten Tag", "caption": "good day"}, {"text": "Hund", "caption": "dog"}
    )
    joined = join(data, lines(tmp_path / "rows.jsonl", {"text": "Hund", "caption": "a dog"}))
    assert pairs(joined) == [("a dog", ("dog",))]


def test_data_without_a_common_row_or_without_references_is_refused(tmp_path, captions):
    rows = lines(tmp_path / "rows.jsonl", {"image": "unknown.jpg", "caption": "z"})
    with pytest.raises(DataError) as caught:
        join(captions, rows)
    assert caught.value.code == "score.nothing_joined"
    data = lines(tmp_path / "list.jsonl", {"image": "a.jpg", "question": "what?"})
    with pytest.raises(DataError) as caught:
        join(data, rows)
    assert caught.value.code == "score.no_references"


def test_captions_without_references_need_an_image(tmp_path):
    rows = lines(tmp_path / "rows.jsonl", {"image": "a.jpg", "caption": "z"}, {"id": 1, "caption": "z"})
    joined = CaptionedImages().join(read_predictions(rows))
    assert [text.sources for text in joined.texts] == [{"image": "a.jpg"}]
    assert (joined.num_predictions, len(joined.problems)) == (1, 1)
    (tmp_path / "a.jpg").touch()
    joined = CaptionedImages().join(read_predictions(rows))
    assert [text.sources for text in joined.texts] == [{"image": str(tmp_path / "a.jpg")}]
