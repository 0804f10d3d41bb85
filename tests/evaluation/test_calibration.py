"""Calibration of the probabilities of answers, compared with known probabilities of being right."""

import math
from random import Random

import pytest

from mmx.evaluation.aggregate import aggregate_metrics
from mmx.evaluation.calibration import expected_calibration_error, fit_answer_temperature
from mmx.evaluation.report import EvaluatedText


def answer(number: int, logprob: float, is_right: bool, temperature: float = 1.0) -> EvaluatedText:
    prediction = "yes" if is_right else "no"
    probability = math.exp(logprob / temperature)
    return EvaluatedText((number, 0), "a", "is it?", None, prediction, -1.0, ("yes",), logprob, probability)


def drawn_answers(true_temperature: float, count: int = 4000) -> list[EvaluatedText]:
    """Answers that are right with the probability exp(logprob / true_temperature)."""
    rng = Random(0)
    answers = []
    for number in range(count):
        logprob = math.log(rng.uniform(0.05, 0.99))
        is_right = rng.random() < math.exp(logprob / true_temperature)
        answers.append(answer(number, logprob, is_right, true_temperature))
    return answers


def test_calibration_error_of_known_answers():
    """In one bin 0.75 instead of 0.5 for four answers, in another 0.25 instead of 0 for two."""
    answers = [answer(n, math.log(0.75), is_right=n < 2) for n in range(4)]
    answers += [answer(n, math.log(0.25), is_right=False) for n in range(4, 6)]
    assert expected_calibration_error(answers) == pytest.approx(0.25)
    certain = [answer(n, 0.0, is_right=True) for n in range(3)]
    assert expected_calibration_error(certain) == 0.0


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_is_recovered(temperature):
    answers = drawn_answers(temperature)
    assert fit_answer_temperature(answers) == pytest.approx(temperature, rel=0.08)
    assert expected_calibration_error(answers) < 0.03


def test_answers_that_are_all_right_or_all_wrong_have_a_temperature():
    assert fit_answer_temperature([answer(n, -0.5, is_right=True) for n in range(9)]) == pytest.approx(20, rel=0.01)
    assert fit_answer_temperature([answer(n, -0.5, is_right=False) for n in range(9)]) < 0.1
    certain_and_wrong = [answer(n, 0.0, is_right=False) for n in range(9)]
    assert 0.04 < fit_answer_temperature(certain_and_wrong) < 21


def test_calibration_is_measured_with_enough_answers():
    metrics = aggregate_metrics(drawn_answers(2.0, 500), [])
    assert metrics["answer temperature"] == pytest.approx(2.0, rel=0.2)
    assert 0 <= metrics["calibration error"] < 0.1
    assert "answer temperature" not in aggregate_metrics(drawn_answers(2.0, 49), [])
