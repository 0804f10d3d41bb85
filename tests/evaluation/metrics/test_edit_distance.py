"""Edit distances, WER and CER against results of jiwer, ANLS by hand.

`golden/error_rates.json` holds the results of jiwer 4.0 for the corpora below; `golden/make_golden.py` made it.
"""

import json
from pathlib import Path
from random import Random

import pytest

from mmx.evaluation.metrics.edit_distance import anls, character_errors, edit_distance, word_errors

GOLDEN = Path(__file__).parent / "golden" / "error_rates.json"
CORPORA, TEXTS = 40, 25


def pick(rng, things):
    return things[int(rng.random() * len(things))]


def altered(rng, text):
    """The text with characters removed, replaced, repeated or exchanged for a space."""
    kept = []
    for character in text:
        fate = rng.random()
        if fate < 0.06:
            continue
        kept.append(pick(rng, "aeé .TX") if fate < 0.14 else character)
        if fate > 0.95:
            kept.append(character)
    return "".join(kept)


def corpus(seed):
    """Predictions and references; some predictions are empty or unrelated."""
    rng = Random(seed)
    predictions, references = [], []
    for _ in range(TEXTS):
        words = ["".join(pick(rng, "abcdeé.,T") for _ in range(int(1 + 8 * rng.random()))) for _ in range(9)]
        reference = " ".join(words[: int(1 + 9 * rng.random())])
        prediction = altered(rng, reference) if rng.random() < 0.9 else pick(rng, ["", "  ", "quite another text"])
        predictions.append(prediction)
        references.append(reference)
    return predictions, references


def rate(count, predictions, references):
    counts = [count(*pair) for pair in zip(predictions, references, strict=True)]
    return sum(c.errors for c in counts) / sum(c.length for c in counts)


def test_error_rates_of_corpora_equal_those_of_jiwer():
    golden = json.loads(GOLDEN.read_text())
    assert len(golden["wer"]) == len(golden["cer"]) == CORPORA
    assert len(set(golden["wer"])) > 0.9 * CORPORA
    for seed in range(CORPORA):
        texts = corpus(seed)
        assert rate(word_errors, *texts) == pytest.approx(golden["wer"][seed], abs=1e-9)
        assert rate(character_errors, *texts) == pytest.approx(golden["cer"][seed], abs=1e-9)


def table_distance(first, second):
    """The distance from a whole table."""
    row = list(range(len(second) + 1))
    for i, ours in enumerate(first, start=1):
        above = row
        row = [i]
        for j, theirs in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (ours != theirs)))
    return row[-1]


def test_the_distance_equals_that_of_a_table_also_beyond_64_items():
    rng = Random(0)
    for _ in range(300):
        first = [pick(rng, "abc ") for _ in range(int(rng.random() * 150))]
        second = [pick(rng, "abcd") for _ in range(int(rng.random() * 150))]
        assert edit_distance(first, second) == table_distance(first, second)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2), (["a", "b"], ["ab"], 2)],
)
def test_distances_by_hand(first, second, expected):
    assert edit_distance(first, second) == expected


def test_counts_are_of_the_reference():
    assert word_errors("a  dog\nruns", "the dog") == (2, 2)
    assert character_errors(" dogs ", "dog") == (1, 3)
    assert word_errors("", "a b c") == (3, 3)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("ITC Limited", ["itc limited"], 1),
        ("itc  limited\n", ["ITC Limited", "other"], 1),
        ("itc limted", ["itc limited"], 10 / 11),
        ("abcd", ["abxy"], 0.5),  # exactly at the threshold: kept by the script
        ("abcde", ["abxyz"], 0),
        ("", ["x"], 0),
        ("11", ["12", "1"], 0.5),
    ],
)
def test_anls(prediction, answers, expected):
    assert anls(prediction, answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("answers", [[], "yes"])
def test_anls_needs_a_list_of_answers(answers):
    with pytest.raises(ValueError):
        anls("yes", answers)
