"""Metrics as sums over texts equal the metrics of whole corpora; which metrics texts allow."""

import math
from random import Random

import pytest

from mmx.errors import MmxError
from mmx.evaluation.joining import ScoredText
from mmx.evaluation.metrics.answers import answer_metrics
from mmx.evaluation.metrics.captions import caption_metrics
from mmx.evaluation.scores import score_texts

WORDS = ["a", "the", "dog", "cat", "runs", "sits", "on", "grass", "sand", "red", "two", "and"]


def text(number, prediction, targets, question=None):
    return ScoredText(number, number // 2, str(number), question, prediction, tuple(targets), {})


def sentence(rng):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 9)))


def captions(rng, count, references):
    """Every third caption is one of its references."""
    texts = []
    for number in range(count):
        targets = [sentence(rng) for _ in range(references)]
        texts.append(text(number, sentence(rng) if number % 3 else targets[0], targets))
    return texts


def values(texts, names=()):
    return {metric.name: metric.value for metric in score_texts(texts, names)}


def test_captions_have_the_values_of_whole_corpora():
    texts = captions(Random(0), 60, 4)
    expected = caption_metrics({t.id: t.prediction for t in texts}, {t.id: t.targets for t in texts})
    found = values(texts)
    assert list(found) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-12)
    assert all(value > 0.01 for value in found.values())


def test_answers_have_the_values_of_whole_corpora():
    rng = Random(1)
    answers = [rng.choice(["yes", "no", "two dogs", "red"]) for _ in range(50)]
    texts = [
        text(n, answer, [*rng.choices(answers, k=9), answer][: 1 + n % 10], "what?") for n, answer in enumerate(answers)
    ]
    expected = answer_metrics({t.id: t.prediction for t in texts}, {t.id: t.targets for t in texts})
    found = values(texts)
    assert list(found) == ["exact match", "VQA accuracy", "ANLS"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert 0 < found["exact match"] <= found["ANLS"] < 1


def test_error_rates_are_those_of_the_corpus_not_means_over_texts():
    texts = [text(0, "a dog runs on the sand", ["a dog runs on the sand"]), text(1, "x", ["a"])]
    assert values(texts, ["WER", "CER"]) == {"WER": 1 / 7, "CER": 1 / 23}


def test_which_metrics_texts_allow():
    one = text(0, "yes", ["yes"], "what?")
    assert list(values([one])) == ["exact match", "ANLS"]
    single = text(1, "a dog", ["a dog"])
    assert list(values([single])) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "WER", "CER"]
    both = values([single, one, text(2, "a cat", ["a cat"])])
    assert [name for name in both if name in ("CIDEr", "CER", "exact match")] == ["CIDEr", "CER", "exact match"]
    assert list(values([single, one], ["ANLS", "BLEU-2"])) == ["BLEU-2", "ANLS"]


@pytest.mark.parametrize(
    ("name", "code"), [("Cider", "score.unknown_metric"), ("WER", "score.metric"), ("VQA accuracy", "score.metric")]
)
def test_metrics_that_are_unknown_or_not_defined(name, code):
    texts = captions(Random(0), 3, 2)
    with pytest.raises(MmxError) as caught:
        score_texts(texts, [name])
    assert (caught.value.code, caught.value.details["given"]) == (code, name)


def test_empty_predictions_are_scored():
    found = values([text(0, "", ["a dog"]), text(1, "a cat", ["a cat"])])
    assert found["WER"] == 0.5
    assert all(math.isfinite(value) for value in found.values())
