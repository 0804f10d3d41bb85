"""BLEU, ROUGE-L and CIDEr-D: 5,000 generated images against results of coco-caption, and values by hand.

`golden/captions.json` holds the results of pycocoevalcap 1.2 for the corpora below; `golden/make_golden.py` made it.
"""

import json
import time
from functools import lru_cache
from math import exp, log, sqrt
from pathlib import Path
from random import Random

import pytest

from mmx.evaluation.metrics import captions
from mmx.evaluation.metrics.captions import Cider, bleu, caption_metrics, cider, rouge_l

GOLDEN = Path(__file__).parent / "golden" / "captions.json"
NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")
CORPORA, IMAGES = 250, 20

words = str.split


def pick(rng, things):
    return things[int(rng.random() * len(things))]  # only random() is guaranteed to be the same in all Python versions


def altered(rng, sentence, vocabulary):
    """The sentence with some words removed, replaced or repeated; rarely empty."""
    kept = []
    for word in sentence:
        fate = rng.random()
        kept += (
            [] if fate < 0.15 else [pick(rng, vocabulary)] if fate < 0.35 else [word, word] if fate < 0.4 else [word]
        )
    return [] if rng.random() < 0.01 else kept


def corpus(seed):
    """Candidates and references of twenty images: variants of one sentence each; some candidates are unrelated."""
    rng = Random(seed)
    vocabulary = [f"w{int(300 * rng.random() ** 3)}" for _ in range(200)]
    candidates, references = [], []
    for _ in range(IMAGES):
        truth = [pick(rng, vocabulary) for _ in range(int(1 + 14 * rng.random()))]
        references.append([altered(rng, truth, vocabulary) for _ in range(int(1 + 5 * rng.random()))])
        candidates.append(altered(rng, truth if rng.random() < 0.8 else vocabulary[:9], vocabulary))
    return candidates, references


def scores(candidates, references):
    return [*bleu(candidates, references), rouge_l(candidates, references), cider(candidates, references)]


def test_scores_of_five_thousand_images_equal_those_of_coco_caption():
    golden = json.loads(GOLDEN.read_text())
    assert golden["names"] == list(NAMES)
    assert len(golden["scores"]) * IMAGES == 5_000
    off = [
        (seed, name, ours, theirs)
        for seed, expected in enumerate(golden["scores"])
        for name, ours, theirs in zip(NAMES, scores(*corpus(seed)), expected, strict=True)
        if abs(ours - theirs) > 1e-6
    ]
    assert off == []


def test_scores_of_the_golden_corpora_are_diverse():
    expected = json.loads(GOLDEN.read_text())["scores"]
    for index, name in enumerate(NAMES):
        values = [row[index] for row in expected]
        assert max(values) - min(values) > 0.1, name
        assert len(set(values)) > 0.95 * CORPORA, name


def test_scores_of_all_images_as_one_corpus():
    candidates, references = [], []
    for seed in range(CORPORA):
        more_candidates, more_references = corpus(seed)
        candidates += more_candidates
        references += more_references
    assert scores(candidates, references) == pytest.approx(json.loads(GOLDEN.read_text())["all"], abs=1e-6)


def test_bleu_by_hand():
    # "the" occurs at most twice in a reference: 2 of 7 (the example of Papineni et al.); "the the" is in none.
    candidate = ["the"] * 7
    references = [words("the cat is on the mat"), words("there is a cat on the mat")]
    one, two, _, _ = bleu([candidate], [references])
    assert one == pytest.approx(2 / 7, abs=1e-8)
    assert two == pytest.approx(0, abs=1e-6)


def test_the_brevity_penalty_uses_the_closest_length_and_the_shorter_of_two():
    three, five = words("a b c"), words("a b c d e")
    # 3 and 5 are equally close to 4; with 3 there is no penalty.
    assert bleu([list("abcd")], [[five, three]])[0] == pytest.approx(1.0, abs=1e-8)
    assert bleu([list("ab")], [[five, three]])[0] == pytest.approx(exp(1 - 3 / 2), abs=1e-8)


def test_rouge_by_hand():
    # Common subsequence a-c-e: precision 3/4, recall 3/5.
    expected = (1 + 1.44) * (3 / 4) * (3 / 5) / (3 / 5 + 1.44 * (3 / 4))
    assert rouge_l([list("acex")], [[list("abcde")]]) == pytest.approx(expected, abs=1e-12)


def test_rouge_takes_precision_and_recall_from_different_references():
    # Precision 2/2 of the long reference, recall 1/1 of the short one.
    assert rouge_l([list("ab")], [[list("axbxx"), list("a")]]) == pytest.approx(1.0, abs=1e-12)


def test_rouge_of_an_empty_caption_is_zero_unless_a_reference_is_empty_too():
    assert rouge_l([[]], [[["a"]]]) == 0.0
    assert rouge_l([[]], [[["a"], []]]) == 1.0


def test_common_subsequence_length_by_definition():
    @lru_cache(None)
    def slow(first, second):
        if not first or not second:
            return 0
        if first[0] == second[0]:
            return 1 + slow(first[1:], second[1:])
        return max(slow(first[1:], second), slow(first, second[1:]))

    rng = Random(5)
    for _ in range(300):
        first, second = (tuple(pick(rng, "abcd") for _ in range(int(9 * rng.random()))) for _ in range(2))
        assert captions._common_subsequence_length(first, second) == slow(first, second)


def test_cider_by_hand():
    # Two images, one-word sentences. "dog" is in the references of one image and has weight ln 2: cosine 1 for
    # unigrams, 0 for longer ones, so a quarter of 10; "cat" and "bird" have nothing in common.
    assert cider([["dog"], ["cat"]], [[["dog"]], [["bird"]]]) == pytest.approx((10 / 4 + 0) / 2, abs=1e-12)


def test_cider_clips_repeated_words_and_penalizes_the_length():
    # "dog dog dog dog" for "dog": weights 4 ln2 (and 3 ln2 of unseen bigrams) and ln2; the clipped product is ln2^2.
    weight = log(2)
    one_grams = weight * weight / (4 * weight * weight) * exp(-(3**2) / (2 * 6**2))
    repeated = cider([["dog"] * 4, ["cat"]], [[["dog"]], [["bird"]]])
    assert repeated == pytest.approx(10 * one_grams / 4 / 2, abs=1e-12)


def test_the_mean_of_single_scores_is_the_score_of_the_corpus():
    references = [[["a", "dog", "runs"], ["the", "dog"]], [["a", "cat"]], [["a", "red", "cat", "sits"]]]
    candidates = [["a", "dog"], ["a", "cat"], ["the", "red", "cat"]]
    corpus = Cider(references)
    scores = [corpus.score(c, targets) for c, targets in zip(candidates, references, strict=True)]
    assert sum(scores) / 3 == cider(candidates, references)
    assert [corpus.score(["a", "cat"], references[1]), corpus.score([], references[0])] == [scores[1], 0.0]


def test_cider_gives_rare_words_more_weight_and_common_words_none():
    references = [[["a", "dog"]], [["a", "cat"]], [["a", "bird"]]]
    assert cider([["a"], ["a"], ["a"]], references) == 0.0
    rare, unseen = log(3), log(3)
    cosine = rare**2 / (sqrt(rare**2 + unseen**2) * rare)  # unigrams of "dog x" and "a dog"
    assert cider([["dog", "x"], ["a"], ["a"]], references) == pytest.approx(10 * cosine / 4 / 3, abs=1e-12)


def test_caption_metrics_tokenize_and_match_ids():
    references = {7: ["A dog runs.", "The dog is running"], "b": ["Two cats sit on a mat ."]}
    perfect = caption_metrics({"b": "two cats sit on a mat", 7: "a dog runs!"}, references)
    assert list(perfect) == [*NAMES, "distinct", "length"]
    assert perfect["BLEU-3"] == pytest.approx(1.0, abs=1e-6)
    assert perfect["ROUGE-L"] == 1.0
    assert perfect["distinct"] == 2.0
    assert perfect["length"] == 4.5
    same = caption_metrics({7: "A dog.", "b": "a dog"}, references)
    assert same["distinct"] == 1.0
    assert same["CIDEr"] < perfect["CIDEr"]


def test_novel_captions_have_the_tokens_of_no_training_caption():
    references = {n: ["a dog"] for n in range(4)}
    predictions = {0: "a dog runs.", 1: "A dog runs", 2: "a dog", 3: "a dog runs"}
    assert caption_metrics(predictions, references, ["A dog runs!", "two cats"])["novel"] == 1.0
    assert caption_metrics(predictions, references, ["two cats"])["novel"] == 4.0
    assert "novel" not in caption_metrics(predictions, references)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({1: "a", 2: "b"}, {1: ["a"], 3: ["b"]}, "same ids: 1 have no references and 1 no prediction, such as 2"),
        ({1: "a", 2: "b"}, {1: ["a"], 2: []}, "at least one sentence"),
        ({1: "a", 2: "b"}, {1: ["a"], 2: "b"}, "'b'"),
        ({}, {}, "at least one; got 0 and 0"),
    ],
)
def test_invalid_sentences(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        caption_metrics(predictions, references)


def test_a_single_image_has_all_metrics_but_cider():
    metrics = caption_metrics({1: "a dog runs fast"}, {1: ["a dog runs fast"]})
    assert metrics["BLEU-4"] == pytest.approx(1.0)
    assert metrics["ROUGE-L"] == pytest.approx(1.0)
    assert "CIDEr" not in metrics
    with pytest.raises(ValueError, match="at least two images"):
        cider([["a"]], [[["a"]]])


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider])
def test_invalid_tokens(metric):
    with pytest.raises(ValueError, match="got 1 and 2"):
        metric([["a"]], [[["a"]], [["b"]]])
    with pytest.raises(ValueError, match="the one at index 1 has none"):
        metric([["a"], ["b"]], [[["a"]], []])


def test_a_thousand_images_take_seconds():
    candidates, references = corpus(0)
    start = time.perf_counter()
    scores(candidates * 50, references * 50)
    assert time.perf_counter() - start < 10
