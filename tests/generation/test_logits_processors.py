"""Logits processors against those of transformers, and by hand where transformers has none."""

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
    begin_suppress_tokens,
    build_logits_processors,
    eos_when_all_masked,
    forced_eos,
    min_new_tokens,
    no_repeat_ngram_size,
    renormalize,
    repetition_penalty,
    suppress_tokens,
    temperature,
    top_k,
    top_p,
)

EOS = 2
V = 11
MASKED = float("-inf")
properties = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 10**6)
lengths = st.integers(0, 9)


def random_case(seed, length, rows=4):
    """Generated tokens [N, t] of a small vocabulary, so that they repeat, and logits [N, V]."""
    generator = torch.Generator().manual_seed(seed)
    generated = torch.randint(0, 4, (rows, length), generator=generator)
    return generated, torch.randn(rows, V, generator=generator) * 3


def assert_same(processor, reference, generated, logits):
    assert torch.equal(processor(generated, logits), reference(generated, logits))


@properties
@given(seed=seeds, length=lengths, penalty=st.floats(0.2, 5.0))
def test_repetition_penalty(seed, length, penalty):
    reference = RepetitionPenaltyLogitsProcessor(penalty)
    assert_same(repetition_penalty(penalty), reference, *random_case(seed, length))


@properties
@given(seed=seeds, length=lengths, size=st.integers(1, 5))
def test_no_repeat_ngram_size(seed, length, size):
    assert_same(no_repeat_ngram_size(size), NoRepeatNGramLogitsProcessor(size), *random_case(seed, length))


@properties
@given(seed=seeds, length=lengths, minimum=st.integers(0, 9))
def test_min_new_tokens(seed, length, minimum):
    reference = MinNewTokensLengthLogitsProcessor(0, minimum, EOS)
    assert_same(min_new_tokens(minimum, EOS), reference, *random_case(seed, length))


@properties
@given(seed=seeds, value=st.floats(0.05, 20))
def test_temperature(seed, value):
    assert_same(temperature(value), TemperatureLogitsWarper(value), *random_case(seed, 3))


@properties
@given(seed=seeds, k=st.integers(1, 2 * V), ties=st.booleans())
def test_top_k(seed, k, ties):
    generated, logits = random_case(seed, 3)
    logits = logits.round() if ties else logits
    assert_same(top_k(k), TopKLogitsWarper(k), generated, logits)


@properties
@given(seed=seeds, p=st.floats(0.01, 0.99))
def test_top_p(seed, p):
    assert_same(top_p(p), TopPLogitsWarper(p), *random_case(seed, 3))


def test_neutral_values_change_nothing():
    generated, logits = random_case(0, 3)
    for processor in (top_k(0), top_k(V), top_p(1.0), temperature(1.0), repetition_penalty(1.0)):
        assert torch.equal(processor(generated, logits), logits)


def test_top_p_keeps_the_best_token():
    generated, logits = random_case(1, 3)
    kept = top_p(1e-9)(generated, logits)
    assert torch.equal((kept > MASKED).sum(-1), torch.ones(4, dtype=torch.long))
    assert torch.equal(kept.argmax(-1), logits.argmax(-1))


def test_suppress_tokens_masks_only_these_tokens():
    generated, logits = random_case(2, 0)
    processed = suppress_tokens([1, 4])(generated, logits)
    others = [token for token in range(V) if token not in (1, 4)]
    assert (processed[:, [1, 4]] == MASKED).all()
    assert torch.equal(processed[:, others], logits[:, others])


def test_begin_suppress_tokens_applies_to_the_first_token():
    processor = begin_suppress_tokens([1])
    generated, logits = random_case(2, 0)
    assert (processor(generated, logits)[:, 1] == MASKED).all()
    generated, logits = random_case(2, 1)
    assert torch.equal(processor(generated, logits), logits)


def test_forced_eos_applies_to_the_last_token():
    processor = forced_eos(4, EOS)
    generated, logits = random_case(2, 2)
    assert torch.equal(processor(generated, logits), logits)
    generated, logits = random_case(2, 3)
    expected = torch.full_like(logits, MASKED)
    expected[:, EOS] = 0.0
    assert torch.equal(processor(generated, logits), expected)


def test_renormalize_after_masking():
    logits = torch.tensor([[0.0, 0.0, MASKED], [MASKED, MASKED, MASKED]])
    processed = renormalize(torch.zeros(2, 0).long(), logits)
    torch.testing.assert_close(processed[0, :2].exp(), torch.tensor([0.5, 0.5]))
    assert torch.equal(processed[1], logits[1])


@pytest.mark.parametrize(
    "processor",
    [
        suppress_tokens([1, 4]),
        min_new_tokens(9, EOS),
        repetition_penalty(2.0),
        no_repeat_ngram_size(1),
        temperature(2.0),
        top_k(2),
        top_p(0.5),
        forced_eos(5, EOS),
    ],
)
def test_processors_do_not_write_into_their_arguments(processor):
    generated, logits = random_case(3, 4)
    generated_before = generated.clone()
    logits_before = logits.clone()
    processor(generated, logits)
    assert torch.equal(generated, generated_before)
    assert torch.equal(logits, logits_before)


def test_eos_is_allowed_where_every_token_is_masked():
    logits = torch.full((2, 4), MASKED)
    logits[1, 3] = -7.0
    processed = eos_when_all_masked(1)(torch.zeros(2, 0).long(), logits)
    assert processed[0].tolist() == [MASKED, 0.0, MASKED, MASKED]
    assert torch.equal(processed[1], logits[1])


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 0),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.5}, 0),  # options of sampling
        ({"min_new_tokens": 2}, 1),
        ({"repetition_penalty": 1.1}, 1),
        ({"no_repeat_ngram_size": 3}, 1),
        ({"forced_eos_token_id": 1}, 1),
        ({"begin_suppress_tokens": (1,)}, 1),
        ({"renormalize_logits": True}, 1),
        ({"do_sample": True, "suppress_tokens": (0,)}, 4),
    ],
)
def test_options_enable_their_processors(options, count):
    assert len(build_logits_processors(GenerationConfig(**options), EOS)) == count


@properties
@given(seed=seeds, length=lengths)
def test_all_processors_together_equal_those_of_transformers(seed, length):
    generated, logits = random_case(seed, length)
    options = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=6,
        top_p=0.9,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        min_new_tokens=3,
    )
    expected = logits
    for processor in (
        MinNewTokensLengthLogitsProcessor(0, 3, EOS),
        RepetitionPenaltyLogitsProcessor(1.3),
        NoRepeatNGramLogitsProcessor(2),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(6),
        TopPLogitsWarper(0.9),
    ):
        expected = processor(generated, expected)
    for processor in build_logits_processors(options, EOS):
        logits = processor(generated, logits)
    assert torch.equal(logits, expected)
