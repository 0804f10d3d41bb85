"""The type of an answer fits the question: known words, reference answers, and "can't tell"."""

import pytest

from mmx.config.schema import DataConfig
from mmx.data.derived_questions import DERIVED_QUESTION_TYPES
from mmx.data.scene_examples import SceneExamples
from mmx.evaluation.aggregate import aggregate_metrics
from mmx.evaluation.answer_types import ANSWER_WORDS, answer_type_fits
from mmx.evaluation.report import EvaluatedText


def answer(number: int, question_type: str, prediction: str, target: str) -> EvaluatedText:
    return EvaluatedText((number, 0), "a", "what?", question_type, prediction, -1.0, (target,))


@pytest.mark.parametrize(
    ("question_type", "prediction", "fits"),
    [
        ("animal", "cat", True),
        ("animal", "brown", False),
        ("animal", "Can't tell", True),
        ("animal", "axolotl", True),  # a reference answer
        ("color", "black and white", True),
        ("color", "Grey", True),
        ("color", "dog", False),
        ("color", "black and dog", False),
        ("color", "", False),
        ("count", "seven", True),
        ("count", "7", True),
        ("count", "red", False),
        ("action", "running", True),
        ("action", "ball", False),
        ("object", "ball", True),
        ("place", "beach", True),
        ("place", "yes", False),
        ("subject", "woman", True),
        ("exists", "yes", True),
        ("exists", "two", False),
        ("verify", "no", True),
    ],
)
def test_type_of_an_answer(question_type, prediction, fits):
    assert answer_type_fits(question_type, [answer(0, question_type, prediction, "axolotl")]) == fits


def test_every_derived_question_has_a_type_of_answer():
    assert ANSWER_WORDS.keys() == set(DERIVED_QUESTION_TYPES) - {"unanswerable"}


def test_right_answers_fit():
    examples = SceneExamples(DataConfig(path="scenes", num_examples=20))
    tasks = [task for example in examples for task in example.tasks if task.question_type in ANSWER_WORDS]
    for task in tasks:
        target = task.targets[0]
        assert answer_type_fits(task.question_type, [answer(0, task.question_type, target, "-")]) == 1.0
    assert {"exists", "count", "color"} == {task.question_type for task in tasks}


def test_metrics_of_answer_types():
    answers = [
        answer(0, "animal", "brown", "dog"),
        answer(1, "color", "brown", "red"),
        answer(2, "color", "can't tell", "red"),
        answer(3, "unanswerable", "can't tell", "can't tell"),
        answer(4, "unanswerable", "red", "can't tell"),
        answer(5, "own", "red", "red"),
    ]
    metrics = aggregate_metrics(answers, [])
    assert metrics["answer type fits"] == pytest.approx(2 / 3)
    assert metrics["answer type fits, animal"] == 0.0
    assert metrics["answer type fits, color"] == 1.0
    assert metrics["exact match, unanswerable"] == 0.5
    assert metrics["can't tell, answerable"] == 0.25
    assert "answer type fits, own" not in metrics
    assert "answer type fits, unanswerable" not in metrics
    others = aggregate_metrics(answers[5:], [])
    assert "answer type fits" not in others
    assert "can't tell, answerable" not in others
