"""Beam search against exhaustive search, greedy decoding, transformers, and the decoder's own log-probabilities."""

from itertools import product

import pytest
import torch
from generation_cases import TableStep, encode_inputs, pad_prompts, random_inputs, random_table_step, varied_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from mmx.config.schema import GenerationConfig
from mmx.generation import CachedDecodeStep, PromptBatch, generate, score_texts
from mmx.generation.beam_search import beam_search
from mmx.generation.decode_step import UncachedDecodeStep
from mmx.memory import Memory, Segment, cat

EOS = 0
ONE_PROMPT = pad_prompts([[[1, 1]]])


def generate_texts(step, prompts=ONE_PROMPT, logits_processors=(), eos=EOS, **options):
    with torch.no_grad():
        return generate(step, prompts, GenerationConfig(**options), eos, logits_processors)


def flatten(rows):
    return [text for row in rows for texts in row for text in texts]


def exhaustive_search(table, memory, prompt, length, penalty, eos=EOS):
    """(score, tokens, finished) of every text that ends within `length` tokens or has `length` tokens, best first."""
    found = []
    logprobs = table[memory].log_softmax(-1)
    for size in range(1, length + 1):
        for text in product(range(table.shape[-1]), repeat=size):
            finished = text[-1] == eos
            if eos in text[:-1] or (not finished and size < length):
                continue
            tokens = [*prompt[-2:], *text]
            total = sum(logprobs[a, b, c].item() for a, b, c in zip(tokens, tokens[1:], tokens[2:]))
            found.append((total / size**penalty, text[:-1] if finished else text, finished))
    return sorted(found, key=lambda text: -text[0])


# ---- against exhaustive and greedy search ----------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_best_of_all_texts(penalty, seed):
    vocab_size = 3
    length = 4
    count = 10
    step = random_table_step(vocab_size, 2, seed, 1.5)
    rows = [[[1, 1], [2, 1, 2]], [[0, 2], [2, 2]]]
    options = {"num_beams": 81, "num_return_sequences": count, "length_penalty": penalty}
    found = generate_texts(step, pad_prompts(rows), max_new_tokens=length, **options)
    for memory, row in enumerate(rows):
        for prompt, texts in zip(row, found[memory], strict=True):
            expected = exhaustive_search(step.table, memory, prompt, length, penalty)
            scores = [text.score for text in texts]
            assert scores == pytest.approx([score for score, _, _ in expected[:count]], abs=1e-5)
            # Looked up by text: texts of equal probability may come in either order.
            score_of = {(tokens, finished): score for score, tokens, finished in expected}
            assert [score_of.pop((text.tokens, text.finished)) for text in texts] == pytest.approx(scores, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), vocab_size=st.integers(2, 6), length=st.integers(1, 8), penalty=st.floats(0, 2))
def test_one_beam_equals_greedy(seed, vocab_size, length, penalty):
    options = GenerationConfig(max_new_tokens=length, length_penalty=penalty)
    prompts = pad_prompts([[[1, 1], [0, 1]], [[1, 0, 1], [1, 1]]])
    one_beam = beam_search(random_table_step(vocab_size, 2, seed), prompts, options, EOS)
    greedy = generate(random_table_step(vocab_size, 2, seed), prompts, options, EOS)
    for (beam,), (text,) in zip(one_beam, [texts for row in greedy for texts in row], strict=True):
        assert (beam.tokens, beam.finished) == (text.tokens, text.finished)
        assert beam.logprobs == text.logprobs
        assert beam.score == pytest.approx(text.score, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 5), length=st.integers(1, 7), penalty=st.floats(0, 2))
def test_texts_are_distinct_and_sorted_by_score(seed, n, length, penalty):
    options = {"num_beams": n, "num_return_sequences": n, "max_new_tokens": length, "length_penalty": penalty}
    texts = generate_texts(random_table_step(7, 1, seed), **options)[0][0]
    scores = [text.score for text in texts]
    assert scores == sorted(scores, reverse=True)
    assert len({(text.tokens, text.finished) for text in texts}) == len(texts) == n
    for text in texts:
        assert text.score == pytest.approx(sum(text.logprobs) / len(text.logprobs) ** penalty, abs=1e-5)
        assert len(text.logprobs) == len(text.tokens) + text.finished


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 4), memories=st.integers(1, 4))
def test_a_prompt_does_not_depend_on_the_rest_of_the_batch(seed, n, memories):
    rows = [[[1, 1], [2, 0, 1], [memory % 4, 3]] for memory in range(memories)]
    options = {"num_beams": n, "max_new_tokens": 6, "num_return_sequences": n}
    table = random_table_step(4, memories, seed).table
    together = generate_texts(TableStep(table), pad_prompts(rows), **options)
    for memory, row in enumerate(rows):
        for k, prompt in enumerate(row):
            step = TableStep(table[memory : memory + 1])
            alone = generate_texts(step, pad_prompts([[prompt]]), **options)[0][0]
            assert alone == together[memory][k]


# ---- edge cases ------------------------------------------------------------------------------------------------------


def test_one_new_token_needs_no_step():
    step = random_table_step(5)
    texts = generate_texts(step, max_new_tokens=1, num_beams=3, num_return_sequences=3)[0][0]
    best = step.table[0, 1, 1].log_softmax(-1).topk(3)
    assert [text.tokens or (EOS,) for text in texts] == [(token,) for token in best.indices.tolist()]
    assert [text.score for text in texts] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert step.calls == 0


def test_an_immediate_end_wins_where_it_is_most_probable():
    table = torch.zeros(1, 4, 4, 4)
    table[..., EOS] = 9.0
    texts = generate_texts(TableStep(table), num_beams=3, max_new_tokens=5, length_penalty=0.0)[0][0]
    assert (texts[0].tokens, texts[0].finished) == ((), True)


@pytest.mark.parametrize(("vocab_size", "expected"), [(1, [()]), (2, [(), (1,), (1, 1)])])
def test_more_beams_than_possible_texts(vocab_size, expected):
    options = {"num_beams": 8, "num_return_sequences": 8, "max_new_tokens": 2}
    texts = generate_texts(random_table_step(vocab_size), pad_prompts([[[0, 0]]]), **options)[0][0]
    assert sorted(text.tokens for text in texts) == expected


def test_a_beam_that_cannot_continue_is_dropped():
    """After token 2 every token is masked, end-of-sequence included."""
    table = torch.zeros(1, 4, 4, 4)
    table[..., 2] = 5.0
    table[..., EOS] = -5.0

    def mask_all_after_two(generated, logits):
        if not generated.shape[1]:
            return logits
        return logits.masked_fill(generated[:, -1:] == 2, float("-inf"))

    options = {"num_beams": 3, "max_new_tokens": 4, "num_return_sequences": 3}
    texts = generate_texts(TableStep(table), logits_processors=[mask_all_after_two], **options)[0][0]
    for text in texts:
        assert 2 not in text.tokens[:-1]
        assert text.score > float("-inf")


def test_finished_prompts_stay_unchanged_while_others_continue():
    table = random_table_step(4, 2, seed=1).table
    table[0, ..., EOS] = 9.0
    options = {"num_beams": 2, "max_new_tokens": 10}
    together = generate_texts(TableStep(table), pad_prompts([[[1, 1]], [[1, 1]]]), **options)
    assert together[0] == generate_texts(TableStep(table[:1]), **options)[0]


# ---- with a decoder --------------------------------------------------------------------------------------------------

LENGTHS = ((3, 5, 1), (2, 2, 6))


@pytest.fixture
def model():
    return varied_model()


def random_prompt_rows():
    generator = torch.Generator().manual_seed(3)
    rows = []
    for lengths in LENGTHS:
        rows.append([torch.randint(6, 250, (length,), generator=generator).tolist() for length in lengths])
    return rows


def generate_with_decoder(model, step, **options):
    prompts = pad_prompts(random_prompt_rows())
    return generate_texts(step, prompts, eos=model.tokenizer.eos_token_id, max_new_tokens=6, **options)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.7])
def test_scores_are_sums_of_the_decoders_logprobs(model, penalty):
    """Two memories, three streams of each, four beams of each stream; each text is scored again alone in one pass."""
    eos = model.tokenizer.eos_token_id
    with torch.no_grad():
        model.decoder.embedding.weight[eos] *= 3
    memory = encode_inputs(model, random_inputs(2))
    options = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": penalty}
    found = generate_with_decoder(model, CachedDecodeStep(model.decoder, memory, 6), **options)
    assert len(flatten(found)) == 24
    prompts = random_prompt_rows()
    for b, row in enumerate(found):
        for k, texts in enumerate(row):
            for text in texts:
                generated = [*text.tokens, *[eos] * text.finished]
                total = score_alone(model, memory.select([b]), prompts[b][k], generated)
                assert sum(text.logprobs) == pytest.approx(total, abs=1e-4)
                assert text.score == pytest.approx(total / len(generated) ** penalty, abs=1e-4)


def score_alone(model, memory, prompt, generated):
    tokens = torch.tensor([[[*prompt, *generated][:-1]]])
    targets = torch.full(tokens.shape, -1)
    targets[0, 0, -len(generated) :] = torch.tensor(generated)
    with torch.no_grad():
        return score_texts(model.decoder, memory, tokens, torch.ones_like(tokens).bool(), targets).item()


def test_cached_beams_equal_uncached_ones(model):
    memory = encode_inputs(model, random_inputs(2))
    options = {"num_beams": 4, "num_return_sequences": 4}
    cached = generate_with_decoder(model, CachedDecodeStep(model.decoder, memory, 6), **options)
    uncached = generate_with_decoder(model, UncachedDecodeStep(model.decoder, memory), **options)
    for one, other in zip(flatten(cached), flatten(uncached), strict=True):
        assert (one.tokens, one.finished) == (other.tokens, other.finished)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_beams_of_a_stream_attend_to_its_own_slots(model):
    """K encoded questions lie next to each other in one memory: beams of one must not attend to another."""
    image = encode_inputs(model, random_inputs(2))
    questions = encode_inputs(model, random_inputs(6, seed=5))
    step = CachedDecodeStep(model.decoder, cat(image, questions.fold_streams(3)), 6)
    together = generate_with_decoder(model, step, num_beams=4)
    options = {"eos": model.tokenizer.eos_token_id, "max_new_tokens": 6, "num_beams": 4}
    for b, row in enumerate(random_prompt_rows()):
        for k, prompt in enumerate(row):
            own = questions.select([3 * b + k]).fold_streams(1)
            step = CachedDecodeStep(model.decoder, cat(image.select([b]), own), 6)
            (alone,) = generate_texts(step, pad_prompts([[prompt]]), **options)[0][0]
            assert alone.tokens == together[b][k][0].tokens
            assert alone.score == pytest.approx(together[b][k][0].score, abs=1e-5)


@pytest.mark.parametrize("num_beams", [2, 5])
def test_the_memory_is_neither_copied_nor_reordered_for_beams(model, num_beams, monkeypatch):
    memory = encode_inputs(model, random_inputs(2))
    tensors = (memory.keys, memory.values, memory.mask)
    before = [tensor.clone() for tensor in tensors]
    pointers = [tensor.data_ptr() for tensor in tensors]
    storages = set()
    original = Memory.layer

    def watched(self, index):
        keys, values = original(self, index)
        storages.update((keys.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()))
        assert len(keys) == 2, "more rows than memories"
        return keys, values

    monkeypatch.setattr(Memory, "layer", watched)
    step = CachedDecodeStep(model.decoder, memory, 6)
    generate_with_decoder(model, step, num_beams=num_beams)
    assert step.memory is memory
    assert storages == {memory.keys.untyped_storage().data_ptr(), memory.values.untyped_storage().data_ptr()}
    assert [tensor.data_ptr() for tensor in tensors] == pointers
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))
    assert memory.layout == (Segment("numbers", 0, memory.num_slots),)


# ---- against transformers --------------------------------------------------------------------------------------------


class HFDecodeStep:
    """A decoding step over a language model of transformers, without a cache; prompts of equal length."""

    def __init__(self, model):
        self.model = model

    def prefill(self, tokens, mask):
        self.tokens = tokens.flatten(0, 1)
        self.batch = len(tokens)
        return self.model(self.tokens).logits[:, -1]

    def __call__(self, tokens):
        self.tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        return self.model(self.tokens).logits[:, -1]

    def reorder(self, index):
        self.tokens = self.tokens[index]

    def select(self, rows):
        self.tokens = self.tokens.unflatten(0, (self.batch, -1))[rows].flatten(0, 1)
        self.batch = len(rows)


def hf_model(seed):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=12, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.6)
    return GPT2LMHeadModel(config).eval()


def hf_texts(model, tokens, eos, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": eos, "pad_token_id": eos, **options}
    with torch.no_grad():
        rows = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, tokens.shape[1] :].tolist()
    return [tuple(row[: row.index(eos)] if eos in row else row) for row in rows]


def mmx_texts(model, tokens, eos, **options):
    prompts = PromptBatch(tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.bool))
    rows = generate_texts(HFDecodeStep(model), prompts, eos=eos, max_new_tokens=8, **options)
    return [text.tokens for text in flatten(rows)]


@pytest.mark.parametrize("seed", range(20))
def test_tokens_equal_those_of_transformers(seed):
    """Greedily, and with 3 to 6 beams under several length penalties: all hypotheses in the same order."""
    model = hf_model(seed)
    eos = 5
    tokens = torch.randint(0, 12, (3, 4))
    assert mmx_texts(model, tokens, eos) == hf_texts(model, tokens, eos)
    n = 3 + seed % 4
    for penalty in (-0.5, 0.0, 0.6, 1.0, 2.0):
        options = {"num_beams": n, "num_return_sequences": n, "length_penalty": penalty}
        assert mmx_texts(model, tokens, eos, **options) == hf_texts(model, tokens, eos, **options)
