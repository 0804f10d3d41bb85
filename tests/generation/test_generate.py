"""Greedy and sampled decoding: by hand on tables, by frequency, and the same whoever else is in the batch."""

import math

import pytest
import torch
from generation_cases import Chain, chain, loud_model, numbers, prompts, remember
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MaxLengthCriteria, RepetitionPenaltyLogitsProcessor

from mmx.config.schema import GenerationConfig
from mmx.generation import DecoderStep, generate, stream

EOS = 0
ONE = prompts([[[1, 1]]])


def choose(step, batch=ONE, eos=EOS, rules=(), stops=(), **options):
    with torch.no_grad():
        return generate(step, *batch, GenerationConfig(**options), eos, rules, stops)


def by_hand(table, memory, prompt, length, eos=EOS):
    """Greedy, one token at a time, in plain numbers."""
    said, logprobs = list(prompt), []
    for _ in range(length):
        row = table[memory, said[-2], said[-1]].log_softmax(-1).tolist()
        said.append(max(range(len(row)), key=row.__getitem__))
        logprobs.append(row[said[-1]])
        if said[-1] == eos:
            break
    return said[len(prompt) :], logprobs


# ---- greedy ----------------------------------------------------------------------------------------------------


def test_a_cycle_written_by_hand_is_followed_to_its_end():
    table = torch.full((1, 4, 4, 4), -5.0)
    for last, following in ((1, 2), (2, 3), (3, 0)):
        table[:, :, last, following] = 5.0
    text = choose(Chain(table))[0][0][0]
    assert text.tokens == (2, 3)
    assert text.finished
    each = 5.0 - math.log(math.exp(5.0) + 3 * math.exp(-5.0))
    assert text.logprobs == pytest.approx([each] * 3, abs=1e-6)
    assert text.score == pytest.approx(each, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), vocabulary=st.integers(2, 6), length=st.integers(1, 8), memories=st.integers(1, 5))
def test_greedy_is_the_likeliest_token_each_time(seed, vocabulary, length, memories):
    step = chain(vocabulary, memories, seed)
    rows = [[[1, 1], [0, 1, 1], [1, 0]] for _ in range(memories)]
    found = choose(chain(vocabulary, memories, seed), prompts(rows), max_new_tokens=length, length_penalty=0.5)
    for memory, row in enumerate(rows):
        for prompt, (text,) in zip(row, found[memory], strict=True):
            said, logprobs = by_hand(step.table, memory, prompt, length)
            assert text.finished == (said[-1] == EOS)
            assert list(text.tokens) == said[: len(said) - text.finished]
            assert text.logprobs == pytest.approx(logprobs, abs=1e-5)
            assert text.score == pytest.approx(sum(logprobs) / len(logprobs) ** 0.5, abs=1e-5)


def test_the_end_said_first_is_an_empty_text():
    table = torch.zeros(1, 3, 3, 3)
    table[..., EOS] = 9.0
    text = choose(Chain(table))[0][0][0]
    assert (text.tokens, text.finished, len(text.logprobs)) == ((), True, 1)


@pytest.mark.parametrize(("length", "calls"), [(1, 0), (2, 1), (5, 4)])
def test_no_step_is_taken_whose_scores_nobody_reads(length, calls):
    table = torch.zeros(1, 3, 3, 3)
    table[..., 2] = 9.0
    step = Chain(table)
    text = choose(step, max_new_tokens=length)[0][0][0]
    assert text.tokens == (2,) * length
    assert not text.finished
    assert step.calls == calls


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}])
def test_where_every_token_is_refused_the_text_ends(options):
    """Neither a token of no probability, nor an error."""

    def refuse(said, logits):
        return torch.full_like(logits, float("-inf")) if said.shape[1] >= 2 else logits

    def no_end(said, logits):
        return logits.index_fill(-1, torch.tensor([EOS]), float("-inf"))

    text = choose(chain(4), rules=[no_end, refuse], max_new_tokens=6, **options)[0][0][0]
    assert len(text.tokens) == 2
    assert EOS not in text.tokens
    assert math.isfinite(text.score)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_where_the_first_token_is_refused_the_text_is_empty(options):
    refuse = [lambda said, logits: torch.full_like(logits, float("-inf"))]
    assert choose(chain(4), rules=refuse, **options)[0][0][0].tokens == ()


# ---- sampling --------------------------------------------------------------------------------------------------

FIRST = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
DRAWS = 4000


def frequencies(**options):
    table = FIRST.expand(1, 5, 5, 5)
    options = {"do_sample": True, "num_return_sequences": DRAWS, "max_new_tokens": 1, **options}
    texts = choose(Chain(table), prompts([[[1, 1]]]), eos=99, **options)[0][0]
    return torch.bincount(torch.tensor([text.tokens[0] for text in texts]), minlength=5) / DRAWS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, FIRST.softmax(-1)),
        ({"temperature": 0.5}, (FIRST / 0.5).softmax(-1)),
        ({"temperature": 3.0}, (FIRST / 3.0).softmax(-1)),
        ({"top_k": 2}, torch.tensor([*FIRST[:2].softmax(-1), 0, 0, 0])),
        ({"top_k": 1}, torch.tensor([1.0, 0, 0, 0, 0])),
        ({"top_p": 0.8}, torch.tensor([*FIRST[:2].softmax(-1), 0, 0, 0])),
        ({"top_p": 0.9}, torch.tensor([*FIRST[:3].softmax(-1), 0, 0, 0][:5])),
        ({"top_p": 0.01}, torch.tensor([1.0, 0, 0, 0, 0])),
        ({"temperature": 2.0, "top_k": 3}, torch.tensor([*(FIRST[:3] / 2).softmax(-1), 0, 0])),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(options, expected):
    expected = torch.nn.functional.pad(expected, (0, 5 - len(expected)))[:5]
    found = frequencies(**options)
    assert (found[expected == 0] == 0).all(), "a token that was refused has been said"
    # Five standard deviations of a frequency out of 4000.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / DRAWS).sqrt() + 1e-9).all()


def sampled(step, batch, **options):
    found = choose(step, batch, eos=99, do_sample=True, max_new_tokens=8, **options)
    return [[[text.tokens for text in texts] for texts in row] for row in found]


def test_a_seed_is_a_text_and_another_seed_another():
    texts = [sampled(chain(6), ONE, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_several_samples_of_several_streams_all_differ():
    batch = prompts([[[1, 1], [1, 1]], [[1, 1], [1, 1]]])
    step = Chain(torch.zeros(2, 9, 9, 9))
    texts = [text for row in sampled(step, batch, num_return_sequences=5) for texts in row for text in texts]
    assert len(texts) == len(set(texts)) == 20


def test_samples_come_likeliest_first_with_their_own_scores():
    step = chain(6)
    found = choose(step, eos=99, do_sample=True, num_return_sequences=20, max_new_tokens=5)[0][0]
    assert [text.score for text in found] == sorted((text.score for text in found), reverse=True)
    for text in found:
        said = [1, 1, *text.tokens]
        logprobs = [step.table[0, a, b].log_softmax(-1)[c].item() for a, b, c in zip(said, said[1:], said[2:])]
        assert text.logprobs == pytest.approx(logprobs, abs=1e-5)
        assert text.score == pytest.approx(sum(logprobs) / 5, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), neighbours=st.integers(1, 6), end=st.integers(2, 5))
def test_a_sample_does_not_depend_on_those_that_follow_in_the_batch(seed, neighbours, end):
    """Neither on their number, nor on what they say, nor on when they leave."""
    options = {"do_sample": True, "seed": seed, "max_new_tokens": 10, "eos": end, "num_return_sequences": 2}
    alone = choose(chain(6, 1, seed, 2.0), ONE, **options)[0]
    table = torch.cat([chain(6, 1, seed, 2.0).table, chain(6, neighbours, seed + 1, 2.0).table])
    assert choose(Chain(table), prompts([[[1, 1]]] * (1 + neighbours)), **options)[0] == alone


# ---- those who leave, stopping, streaming ----------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), memories=st.integers(2, 9))
def test_rows_that_leave_the_batch_change_nothing(seed, memories):
    rows = [[[1, m % 4], [0, 1]] for m in range(memories)]
    together = choose(chain(4, memories, seed), prompts(rows), max_new_tokens=12)
    table = chain(4, memories, seed).table
    for memory, row in enumerate(rows):
        assert choose(Chain(table[memory : memory + 1]), prompts([row]), max_new_tokens=12)[0] == together[memory]


def test_rows_do_leave():
    table = torch.full((4, 3, 3, 3), -9.0)
    table[:3, ..., EOS] = table[3:, ..., 2] = 9.0
    step = Chain(table)
    found = choose(step, prompts([[[1, 1]]] * 4), max_new_tokens=5)
    assert [row[0][0].tokens for row in found] == [(), (), (), (2,) * 5]
    assert step.batch == 1


def test_a_stopping_criterion_of_transformers_stops():
    table = torch.zeros(1, 3, 3, 3)
    table[..., 2] = 9.0
    text = choose(Chain(table), stops=[MaxLengthCriteria(max_length=3)], max_new_tokens=9)[0][0][0]
    assert (text.tokens, text.finished) == ((2, 2, 2), False)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_stop_ends_the_text_with_what_it_heard(beams):
    heard = [lambda said, logits: (said == 1).any(-1)]
    found = choose(chain(5, seed=3), stops=heard, eos=99, max_new_tokens=30, num_beams=beams)[0][0][0]
    assert found.tokens.count(1) == 1
    assert found.tokens[-1] == 1
    assert not found.finished


def test_a_processor_of_transformers_is_a_rule():
    plain = choose(chain(6, seed=2), eos=99, max_new_tokens=12, repetition_penalty=1.7)
    foreign = choose(chain(6, seed=2), eos=99, max_new_tokens=12, rules=[RepetitionPenaltyLogitsProcessor(1.7)])
    assert plain == foreign != choose(chain(6, seed=2), eos=99, max_new_tokens=12)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 4}])
def test_streaming_yields_the_tokens_that_generate_returns(options):
    batch = prompts([[[1, 1], [2, 1]], [[1, 2], [0, 1]], [[3, 3], [2, 2]]])
    whole = choose(chain(4, 3), batch, max_new_tokens=9, **options)
    columns = list(stream(chain(4, 3), *batch, GenerationConfig(max_new_tokens=9, **options), EOS))
    for number, texts in enumerate(texts for row in whole for texts in row):
        heard = [column[number] for column in columns]
        ended = heard.index(EOS) if EOS in heard else len(heard)
        assert tuple(heard[:ended]) == texts[0].tokens
        assert set(heard[ended:]) <= {EOS}


# ---- with the real step ----------------------------------------------------------------------------------------


def test_alone_in_8_in_32_and_shuffled_give_the_same_tokens():
    model, raw, eos = loud_model(), numbers(200), 80
    generator = torch.Generator().manual_seed(1)
    asked = [torch.randint(6, 200, (1 + i % 5,), generator=generator).tolist() for i in range(200)]

    def say(places):
        memory = remember(model, [raw[i] for i in places])
        batch = prompts([[asked[i]] for i in places])
        texts = choose(DecoderStep(model.decoder, memory, 8), batch, eos=eos, max_new_tokens=8)
        return {i: row[0][0] for i, row in zip(places, texts, strict=True)}

    def in_batches(order, size):
        return {i: t for start in range(0, 200, size) for i, t in say(order[start : start + size]).items()}

    order = list(range(200))
    alone = in_batches(order, 1)
    assert len({text.tokens for text in alone.values()}) > 100, "the texts must differ, or equality says nothing"
    for shuffled, size in ((order, 8), (order, 32), (torch.randperm(200, generator=generator).tolist(), 32)):
        found = in_batches(shuffled, size)
        assert sum(found[i].tokens == alone[i].tokens for i in order) == 200
        assert all(found[i].logprobs == pytest.approx(alone[i].logprobs, abs=1e-5) for i in order)
