"""Rules on scores, each against the processor of transformers of the same meaning, and by hand where there is none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmx.config.schema import GenerationConfig
from mmx.generation.logits_processors import (
    build_logits_processors,
    eos_when_all_masked,
    min_new_tokens,
    no_repeat_ngram,
    repetition_penalty,
    suppress_tokens,
    temperature_,
    top_k,
    top_p,
)

EOS, V = 2, 11
EFFORT = settings(max_examples=50, deadline=None)
SEEDS, LENGTHS = st.integers(0, 10**6), st.integers(0, 9)


def case(seed, length, rows=4):
    """What was said [N, t], out of few words so that it repeats itself, and scores [N, V]."""
    generator = torch.Generator().manual_seed(seed)
    said = torch.randint(0, 4, (rows, length), generator=generator)
    return said, torch.randn(rows, V, generator=generator) * 3


@EFFORT
@given(seed=SEEDS, length=LENGTHS, penalty=st.floats(0.2, 5.0))
def test_repetition_penalty(seed, length, penalty):
    said, scores = case(seed, length)
    assert torch.equal(
        repetition_penalty(penalty)(said, scores), RepetitionPenaltyLogitsProcessor(penalty)(said, scores)
    )


@EFFORT
@given(seed=SEEDS, length=LENGTHS, size=st.integers(1, 5))
def test_no_repeated_ngram(seed, length, size):
    said, scores = case(seed, length)
    assert torch.equal(no_repeat_ngram(size)(said, scores), NoRepeatNGramLogitsProcessor(size)(said, scores))


@EFFORT
@given(seed=SEEDS, length=LENGTHS, least=st.integers(0, 9))
def test_at_least(seed, length, least):
    said, scores = case(seed, length)
    assert torch.equal(
        min_new_tokens(least, EOS)(said, scores), MinNewTokensLengthLogitsProcessor(0, least, EOS)(said, scores)
    )


@EFFORT
@given(seed=SEEDS, temperature=st.floats(0.05, 20))
def test_temperature(seed, temperature):
    said, scores = case(seed, 3)
    assert torch.equal(temperature_(temperature)(said, scores), TemperatureLogitsWarper(temperature)(said, scores))


@EFFORT
@given(seed=SEEDS, count=st.integers(1, 2 * V), tied=st.booleans())
def test_top_k(seed, count, tied):
    said, scores = case(seed, 3)
    scores = scores.round() if tied else scores
    assert torch.equal(top_k(count)(said, scores), TopKLogitsWarper(count)(said, scores))


@EFFORT
@given(seed=SEEDS, mass=st.floats(0.01, 0.99))
def test_top_p(seed, mass):
    said, scores = case(seed, 3)
    assert torch.equal(top_p(mass)(said, scores), TopPLogitsWarper(mass)(said, scores))


def test_nothing_is_kept_back_by_rules_that_keep_all():
    said, scores = case(0, 3)
    for rule in (top_k(0), top_k(V), top_p(1.0), temperature_(1.0), repetition_penalty(1.0)):
        assert torch.equal(rule(said, scores), scores)


def test_the_likeliest_token_always_stays():
    said, scores = case(1, 3)
    kept = top_p(1e-9)(said, scores)
    assert torch.equal((kept > float("-inf")).sum(-1), torch.ones(4, dtype=torch.long))
    assert torch.equal(kept.argmax(-1), scores.argmax(-1))


def test_banned_tokens_are_refused_and_the_scores_given_are_left_alone():
    said, scores = case(2, 0)
    before = scores.clone()
    ruled = suppress_tokens([1, 4])(said, scores)
    assert (ruled[:, [1, 4]] == float("-inf")).all()
    others = [i for i in range(V) if i not in (1, 4)]
    assert torch.equal(ruled[:, others], scores[:, others])
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    "rule",
    [min_new_tokens(9, EOS), repetition_penalty(2.0), no_repeat_ngram(1), temperature_(2.0), top_k(2), top_p(0.5)],
)
def test_no_rule_writes_into_what_it_is_given(rule):
    said, scores = case(3, 4)
    before = said.clone(), scores.clone()
    rule(said, scores)
    assert torch.equal(said, before[0])
    assert torch.equal(scores, before[1])


def test_at_a_dead_end_only_the_end_is_left():
    scores = torch.full((2, 4), float("-inf"))
    scores[1, 3] = -7.0
    assert eos_when_all_masked(1)(torch.zeros(2, 0).long(), scores)[0].tolist() == [
        float("-inf"),
        0.0,
        *[float("-inf")] * 2,
    ]
    assert torch.equal(eos_when_all_masked(1)(torch.zeros(2, 0).long(), scores)[1], scores[1])


def test_options_switch_on_their_rules_and_no_others():
    assert build_logits_processors(GenerationConfig(), EOS) == []
    assert build_logits_processors(GenerationConfig(temperature=0.5, top_k=3, top_p=0.5), EOS) == [], (
        "these are about sampling"
    )
    one = {"min_new_tokens": 2}, {"repetition_penalty": 1.1}, {"no_repeat_ngram_size": 3}
    assert [len(build_logits_processors(GenerationConfig(**options), EOS)) for options in one] == [1, 1, 1]
    assert len(build_logits_processors(GenerationConfig(do_sample=True, suppress_tokens=(0,)), EOS)) == 4


@EFFORT
@given(seed=SEEDS, length=LENGTHS)
def test_all_rules_together_equal_those_of_transformers(seed, length):
    said, scores = case(seed, length)
    options = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=6,
        top_p=0.9,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        min_new_tokens=3,
    )
    expected = scores
    for processor in (
        MinNewTokensLengthLogitsProcessor(0, 3, EOS),
        RepetitionPenaltyLogitsProcessor(1.3),
        NoRepeatNGramLogitsProcessor(2),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(6),
        TopPLogitsWarper(0.9),
    ):
        expected = processor(said, expected)
    for rule in build_logits_processors(options, EOS):
        scores = rule(said, scores)
    assert torch.equal(scores, expected)
