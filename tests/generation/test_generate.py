"""Greedy decoding and sampling: by hand on tables, by frequency, and independent of the rest of the batch."""

import math

import pytest
import torch
from generation_cases import TableStep, encode_inputs, pad_prompts, random_inputs, random_table_step, varied_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MaxLengthCriteria, RepetitionPenaltyLogitsProcessor

from mmx.config.schema import GenerationConfig
from mmx.generation import CachedDecodeStep, generate, stream

EOS = 0
NO_EOS = 99
MASKED = float("-inf")
ONE_PROMPT = pad_prompts([[[1, 1]]])


def generate_texts(step, prompts=ONE_PROMPT, eos=EOS, logits_processors=(), stopping_criteria=(), **options):
    with torch.no_grad():
        return generate(step, prompts, GenerationConfig(**options), eos, logits_processors, stopping_criteria)


def greedy_by_hand(table, memory, prompt, length, eos=EOS):
    """Tokens and log-probabilities of greedy decoding, one token at a time."""
    tokens = list(prompt)
    logprobs = []
    for _ in range(length):
        row = table[memory, tokens[-2], tokens[-1]].log_softmax(-1).tolist()
        tokens.append(max(range(len(row)), key=row.__getitem__))
        logprobs.append(row[tokens[-1]])
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :], logprobs


# ---- greedy ----------------------------------------------------------------------------------------------------------


def test_greedy_follows_a_known_sequence():
    table = torch.full((1, 4, 4, 4), -5.0)
    for last, following in ((1, 2), (2, 3), (3, EOS)):
        table[:, :, last, following] = 5.0
    text = generate_texts(TableStep(table))[0][0][0]
    assert text.tokens == (2, 3)
    assert text.finished
    logprob = 5.0 - math.log(math.exp(5.0) + 3 * math.exp(-5.0))
    assert text.logprobs == pytest.approx([logprob] * 3, abs=1e-6)
    assert text.score == pytest.approx(logprob, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), vocab_size=st.integers(2, 6), length=st.integers(1, 8), memories=st.integers(1, 5))
def test_greedy_chooses_the_most_probable_token(seed, vocab_size, length, memories):
    step = random_table_step(vocab_size, memories, seed)
    rows = [[[1, 1], [0, 1, 1], [1, 0]] for _ in range(memories)]
    found = generate_texts(step, pad_prompts(rows), max_new_tokens=length, length_penalty=0.5)
    for memory, row in enumerate(rows):
        for prompt, (text,) in zip(row, found[memory], strict=True):
            tokens, logprobs = greedy_by_hand(step.table, memory, prompt, length)
            assert text.finished == (tokens[-1] == EOS)
            assert list(text.tokens) == tokens[: len(tokens) - text.finished]
            assert text.logprobs == pytest.approx(logprobs, abs=1e-5)
            assert text.score == pytest.approx(sum(logprobs) / len(logprobs) ** 0.5, abs=1e-5)


def test_eos_as_first_token_gives_an_empty_text():
    table = torch.zeros(1, 3, 3, 3)
    table[..., EOS] = 9.0
    text = generate_texts(TableStep(table))[0][0][0]
    assert (text.tokens, text.finished, len(text.logprobs)) == ((), True, 1)


@pytest.mark.parametrize(("length", "calls"), [(1, 0), (2, 1), (5, 4)])
def test_no_step_is_computed_after_the_last_token(length, calls):
    table = torch.zeros(1, 3, 3, 3)
    table[..., 2] = 9.0
    step = TableStep(table)
    text = generate_texts(step, max_new_tokens=length)[0][0][0]
    assert text.tokens == (2,) * length
    assert not text.finished
    assert step.calls == calls


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}])
def test_a_text_ends_where_every_token_is_masked(options):
    def mask_all_after_two(generated, logits):
        return torch.full_like(logits, MASKED) if generated.shape[1] >= 2 else logits

    def mask_eos(generated, logits):
        return logits.index_fill(-1, torch.tensor([EOS]), MASKED)

    processors = [mask_eos, mask_all_after_two]
    text = generate_texts(random_table_step(4), logits_processors=processors, max_new_tokens=6, **options)[0][0][0]
    assert len(text.tokens) == 2
    assert EOS not in text.tokens
    assert math.isfinite(text.score)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_a_text_is_empty_where_every_first_token_is_masked(options):
    processors = [lambda generated, logits: torch.full_like(logits, MASKED)]
    texts = generate_texts(random_table_step(4), logits_processors=processors, **options)
    assert texts[0][0][0].tokens == ()


# ---- sampling --------------------------------------------------------------------------------------------------------

FIRST_LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
NUM_SAMPLES = 4000


def sampled_frequencies(**options):
    table = FIRST_LOGITS.expand(1, 5, 5, 5)
    options = {"do_sample": True, "num_return_sequences": NUM_SAMPLES, "max_new_tokens": 1, **options}
    texts = generate_texts(TableStep(table), eos=NO_EOS, **options)[0][0]
    return torch.bincount(torch.tensor([text.tokens[0] for text in texts]), minlength=5) / NUM_SAMPLES


@pytest.mark.parametrize(
    ("options", "kept", "temperature"),
    [
        ({}, 5, 1.0),
        ({"temperature": 0.5}, 5, 0.5),
        ({"temperature": 3.0}, 5, 3.0),
        ({"top_k": 2}, 2, 1.0),
        ({"top_k": 1}, 1, 1.0),
        ({"top_p": 0.8}, 2, 1.0),
        ({"top_p": 0.9}, 3, 1.0),
        ({"top_p": 0.01}, 1, 1.0),
        ({"temperature": 2.0, "top_k": 3}, 3, 2.0),
    ],
)
def test_sampled_frequencies_match_probabilities(options, kept, temperature):
    expected = torch.zeros(5)
    expected[:kept] = (FIRST_LOGITS[:kept] / temperature).softmax(-1)
    frequencies = sampled_frequencies(**options)
    assert (frequencies[kept:] == 0).all(), "a masked token was sampled"
    five_deviations = 5 * (expected * (1 - expected) / NUM_SAMPLES).sqrt()
    assert ((frequencies - expected).abs() <= five_deviations + 1e-9).all()


def sample_tokens(step, prompts, **options):
    rows = generate_texts(step, prompts, eos=NO_EOS, do_sample=True, max_new_tokens=8, **options)
    return [text.tokens for row in rows for texts in row for text in texts]


def test_the_seed_decides_the_text():
    first, again, other = (sample_tokens(random_table_step(6), ONE_PROMPT, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_samples_of_all_streams_differ():
    prompts = pad_prompts([[[1, 1], [1, 1]], [[1, 1], [1, 1]]])
    texts = sample_tokens(TableStep(torch.zeros(2, 9, 9, 9)), prompts, num_return_sequences=5)
    assert len(texts) == len(set(texts)) == 20


def test_samples_are_sorted_by_score():
    step = random_table_step(6)
    texts = generate_texts(step, eos=NO_EOS, do_sample=True, num_return_sequences=20, max_new_tokens=5)[0][0]
    assert [text.score for text in texts] == sorted((text.score for text in texts), reverse=True)
    for text in texts:
        tokens = [1, 1, *text.tokens]
        logprobs = [step.table[0, a, b].log_softmax(-1)[c].item() for a, b, c in zip(tokens, tokens[1:], tokens[2:])]
        assert text.logprobs == pytest.approx(logprobs, abs=1e-5)
        assert text.score == pytest.approx(sum(logprobs) / 5, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), others=st.integers(1, 6), eos=st.integers(2, 5))
def test_a_sample_does_not_depend_on_later_rows_of_the_batch(seed, others, eos):
    """Not on their number, their tokens, or the step at which they leave the batch."""
    options = {"do_sample": True, "seed": seed, "max_new_tokens": 10, "eos": eos, "num_return_sequences": 2}
    table = random_table_step(6, 1, seed, 2.0).table
    alone = generate_texts(TableStep(table), **options)[0]
    table = torch.cat([table, random_table_step(6, others, seed + 1, 2.0).table])
    together = generate_texts(TableStep(table), pad_prompts([[[1, 1]]] * (1 + others)), **options)
    assert together[0] == alone


# ---- finished rows, stopping criteria, streaming ---------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), memories=st.integers(2, 9))
def test_rows_that_leave_the_batch_change_nothing(seed, memories):
    rows = [[[1, memory % 4], [0, 1]] for memory in range(memories)]
    table = random_table_step(4, memories, seed).table
    together = generate_texts(TableStep(table), pad_prompts(rows), max_new_tokens=12)
    for memory, row in enumerate(rows):
        alone = generate_texts(TableStep(table[memory : memory + 1]), pad_prompts([row]), max_new_tokens=12)
        assert alone[0] == together[memory]


def test_finished_rows_leave_the_batch():
    table = torch.full((4, 3, 3, 3), -9.0)
    table[:3, ..., EOS] = 9.0
    table[3:, ..., 2] = 9.0
    step = TableStep(table)
    found = generate_texts(step, pad_prompts([[[1, 1]]] * 4), max_new_tokens=5)
    assert [row[0][0].tokens for row in found] == [(), (), (), (2,) * 5]
    assert step.batch == 1


def test_a_stopping_criterion_of_transformers_ends_the_text():
    table = torch.zeros(1, 3, 3, 3)
    table[..., 2] = 9.0
    criteria = [MaxLengthCriteria(max_length=3)]
    text = generate_texts(TableStep(table), stopping_criteria=criteria, max_new_tokens=9)[0][0][0]
    assert (text.tokens, text.finished) == ((2, 2, 2), False)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_stopping_criterion_ends_the_text_with_the_token_that_meets_it(num_beams):
    criteria = [lambda generated, logits: (generated == 1).any(-1)]
    options = {"stopping_criteria": criteria, "eos": NO_EOS, "max_new_tokens": 30, "num_beams": num_beams}
    text = generate_texts(random_table_step(5, seed=3), **options)[0][0][0]
    assert text.tokens.count(1) == 1
    assert text.tokens[-1] == 1
    assert not text.finished


def test_a_logits_processor_of_transformers_can_be_used():
    options = {"eos": NO_EOS, "max_new_tokens": 12}
    plain = generate_texts(random_table_step(6, seed=2), **options)
    own = generate_texts(random_table_step(6, seed=2), repetition_penalty=1.7, **options)
    processors = [RepetitionPenaltyLogitsProcessor(1.7)]
    foreign = generate_texts(random_table_step(6, seed=2), logits_processors=processors, **options)
    assert own == foreign != plain


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 4}])
def test_streaming_yields_the_generated_tokens(options):
    prompts = pad_prompts([[[1, 1], [2, 1]], [[1, 2], [0, 1]], [[3, 3], [2, 2]]])
    rows = generate_texts(random_table_step(4, 3), prompts, max_new_tokens=9, **options)
    steps = list(stream(random_table_step(4, 3), prompts, GenerationConfig(max_new_tokens=9, **options), EOS))
    for index, texts in enumerate(texts for row in rows for texts in row):
        tokens = [step[index] for step in steps]
        end = tokens.index(EOS) if EOS in tokens else len(tokens)
        assert tuple(tokens[:end]) == texts[0].tokens
        assert set(tokens[end:]) <= {EOS}


# ---- with a decoder --------------------------------------------------------------------------------------------------


def test_batch_size_and_order_do_not_change_the_texts():
    model = varied_model()
    inputs = random_inputs(200)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(6, 200, (1 + i % 5,), generator=generator).tolist() for i in range(200)]

    def texts_of(indices):
        memory = encode_inputs(model, [inputs[i] for i in indices])
        step = CachedDecodeStep(model.decoder, memory, 8)
        rows = generate_texts(step, pad_prompts([[prompts[i]] for i in indices]), eos=80, max_new_tokens=8)
        return {i: row[0][0] for i, row in zip(indices, rows, strict=True)}

    def texts_in_batches(order, batch_size):
        texts = {}
        for start in range(0, 200, batch_size):
            texts |= texts_of(order[start : start + batch_size])
        return texts

    order = list(range(200))
    alone = texts_in_batches(order, 1)
    assert len({text.tokens for text in alone.values()}) > 100, "texts do not differ enough for a comparison"
    shuffled = torch.randperm(200, generator=generator).tolist()
    for indices, batch_size in ((order, 8), (order, 32), (shuffled, 32)):
        found = texts_in_batches(indices, batch_size)
        assert [found[i].tokens for i in order] == [alone[i].tokens for i in order]
        assert all(found[i].logprobs == pytest.approx(alone[i].logprobs, abs=1e-5) for i in order)
