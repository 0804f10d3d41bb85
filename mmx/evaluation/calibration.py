"""Whether the probabilities of answers are those of being right, and the temperature that makes them so."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mmx.evaluation.metrics.answers import exact_match
from mmx.evaluation.report import EvaluatedText

NUM_BINS = 10
MIN_ANSWERS = 50  # a temperature that is fitted on fewer answers says little
TEMPERATURE_RANGE = (0.05, 20.0)
_TOLERANCE = 1e-3  # of log temperature
_LARGEST = 1 - 1e-6  # probability; an answer that is certain and wrong has a finite loss


def expected_calibration_error(answers: Sequence[EvaluatedText]) -> float:
    """Return the mean difference between probability and accuracy in bins of equal width, weighted by their answers.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    bins: list[list[EvaluatedText]] = [[] for _ in range(NUM_BINS)]
    for text in answers:
        bins[min(int(text.probability * NUM_BINS), NUM_BINS - 1)].append(text)
    differences = []
    for texts in bins:
        excess = math.fsum(text.probability - exact_match(text.prediction, text.targets) for text in texts)
        differences.append(abs(excess))
    return math.fsum(differences) / len(answers)


def fit_answer_temperature(answers: Sequence[EvaluatedText]) -> float:
    """Return the temperature T for which exp(logprob / T) predicts best which answers are right.

    It minimizes the negative log-likelihood, as in section 4.2 of Guo et al., who divide the logits of one class; here
    the log-probability of the whole answer is divided. The result is a value for `generation.answer_temperature`.
    """
    outcomes = [(text.logprob, exact_match(text.prediction, text.targets) == 1.0) for text in answers]

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        terms = []
        for logprob, is_right in outcomes:
            probability = min(math.exp(min(logprob, 0.0) / temperature), _LARGEST)
            terms.append(-logprob / temperature if is_right else -math.log1p(-probability))
        return math.fsum(terms)

    low, high = map(math.log, TEMPERATURE_RANGE)
    return math.exp(_golden_section(loss, low, high))


def _golden_section(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the minimum of a function with one minimum in the range."""
    ratio = (math.sqrt(5) - 1) / 2
    left = high - ratio * (high - low)
    right = low + ratio * (high - low)
    value_left = function(left)
    value_right = function(right)
    while high - low > _TOLERANCE:
        if value_left < value_right:
            high = right
            right = left
            value_right = value_left
            left = high - ratio * (high - low)
            value_left = function(left)
        else:
            low = left
            left = right
            value_left = value_right
            right = low + ratio * (high - low)
            value_right = function(right)
    return (low + high) / 2
