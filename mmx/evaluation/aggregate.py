"""Metrics of all predictions and losses of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from mmx.evaluation.answer_types import ANSWER_WORDS, answer_type_fits, cannot_tell_rate
from mmx.evaluation.calibration import MIN_ANSWERS, expected_calibration_error, fit_answer_temperature
from mmx.evaluation.losses import BatchLoss, WordLoss
from mmx.evaluation.metrics.answers import answer_metrics, most_frequent_answer_accuracy
from mmx.evaluation.metrics.captions import caption_metrics
from mmx.evaluation.report import EvaluatedText

EXACT_MATCH = "exact match"
MOST_FREQUENT_ANSWER = "most frequent answer"
ANSWER_TYPE_FITS = "answer type fits"
CALIBRATION_ERROR = "calibration error"
ANSWER_TEMPERATURE = "answer temperature"
CANNOT_TELL_RATE = "can't tell, answerable"


def aggregate_metrics(
    predictions: Sequence[EvaluatedText], losses: Sequence[BatchLoss], training_captions: Collection[str] = ()
) -> dict[str, float]:
    """All metrics that the texts allow: loss, captions, answers, answers by question type and whether their
    types fit, calibration, bits per word, counts.

    CIDEr weighs n-grams by how many images have them, so it needs at least two captions.
    """
    captions = [text for text in predictions if text.question is None and text.targets]
    answers = [text for text in predictions if text.question is not None and text.targets]
    metrics: dict[str, float] = {}
    tokens = sum(loss.tokens for loss in losses)
    if tokens:
        metrics["loss"] = math.fsum(loss.nats for loss in losses) / tokens
    if captions:
        predicted = {text.key: text.prediction for text in captions}
        references = {text.key: text.targets for text in captions}
        metrics |= caption_metrics(predicted, references, training_captions)
    if answers:
        metrics |= _answer_metrics(answers)
        metrics |= _metrics_by_question_type(answers)
        metrics |= _calibration_metrics(answers)
    metrics |= _bits_per_word(losses)
    metrics["captions"] = len(captions)
    metrics["questions"] = len(answers)
    return metrics


def _answer_metrics(answers: Sequence[EvaluatedText]) -> dict[str, float]:
    """Exact match, its baseline, and VQA accuracy if some question has the answers of several annotators."""
    predicted = {text.key: text.prediction for text in answers}
    targets = {text.key: text.targets for text in answers}
    questions = {text.key: text.question or "" for text in answers}
    metrics = answer_metrics(predicted, targets)
    if all(len(text.targets) == 1 for text in answers):
        del metrics["VQA accuracy"]
    metrics[MOST_FREQUENT_ANSWER] = most_frequent_answer_accuracy(questions, targets)
    return metrics


def _metrics_by_question_type(answers: Sequence[EvaluatedText]) -> dict[str, float]:
    """Exact match and its baseline for each type, and whether the types of the answers fit where these are known."""
    by_type: dict[str, list[EvaluatedText]] = {}
    for text in answers:
        if text.question_type:
            by_type.setdefault(text.question_type, []).append(text)
    metrics = {}
    fits = {}
    for question_type, texts in sorted(by_type.items()):
        found = _answer_metrics(texts)
        for name in (EXACT_MATCH, MOST_FREQUENT_ANSWER):
            metrics[f"{name}, {question_type}"] = found[name]
        if question_type in ANSWER_WORDS:
            fits[question_type] = answer_type_fits(question_type, texts)
            metrics[f"{ANSWER_TYPE_FITS}, {question_type}"] = fits[question_type]
    if fits:
        total = sum(len(by_type[name]) for name in fits)
        metrics[ANSWER_TYPE_FITS] = math.fsum(rate * len(by_type[name]) for name, rate in fits.items()) / total
    if "unanswerable" in by_type:
        metrics[CANNOT_TELL_RATE] = cannot_tell_rate(answers)
    return metrics


def _calibration_metrics(answers: Sequence[EvaluatedText]) -> dict[str, float]:
    """Calibration of the probabilities of answers, and the temperature that fits best, where there are enough."""
    known = [text for text in answers if math.isfinite(text.probability)]
    if len(known) < MIN_ANSWERS:
        return {}
    return {CALIBRATION_ERROR: expected_calibration_error(known), ANSWER_TEMPERATURE: fit_answer_temperature(known)}


def _bits_per_word(losses: Sequence[BatchLoss]) -> dict[str, float]:
    """Bits per word under each condition that was measured."""
    by_condition: dict[str, list[WordLoss]] = {}
    for loss in losses:
        for name, word_loss in loss.by_condition.items():
            by_condition.setdefault(name, []).append(word_loss)
    bits = {}
    for name, word_losses in by_condition.items():
        words = sum(loss.words for loss in word_losses)
        if words:
            bits[name] = math.fsum(loss.nats for loss in word_losses) / (math.log(2) * words)
    return bits
