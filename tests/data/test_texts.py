"""Options that change the texts of a data set; without them texts stay as written."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.config.schema import DataConfig, TextConfig, TextOptions
from mmx.data.examples import TextTask
from mmx.data.formats import read_examples
from mmx.data.texts import format_target, format_task

ALL = TextOptions(lowercase=True, collapse_whitespace=True, join_punctuation=True, strip_final_period=True)


@given(st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_texts_are_kept_as_written_by_default(text):
    assert format_target(text, TextOptions()) == text.strip()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "A Dog ,  it 's Zoë's ."),
        ({"lowercase": True}, "a dog ,  it 's zoë's ."),
        ({"collapse_whitespace": True}, "A Dog , it 's Zoë's ."),
        ({"join_punctuation": True}, "A Dog,  it's Zoë's."),
        ({"strip_final_period": True}, "A Dog ,  it 's Zoë's"),
        (dict(ALL), "a dog, it's zoë's"),
    ],
)
def test_each_option_changes_one_thing(options, expected):
    assert format_target(" A Dog ,  it 's Zoë's . ", TextOptions(**options)) == expected


@pytest.mark.parametrize("text", ["...", ".", ". ."])
def test_a_text_of_full_stops_is_kept(text):
    assert format_target(text, TextOptions(strip_final_period=True)) == text


def test_captions_and_answers_have_options_of_their_own(tmp_path):
    line = {"image": "a.jpg", "captions": ["A Dog ."], "question": "Whose\tdog  is it", "answers": ["U.S.A."]}
    (tmp_path / "list.jsonl").write_text(json.dumps(line) + "\n")
    written = DataConfig(path="list.jsonl")
    (example,) = read_examples(written, tmp_path)
    assert [task.targets for task in example.tasks] == [("A Dog .",), ("U.S.A.",)]
    (example,) = read_examples(written.model_copy(update={"text": TextConfig(caption=ALL)}), tmp_path)
    assert [task.targets for task in example.tasks] == [("a dog",), ("U.S.A.",)]
    assert example.tasks[1].question == "Whose\tdog  is it"
    (example,) = read_examples(written.model_copy(update={"text": TextConfig(ask=ALL)}), tmp_path)
    assert [task.targets for task in example.tasks] == [("A Dog .",), ("u.s.a",)]
    assert example.tasks[1].question == "Whose dog is it"


def test_scenes_have_the_options_too():
    config = DataConfig(path="scenes", num_examples=3, text=TextConfig(ask=ALL))
    plain = DataConfig(path="scenes", num_examples=3)
    for example, other in zip(read_examples(config), read_examples(plain), strict=True):
        assert [format_task(task, config) for task in other.tasks] == list(example.tasks)


def test_other_fields_of_a_task_are_kept():
    task = TextTask(("A",), "What?", "color", (0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 1.0, 1.0))
    config = DataConfig(path="x", text=TextConfig(ask=ALL))
    assert format_task(task, config) == TextTask(("a",), *list(vars(task).values())[1:])
