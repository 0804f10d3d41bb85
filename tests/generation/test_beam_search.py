"""Beam search: equal to trying every text, to greedy with one beam, to transformers, to the decoder's own sums."""

from itertools import product

import pytest
import torch
from generation_cases import Chain, chain, loud_model, numbers, prompts, remember
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from mmx.config.schema import GenerationConfig
from mmx.generation import DecoderStep, generate, score_texts
from mmx.generation.beam_search import beam_search
from mmx.generation.decode_step import UncachedStep
from mmx.memory import Memory, Segment, cat

EOS = 0
ONE = prompts([[[1, 1]]])


def beams(step, batch=ONE, rules=(), eos=EOS, **options):
    with torch.no_grad():
        return generate(step, *batch, GenerationConfig(**options), eos, rules)


def every_text(table, memory, prompt, length, penalty, eos=EOS):
    """(score, tokens, finished) of all texts that end by themselves within `length`, or do not, best first."""
    found = []
    vocabulary = table.shape[-1]
    logprobs = table[memory].log_softmax(-1)
    for size in range(1, length + 1):
        for text in product(range(vocabulary), repeat=size):
            finished = text[-1] == eos
            if eos in text[:-1] or (not finished and size < length):
                continue
            said = [*prompt[-2:], *text]
            total = sum(logprobs[a, b, c].item() for a, b, c in zip(said, said[1:], said[2:]))
            found.append((total / size**penalty, text[:-1] if finished else text, finished))
    return sorted(found, key=lambda text: -text[0])


# ---- against slow and obvious searches ---------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_best_of_all_texts(penalty, seed):
    vocabulary, length, wanted = 3, 4, 10
    step = chain(vocabulary, 2, seed, 1.5)
    rows = [[[1, 1], [2, 1, 2]], [[0, 2], [2, 2]]]
    found = beams(
        step, prompts(rows), max_new_tokens=length, num_beams=81, length_penalty=penalty, num_return_sequences=wanted
    )
    for memory, row in enumerate(rows):
        for prompt, texts in zip(row, found[memory], strict=True):
            expected = every_text(step.table, memory, prompt, length, penalty)
            assert [text.score for text in texts] == pytest.approx([e[0] for e in expected[:wanted]], abs=1e-5)
            of = {e[1:]: e[0] for e in expected}  # by text: two of equal probability may stand in either order
            assert [of.pop((text.tokens, text.finished)) for text in texts] == pytest.approx(
                [text.score for text in texts], abs=1e-5
            )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), vocabulary=st.integers(2, 6), length=st.integers(1, 8), penalty=st.floats(0, 2))
def test_one_beam_is_greedy(seed, vocabulary, length, penalty):
    options = GenerationConfig(max_new_tokens=length, length_penalty=penalty)
    batch = prompts([[[1, 1], [0, 1]], [[1, 0, 1], [1, 1]]])
    one = beam_search(chain(vocabulary, 2, seed), *batch, options, EOS)
    greedy = generate(chain(vocabulary, 2, seed), *batch, options, EOS)
    for (beam,), (choice,) in zip(one, [texts for row in greedy for texts in row], strict=True):
        assert (beam.tokens, beam.finished) == (choice.tokens, choice.finished)
        assert beam.logprobs == choice.logprobs
        assert beam.score == pytest.approx(choice.score, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 5), length=st.integers(1, 7), penalty=st.floats(0, 2))
def test_texts_come_best_first_and_all_differ(seed, n, length, penalty):
    options = {"num_beams": n, "num_return_sequences": n, "max_new_tokens": length, "length_penalty": penalty}
    texts = beams(chain(7, 1, seed), **options)[0][0]
    scores = [text.score for text in texts]
    assert scores == sorted(scores, reverse=True)
    assert len({(text.tokens, text.finished) for text in texts}) == len(texts) == n
    for text in texts:
        assert text.score == pytest.approx(sum(text.logprobs) / len(text.logprobs) ** penalty, abs=1e-5)
        assert len(text.logprobs) == len(text.tokens) + text.finished


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 4), memories=st.integers(1, 4))
def test_a_prompt_does_not_depend_on_its_neighbours(seed, n, memories):
    rows = [[[1, 1], [2, 0, 1], [m % 4, 3]] for m in range(memories)]
    options = {"num_beams": n, "max_new_tokens": 6, "num_return_sequences": n}
    together = beams(chain(4, memories, seed), prompts(rows), **options)
    table = chain(4, memories, seed).table
    for memory, row in enumerate(rows):
        for stream_, prompt in enumerate(row):
            alone = beams(Chain(table[memory : memory + 1]), prompts([[prompt]]), **options)[0][0]
            assert alone == together[memory][stream_]


# ---- edges -------------------------------------------------------------------------------------------------------


def test_one_new_token_costs_no_step():
    step = chain(5)
    texts = beams(step, max_new_tokens=1, num_beams=3, num_return_sequences=3)[0][0]
    best = step.table[0, 1, 1].log_softmax(-1).topk(3)
    assert [text.tokens or (EOS,) for text in texts] == [(i,) for i in best.indices.tolist()]
    assert [text.score for text in texts] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert step.calls == 0


def test_the_end_said_first_wins_where_it_is_likeliest():
    table = torch.zeros(1, 4, 4, 4)
    table[..., EOS] = 9.0
    texts = beams(Chain(table), num_beams=3, max_new_tokens=5, length_penalty=0.0)[0][0]
    assert (texts[0].tokens, texts[0].finished) == ((), True)


@pytest.mark.parametrize("vocab_size", [1, 2])
def test_more_beams_than_there_are_texts(vocabulary):
    texts = beams(chain(vocabulary), prompts([[[0, 0]]]), num_beams=8, num_return_sequences=8, max_new_tokens=2)[0][0]
    expected = [(), (1,), (1, 1)] if vocabulary == 2 else [()]
    assert sorted(text.tokens for text in texts) == expected


def test_a_beam_at_a_dead_end_makes_way_for_the_others():
    """After 2 nothing may follow, not even the end."""
    table = torch.zeros(1, 4, 4, 4)
    table[..., 2], table[..., EOS] = 5.0, -5.0

    def nothing_after_two(said, logits):
        dead = (said[:, -1:] == 2) if said.shape[1] else torch.zeros(len(said), 1, dtype=torch.bool)
        return logits.masked_fill(dead, float("-inf"))

    for text in beams(Chain(table), rules=[nothing_after_two], num_beams=3, max_new_tokens=4, num_return_sequences=3)[
        0
    ][0]:
        assert 2 not in text.tokens[:-1]
        assert text.score > float("-inf")


def test_finished_prompts_wait_for_the_others_unchanged():
    table = chain(4, 2, seed=1).table
    table[0, ..., EOS] = 9.0
    found = beams(Chain(table), prompts([[[1, 1]], [[1, 1]]]), num_beams=2, max_new_tokens=10)
    assert found[0] == beams(Chain(table[:1]), num_beams=2, max_new_tokens=10)[0]


# ---- with the real decoder ---------------------------------------------------------------------------------------

LENGTHS = ((3, 5, 1), (2, 2, 6))


def spoken(model, step, **options):
    generator = torch.Generator().manual_seed(3)
    rows = [[torch.randint(6, 250, (n,), generator=generator).tolist() for n in row] for row in LENGTHS]
    batch = prompts(rows)
    return rows, beams(step, batch, eos=model.tokenizer.eos, max_new_tokens=6, **options)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.7])
def test_scores_are_the_decoders_own_sums(penalty):
    """Two memories, three streams of each, four beams of each stream; each text read again alone, in one pass."""
    model = loud_model()
    with torch.no_grad():
        model.decoder.embedding.weight[model.tokenizer.eos] *= 3
    memory = remember(model, numbers(2))
    options = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": penalty}
    rows, found = spoken(model, DecoderStep(model.decoder, memory, 6), **options)
    read = [(b, k, text) for b, row in enumerate(found) for k, texts in enumerate(row) for text in texts]
    assert len(read) == 24
    for b, k, text in read:
        said = [*text.tokens, *[model.tokenizer.eos] * text.finished]
        whole = [*rows[b][k], *said]
        tokens, target = torch.tensor([[whole[:-1]]]), torch.full((1, 1, len(whole) - 1), -1)
        target[0, 0, -len(said) :] = torch.tensor(said)
        with torch.no_grad():
            total = score_texts(model.decoder, memory.select([b]), tokens, torch.ones_like(tokens).bool(), target)
        assert sum(text.logprobs) == pytest.approx(total.item(), abs=1e-4)
        assert text.score == pytest.approx(total.item() / len(said) ** penalty, abs=1e-4)


def test_cached_beams_equal_uncached_ones():
    model = loud_model()
    memory = remember(model, numbers(2))
    options = {"num_beams": 4, "num_return_sequences": 4}
    _, cached = spoken(model, DecoderStep(model.decoder, memory, 6), **options)
    _, uncached = spoken(model, UncachedStep(model.decoder, memory), **options)
    for a, b in zip(
        (t for r in cached for s in r for t in s), (t for r in uncached for s in r for t in s), strict=True
    ):
        assert (a.tokens, a.finished) == (b.tokens, b.finished)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_beams_of_streams_that_own_slots_look_at_their_own():
    """K questions read by a text encoder stand side by side in one memory: beams of one must not see another's."""
    model = loud_model()
    picture = remember(model, numbers(2))
    asked = remember(model, numbers(6, seed=5)).fold_streams(3)
    rows, together = spoken(model, DecoderStep(model.decoder, cat(picture, asked), 6), num_beams=4)
    for b, row in enumerate(together):
        for k, texts in enumerate(row):
            own = remember(model, numbers(6, seed=5)).select([3 * b + k]).fold_streams(1)
            step = DecoderStep(model.decoder, cat(picture.select([b]), own), 6)
            alone = beams(step, prompts([[rows[b][k]]]), eos=model.tokenizer.eos, max_new_tokens=6, num_beams=4)[0][0]
            assert alone[0].tokens == texts[0].tokens
            assert alone[0].score == pytest.approx(texts[0].score, abs=1e-5)


@pytest.mark.parametrize("n", [2, 5])
def test_memory_is_neither_copied_nor_reordered_for_beams(n, monkeypatch):
    model = loud_model()
    memory = remember(model, numbers(2))
    before = memory.keys.clone(), memory.values.clone(), memory.mask.clone(), memory.nbytes
    places, looked = (memory.keys.data_ptr(), memory.values.data_ptr()), set()
    layer = Memory.layer

    def watched(self, index):
        keys, values = layer(self, index)
        looked.add((keys.data_ptr() - keys.storage_offset() * 4, values.data_ptr() - values.storage_offset() * 4))
        assert keys.shape[0] == 2, "one memory a picture, however many beams"
        return keys, values

    monkeypatch.setattr(Memory, "layer", watched)
    step = DecoderStep(model.decoder, memory, 6)
    spoken(model, step, num_beams=n)
    assert step.memory is memory
    starts = {(m.data_ptr() - m.storage_offset() * 4) for m in (memory.keys, memory.values)}
    assert {place for pair in looked for place in pair} == starts
    assert (memory.keys.data_ptr(), memory.values.data_ptr()) == places
    assert memory.nbytes == before[3]
    assert all(torch.equal(a, b) for a, b in zip(before, (memory.keys, memory.values, memory.mask)))
    assert memory.layout == (Segment("numbers", 0, memory.num_slots),)


# ---- against transformers ----------------------------------------------------------------------------------------


class Foreign:
    """A step over a language model of transformers, without a cache; prompts of equal length."""

    def __init__(self, model):
        self.model = model

    def prefill(self, tokens, mask):
        self.said, self.batch = tokens.flatten(0, 1), len(tokens)
        return self.model(self.said).logits[:, -1]

    def __call__(self, tokens):
        self.said = torch.cat([self.said, tokens[:, None]], 1)
        return self.model(self.said).logits[:, -1]

    def reorder(self, index):
        self.said = self.said[index]

    def keep(self, rows):
        self.said, self.batch = self.said.unflatten(0, (self.batch, -1))[rows].flatten(0, 1), len(rows)


def foreign_model(seed):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=12, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.6)
    return GPT2LMHeadModel(config).eval()


def foreign_texts(model, tokens, eos, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": eos, "pad_token_id": eos, **options}
    with torch.no_grad():
        made = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, tokens.shape[1] :].tolist()
    return [tuple(text[: text.index(eos)] if eos in text else text) for text in made]


def own_texts(model, tokens, eos, rules=(), **options):
    batch = tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.bool)
    found = beams(Foreign(model), batch, eos=eos, rules=rules, max_new_tokens=8, **options)
    return [text.tokens for row in found for texts in row for text in texts]


@pytest.mark.parametrize("seed", range(20))
def test_tokens_equal_those_of_transformers(seed):
    """Greedily, and with 3 to 6 beams under several length penalties, all hypotheses in the same order."""
    model, eos = foreign_model(seed), 5
    tokens = torch.randint(0, 12, (3, 4))
    assert own_texts(model, tokens, eos) == foreign_texts(model, tokens, eos)
    n = 3 + seed % 4
    for penalty in (-0.5, 0.0, 0.6, 1.0, 2.0):
        options = {"num_beams": n, "num_return_sequences": n, "length_penalty": penalty}
        assert own_texts(model, tokens, eos, **options) == foreign_texts(model, tokens, eos, **options)
