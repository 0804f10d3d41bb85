"""Readers: each format from a small file written here, every mistake named by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.config.schema import DataConfig
from mmx.data.examples import TextTask
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


def read(path: str, **fields: Any) -> list[Any]:
    return list(read_examples(DataConfig(path=path, **fields)))


def refusal(path: str, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- manifest ----------------------------------------------------------------------------------------------------


def test_manifest_joins_the_lines_of_one_input_in_order(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            {"image": "x/a.jpg", "captions": ["one", "two"]},
            "",
            {"image": "b.jpg", "caption": "alone"},
            {"image": "x/a.jpg", "question": "what?", "answers": ["this", "that"], "kind": "other"},
            {"image": "x/a.jpg", "question": "where?", "answer": "here", "box": [0, 0.1, 0.5, 1]},
        ],
    )
    first, second = read(path)
    assert first.sources == {"image": str(tmp_path / "x/a.jpg")}
    assert first.turns == (
        TextTask(("one", "two")),
        TextTask(("this", "that"), "what?", "other"),
        TextTask(("here",), "where?", None, (0.0, 0.1, 0.5, 1.0)),
    )
    assert (first.id, first.origin, second.origin) == ("x/a.jpg", f"{path}:1", f"{path}:3")
    assert second.turns == (TextTask(("alone",)),)


def test_manifest_takes_any_source_and_texts_are_themselves(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        [{"text": "read me", "audio": "b.wav", "numbers": [1, 2], "image": None, "caption": "c"}],
    )
    (example,) = read(path)
    assert example.sources == {"text": "read me", "audio": str(tmp_path / "b.wav"), "numbers": [1, 2]}


def test_manifest_keeps_a_question_whose_answer_nobody_knows(tmp_path):
    (example,) = read(write_lines(tmp_path / "a.jsonl", [{"image": "a", "question": "q?"}]))
    assert example.turns == (TextTask((), "q?"),)


BAD_LINES = {
    "no JSON": ("{broken", "no JSON object"),
    "a list": ("[1, 2]", "no JSON object"),
    "too deep": ("[" * 100_000, "no JSON object"),
    "no input": ({"captions": ["x"]}, "names no input"),
    "nothing said": ({"image": "a"}, "neither 'captions' nor 'question'"),
    "captions a number": ({"image": "a", "captions": 3}, "has 'captions': 3; expected one or more texts"),
    "captions empty": ({"image": "a", "captions": []}, "has 'captions': []"),
    "captions with a number": ({"image": "a", "captions": ["x", 3]}, "has 'captions'"),
    "caption blank": ({"image": "a", "caption": "  "}, "has 'caption'"),
    "caption an object": ({"image": "a", "caption": {"en": "x"}}, "has 'caption'"),
    "question a number": ({"image": "a", "question": 3, "answer": "x"}, "has 'question': 3; expected a text"),
    "question null": ({"image": "a", "question": None}, "has 'question': null; expected a text"),
    "answers of numbers": ({"image": "a", "question": "q", "answers": [1, 2]}, "has 'answers': [1, 2]"),
    "answer a number": ({"image": "a", "question": "q", "answer": 2}, "has 'answer': 2"),
    "answers an object": ({"image": "a", "question": "q", "answers": [{"answer": "x"}]}, "has 'answers'"),
    "kind a number": ({"image": "a", "question": "q", "kind": 1}, "has 'kind': 1"),
    "box of three": ({"image": "a", "question": "q", "box": [0, 0, 1]}, "has 'box': [0, 0, 1]"),
    "box of texts": ({"image": "a", "question": "q", "box": ["0", "0", "1", "1"]}, "has 'box'"),
    "box in pixels": ({"image": "a", "question": "q", "box": [0, 0, 120, 80]}, "has 'box'"),
    "box turned round": ({"image": "a", "question": "q", "box": [0.9, 0, 0.1, 1]}, "has 'box'"),
    "box with NaN": ('{"image": "a", "question": "q", "box": [0, 0, NaN, 1]}', "has 'box'"),
    "image a number": ({"image": 7, "caption": "x"}, "has 'image': 7; expected a text"),
    "text a list": ({"text": ["x"], "caption": "x"}, "has 'text'"),
    "half a character": ('{"image": "a", "caption": "\\ud83d"}', "half a character"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_of_a_manifest_is_named_with_its_number(tmp_path, name):
    line, expected = BAD_LINES[name]
    path = write_lines(tmp_path / "bad.jsonl", [{"image": "ok", "caption": "fine"}, "", line])
    message = refusal(path)
    assert message.startswith(f"{path}:3 ")
    assert expected in message


# ---- the other files ---------------------------------------------------------------------------------------------


def karpathy(folder: Path) -> str:
    names = [("a", "train"), ("b", "restval"), ("c", "val"), ("d", "test"), ("e", "train")]
    images = [
        {"filename": f"{name}.jpg", "filepath": "p", "split": split, "sentences": [{"raw": f" {name} \n said ."}]}
        for name, split in names
    ]
    return write_json(folder / "dataset_x.json", {"images": images})


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", "abe"), ("restval", "b"), ("val", "c"), ("test", "d"), (None, "abcde")],
)
def test_karpathy_counts_restval_as_train(tmp_path, split, expected):
    examples = read(karpathy(tmp_path), split=split)
    assert "".join(example.id[0] for example in examples) == expected
    assert examples[0].turns[0].targets == (f"{expected[0]} said .",)


def test_karpathy_finds_pictures_in_the_usual_folders(tmp_path):
    (tmp_path / "Images" / "p").mkdir(parents=True)
    (tmp_path / "Images" / "p" / "a.jpg").touch()
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "c.jpg").touch()
    first, _, third, fourth, _ = read(karpathy(tmp_path))
    assert first.sources["image"] == str(tmp_path / "Images" / "p" / "a.jpg")
    assert third.sources["image"] == str(tmp_path / "p" / "c.jpg")
    assert fourth.sources["image"] == str(tmp_path / "images" / "p" / "d.jpg")  # where it would be expected


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path):
    assert "has no split 'dev'; known: restval, test, train, val" in refusal(karpathy(tmp_path), split="dev")
    assert "did you mean 'val'?" in refusal(karpathy(tmp_path), split="vall")


def test_a_split_is_refused_where_there_are_none(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"image": "a", "caption": "x"}])
    assert "manifest data has none" in refusal(path, split="val")
    assert "scenes data has none" in refusal("scenes", split="val")


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
    assert [(e.id, e.turns[0].targets) for e in examples] == [("7", ("one", "two")), ("9", ("a nine",))]


def vqa(folder: Path) -> str:
    asked = [(1, 42, "how many?"), (2, 42, "what?"), (3, 5, "where?")]
    questions_ = [{"question_id": q, "image_id": image, "question": text} for q, image, text in asked]
    write_json(
        folder / "notes.json",
        {
            "annotations": [
                {"question_id": 1, "answers": [{"answer": "two"}, {"answer": "2"}], "answer_type": "number"},
                {"question_id": 3, "answers": [{"answer": "here"}]},
            ]
        },
    )
    return write_json(folder / "questions.json", {"data_subtype": "val2014", "questions": questions_})


def test_a_document_may_begin_with_a_byte_order_mark(tmp_path):
    images, annotations = [{"id": 1, "file_name": "a.jpg"}], [{"image_id": 1, "caption": "a dog"}]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8-sig")
    assert [example.turns for example in read(str(path))] == [(TextTask(("a dog",)),)]


def test_vqa_joins_answers_and_groups_by_image(tmp_path):
    first, second = read(vqa(tmp_path), annotations="notes.json")
    assert first.turns == (TextTask(("two", "2"), "how many?", "number"), TextTask((), "what?"))
    assert second.turns == (TextTask(("here",), "where?"),)
    assert first.sources["image"] == str(tmp_path / "images" / "val2014" / "COCO_val2014_000000000042.jpg")


def test_vqa_without_annotations_has_questions_only(tmp_path):
    assert [turn.targets for example in read(vqa(tmp_path)) for turn in example.turns] == [(), (), ()]


def test_vqa_keeps_only_the_kinds_asked_for(tmp_path):
    (example,) = read(vqa(tmp_path), annotations="notes.json", kinds=["number"])
    assert [turn.question for turn in example.turns] == ["how many?"]
    assert "of kinds yes/no" in refusal(vqa(tmp_path), annotations="notes.json", kinds=["yes/no"])


def test_folder_as_image_folder_writes_it(tmp_path):
    write_lines(tmp_path / "set" / "metadata.jsonl", [{"file_name": "a.png", "text": "first"}])
    (example,) = read(str(tmp_path / "set"))
    assert example.sources == {"image": str(tmp_path / "set" / "a.png")}
    assert example.turns == (TextTask(("first",)),)


def test_folder_mistakes_are_named(tmp_path):
    assert "has no metadata.jsonl" in refusal(str(tmp_path))
    table = write_lines(tmp_path / "metadata.jsonl", [{"file": "a.png", "text": "x"}])
    assert refusal(str(tmp_path)).startswith(f"{table}:1 has no 'file_name'; it has file, text")


BAD_DOCUMENTS = {
    "no image list": ({"images": {}, "annotations": []}, "coco", "'images': {}; expected a list"),
    "image without id": ({"images": [{"file_name": "a"}], "annotations": []}, "coco", "image 0 has no 'id'"),
    "id a list": ({"images": [{"id": [1], "file_name": "a"}], "annotations": []}, "coco", "'id': [1]"),
    "annotation a text": ({"images": [], "annotations": ["x"]}, "coco", 'annotation 0 is or holds "x"'),
    "caption a number": ({"images": [], "annotations": [{"image_id": 1, "caption": 2}]}, "coco", "'caption': 2"),
    "no sentences": ({"images": [{"filename": "a", "split": "x"}]}, "karpathy", "image 0 has no 'sentences'"),
    "sentence a text": ({"images": [{"filename": "a", "sentences": ["x"]}]}, "karpathy", "image 0 is or holds"),
    "raw a number": ({"images": [{"filename": "a", "sentences": [{"raw": 1}]}]}, "karpathy", "'raw': 1"),
    "no question id": ({"questions": [{"question": "q", "image_id": 1}]}, "vqa", "question 0 has no 'question_id'"),
    "question a list": (
        {"questions": [{"question": ["q"], "image_id": 1, "question_id": 1}]},
        "vqa",
        "question 0 has 'question'",
    ),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_a_bad_record_of_a_document_is_named(tmp_path, name):
    document, format_, expected = BAD_DOCUMENTS[name]
    path = write_json(tmp_path / "bad.json", document)
    message = refusal(path, format=format_)
    assert message.startswith(path)
    assert expected in message


def test_a_document_that_is_no_json_is_named_with_its_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"images": [\n{"id": 1},\n oh\n]}')
    assert refusal(str(path)).startswith(f"{path}:3 is no JSON; expected one of the formats manifest, karpathy")
    path.write_text("[1]")
    assert "holds no JSON object" in refusal(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as JSON" in refusal(str(path))
    write_json(path, {"pictures": []})
    assert "is in no format mmx knows" in refusal(str(path))


def test_vqa_answers_of_wrong_types_are_named(tmp_path):
    path = vqa(tmp_path)
    notes = write_json(tmp_path / "n.json", {"annotations": [{"question_id": 1, "answers": ["two"]}]})
    assert refusal(path, annotations="n.json").startswith(f'{notes}, annotation 0 is or holds "two"')
    assert "cannot be read" in refusal(path, annotations="missing.json")


def test_formats_are_told_apart(tmp_path):
    (tmp_path / "f").mkdir()
    assert detect_format(Path(karpathy(tmp_path))) == "karpathy"
    assert detect_format(Path(vqa(tmp_path))) == "vqa"
    assert detect_format(Path(write_json(tmp_path / "c.json", {"images": [], "annotations": []}))) == "coco"
    assert detect_format(Path(write_lines(tmp_path / "m.jsonl", []))) == "manifest"
    assert detect_format(tmp_path / "f") == "folder"


# ---- parts, limits, tasks ----------------------------------------------------------------------------------------


@pytest.fixture
def ten(tmp_path) -> str:
    rows: list[Any] = [{"image": f"{i}.jpg", "caption": "c"} for i in range(10)]
    return write_lines(tmp_path / "ten.jsonl", [*rows, {"image": "3.jpg", "question": "q?", "answer": "a"}])


def ids(examples: list[Any]) -> str:
    return "".join(example.id[0] for example in examples)


def test_parts_share_out_everything_and_limits_come_after(ten):
    assert ids(read(ten, part=(0, 0.7))) + ids(read(ten, part=(0.7, 1))) == "0123456789"
    assert ids(read(ten, part=(0.5, 1), limit=2)) == "56"
    assert ids(read(ten, limit=99)) == "0123456789"


@given(st.lists(st.floats(0.01, 0.99), max_size=4, unique=True))
@settings(max_examples=50, deadline=None)
def test_any_cut_of_scenes_into_parts_is_disjoint_and_complete(cuts):
    edges = [0.0, *sorted(cuts), 1.0]
    parts = [read_examples(DataConfig(path="scenes", num_examples=57, fraction=p)) for p in zip(edges, edges[1:])]
    assert [i for part in parts for i in part.indices] == list(range(57))


def test_tasks_keep_their_turns(ten):
    assert [len(example.turns) for example in read(ten)] == [1, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    assert ids(read(ten, tasks=["ask"])) == "3"
    assert all(example.turns == (TextTask(("c",)),) for example in read(ten, tasks=["caption"]))
    assert "holds no examples for the tasks ask" in refusal(ten, tasks=["ask"], part=(0.5, 1))


def test_a_mark_at_the_start_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('\ufeff{"image": "a.jpg", "caption": "c"}\n', encoding="utf-8")
    assert [number for number, _ in read_lines(path)] == [1]
    assert read(str(path))[0].sources == {"image": str(tmp_path / "a.jpg")}


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_has_not_are_refused_by_line(tmp_path, number):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"image": "a.jpg", "x": 1e300}}\n{{"image": "a.jpg", "x": [{number}]}}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"m.jsonl:2 has a number that is not finite, such as NaN; write null, or"):
        list(read_lines(path))


def test_an_address_keeps_its_spelling_unless_a_file_bears_its_name(tmp_path):
    assert resolve_path("http://a.b/c.jpg", tmp_path) == "http://a.b/c.jpg"
    assert resolve_path("data:image/png;base64,a//b", tmp_path) == "data:image/png;base64,a//b"
    assert resolve_path("a//b.jpg", tmp_path) == str(tmp_path / "a" / "b.jpg")
    (tmp_path / "data:1.jpg").touch()
    assert resolve_path("data:1.jpg", tmp_path) == str(tmp_path / "data:1.jpg")


def test_missing_data_is_named(tmp_path):
    assert f"there is no data at {tmp_path / 'gone.jsonl'}" in refusal(str(tmp_path / "gone.jsonl"))


# ---- scenes ------------------------------------------------------------------------------------------------------


def test_scenes_are_the_generated_ones_and_drawn_anew_each_time():
    examples = read_examples(DataConfig(path="scenes", num_examples=20, seed=5, fraction=(0.5, 1), max_examples=4))
    assert (len(examples), len(examples[1:3])) == (4, 2)
    scene, example = generate_scene(5, 11), examples[1]
    assert example.id == "scene-5-11"
    assert example.tasks[0].targets == captions(scene)
    assert [turn.question for turn in example.tasks[1:]] == [
        asked.question for asked in (*questions(scene), *pointed_questions(scene))
    ]
    assert example.sources["image"].size == (128, 128)
    assert examples[1].sources["image"].tobytes() == example.sources["image"].tobytes()
    with pytest.raises(IndexError):
        examples[4]


def test_scenes_of_some_kinds_and_objects_are_all_different_and_offer_nothing_else():
    config = DataConfig(
        path="scenes", num_examples=40, seed=5, tasks=["ask"], question_types=["color", "position"], max_objects=2
    )
    examples = list(read_examples(config))
    assert len({example.id for example in examples}) == 40
    assert {turn.question_type for example in examples for turn in example.tasks} == {"color", "position"}
    assert all(example.tasks for example in examples)
    for example in examples:
        assert len(generate_scene(5, int(example.id.split("-")[2])).objects) <= 2


def test_an_unknown_kind_of_scene_question_is_refused():
    assert "did you mean 'color'?" in refusal("scenes", kinds=["colour"])
    assert "set objects to 2" in refusal("scenes", kinds=["relation"], objects=1, tasks=["ask"])
    assert "kind 'relation' or 'pointed'" in refusal("scenes", kinds=["relation", "pointed"], objects=1, tasks=["ask"])
