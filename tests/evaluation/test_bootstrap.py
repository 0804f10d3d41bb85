"""Bootstrap: samples equal metrics of drawn texts, intervals cover, and the paired test has its level and power."""

import math
from random import Random

import numpy as np
import pytest

from mmx.evaluation.bootstrap import compare_metrics, resample, score_intervals
from mmx.evaluation.joining import ScoredText
from mmx.evaluation.metrics.captions import bleu
from mmx.evaluation.scores import mean_of, score_texts

WORDS = ["a", "the", "dog", "cat", "runs", "sits", "on", "grass", "sand", "red", "two", "and"]


def text(number, example, prediction="x", targets=("x",)):
    return ScoredText(number, example, str(number), None, prediction, targets, {})


def test_a_sample_is_the_metric_of_the_drawn_images():
    """Two texts an image: BLEU of a corpus in which each drawn image has both of its texts."""
    rng = Random(0)
    texts = []
    for number in range(12):
        sentences = [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(3)]
        texts.append(text(number, example=5 * (number // 2), prediction=sentences[0], targets=tuple(sentences[1:])))
    metrics = score_texts(texts, ["BLEU-1", "BLEU-2"])
    samples = resample(metrics, 20, seed=3)
    generator = np.random.default_rng(3)
    for sample in range(20):
        drawn = [texts[2 * image + part] for image in generator.integers(6, size=6) for part in (0, 1)]
        candidates = [t.prediction.split() for t in drawn]
        expected = bleu(candidates, [[target.split() for target in t.targets] for t in drawn])
        assert samples[:, sample] == pytest.approx(expected[:2], abs=1e-12)


def test_intervals_of_a_mean_have_the_width_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(size=2000)
    metric = mean_of("mean", [text(n, n) for n in range(2000)], values.tolist())
    (score,) = score_intervals([metric], 2000)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert score.value == pytest.approx(values.mean(), abs=1e-12)
    assert score.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert score.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_texts_of_one_image_are_drawn_together():
    """Ten copies of each image say no more than one: the interval has the same width."""
    values = np.random.default_rng(0).normal(size=200).tolist()
    once = mean_of("mean", [text(n, n) for n in range(200)], values)
    copied = mean_of("mean", [text(n, n // 10) for n in range(2000)], np.repeat(values, 10).tolist())
    (first,) = score_intervals([once])
    (second,) = score_intervals([copied])
    assert (second.low, second.high) == pytest.approx((first.low, first.high), abs=1e-9)


def test_the_seed_determines_the_interval():
    metric = mean_of("mean", [text(n, n) for n in range(50)], list(range(50)))
    assert score_intervals([metric], 100, seed=1) == score_intervals([metric], 100, seed=1)
    assert score_intervals([metric], 100, seed=1) != score_intervals([metric], 100, seed=2)


def test_without_resamples_there_is_no_interval():
    metric = mean_of("mean", [text(0, 0)], [0.5])
    (score,) = score_intervals([metric], 0)
    assert score.value == 0.5
    assert math.isnan(score.low) and math.isnan(score.high)


def systems(generator, shift):
    texts = [text(n, n) for n in range(100)]
    common = generator.normal(size=100)
    ours = common + 0.3 * generator.normal(size=100)
    theirs = common + 0.3 * generator.normal(size=100) + shift
    return mean_of("mean", texts, ours.tolist()), mean_of("mean", texts, theirs.tolist())


def test_p_values_of_equal_systems_are_uniform_and_small_for_others():
    """At the level 0.05, 200 pairs of equal systems give about 10; a shift of 4.7 standard errors is found.

    It is 1.4 standard errors of unpaired systems, which would find few of the shifts.
    """
    generator = np.random.default_rng(0)
    equal = [compare_metrics([a], [b], 200)[0].p_value for a, b in (systems(generator, 0) for _ in range(200))]
    shifted = [compare_metrics([a], [b], 200)[0].p_value for a, b in (systems(generator, 0.2) for _ in range(50))]
    assert 2 <= sum(p < 0.05 for p in equal) <= 22
    assert 0.4 < sum(equal) / 200 < 0.6
    assert sum(p < 0.05 for p in shifted) >= 45


def test_a_system_does_not_differ_from_itself():
    metric = mean_of("mean", [text(n, n) for n in range(50)], list(range(50)))
    (comparison,) = compare_metrics([metric], [metric])
    assert (comparison.difference, comparison.low, comparison.high, comparison.p_value) == (0, 0, 0, 1)


def test_the_difference_is_second_minus_first():
    texts = [text(n, n) for n in range(20)]
    first = mean_of("mean", texts, [0.0] * 20)
    second = mean_of("mean", texts, [1.0] * 20)
    (comparison,) = compare_metrics([first], [second], 999)
    assert (comparison.first, comparison.second, comparison.difference) == (0, 1, 1)
    assert (comparison.low, comparison.high) == (1, 1)
    assert comparison.p_value == pytest.approx(2 / 1000)
