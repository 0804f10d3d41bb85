"""The real step against its slow twin, which reads everything again: reordering, leaving, unequal prompts."""

import pytest
import torch
from generation_cases import loud_model, numbers, prompts, remember

from mmx.config.schema import GenerationConfig
from mmx.generation import DecoderStep, generate
from mmx.generation.decode_step import UncachedStep

KINDS = [
    {},
    {"positions": "rope", "norm": "rms", "glu": True},
    {"positions": "sinusoidal", "cross_attention_every_n_layers": 2},
]


def asked(memories, streams, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (memories, streams), generator=generator).tolist()
    return prompts([[torch.randint(6, 262, (n,), generator=generator).tolist() for n in row] for row in lengths])


@pytest.mark.parametrize("kind", KINDS)
def test_cached_scores_equal_uncached_ones_through_reordering_and_leaving(kind):
    model, memories, streams = loud_model(**kind), 6, 4
    memory = remember(model, numbers(memories))
    batch = asked(memories, streams)
    steps = DecoderStep(model.decoder, memory, 9), UncachedStep(model.decoder, memory)
    generator = torch.Generator().manual_seed(2)

    def same(logits):
        assert torch.allclose(*logits, atol=1e-5, rtol=1e-5)
        return logits[0]

    with torch.no_grad():
        logits = same([step.prefill(*batch) for step in steps])
        for turn in range(8):
            if turn in (2, 5):  # two memories leave, and the others change places
                rows = torch.randperm(memories, generator=generator)[: memories - 2]
                memories -= 2
                [step.select(rows) for step in steps]
            if turn % 2:  # streams continue from others of their memory; in turn 3 each becomes two
                index = torch.randint(0, streams, (memories, streams * (2 if turn == 3 else 1)), generator=generator)
                index = (torch.arange(memories)[:, None] * streams + index).flatten()
                streams = len(index) // memories
                [step.reorder(index) for step in steps]
            tokens = torch.randint(6, 262, (memories * streams,), generator=generator)
            logits = same([step(tokens) for step in steps])
            assert logits.shape == (memories * streams, 262)


def test_cached_texts_equal_uncached_ones_for_200_prompts():
    model, memories, streams = loud_model(), 20, 10
    memory, batch = remember(model, numbers(memories)), asked(memories, streams, seed=1)
    options = GenerationConfig(max_new_tokens=8)
    with torch.no_grad():
        cached, uncached = (
            [text for row in generate(step, *batch, options, 80) for texts in row for text in texts]
            for step in (DecoderStep(model.decoder, memory, 8), UncachedStep(model.decoder, memory))
        )
    assert sum(a.tokens == b.tokens for a, b in zip(cached, uncached, strict=True)) == 200
    assert len({text.tokens for text in cached}) > 50, "the texts must differ, or equality says nothing"
    assert 0 < sum(text.finished for text in cached) < 200, "some must end before others"
    for a, b in zip(cached, uncached, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_padding_of_prompts_changes_no_number():
    model = loud_model()
    memory = remember(model, numbers(3))
    tokens, mask = asked(3, 2)
    longer = torch.nn.functional.pad(tokens, (0, 7), value=99), torch.nn.functional.pad(mask, (0, 7))
    with torch.no_grad():
        short, long = DecoderStep(model.decoder, memory, 3), DecoderStep(model.decoder, memory, 3)
        assert torch.allclose(short.prefill(tokens, mask), long.prefill(*longer), atol=1e-5)
        for _ in range(3):
            token = torch.randint(6, 262, (6,))
            assert torch.allclose(short(token), long(token), atol=1e-5)


def test_the_memory_given_is_left_as_it_was():
    model = loud_model()
    memory = remember(model, numbers(4))
    before = memory.keys.clone(), memory.values.clone(), memory.mask.clone()
    step = DecoderStep(model.decoder, memory, 4)
    with torch.no_grad():
        step.prefill(*asked(4, 2))
        step.reorder(torch.tensor([1, 0, 2, 2, 4, 5, 7, 6]))
        step(torch.full((8,), 9))
        assert step.memory is memory
        step.select(torch.tensor([3, 1]))
        step(torch.full((4,), 9))
    assert step.memory.batch_size == 2
    assert memory.batch_size == 4
    assert all(torch.equal(a, b) for a, b in zip(before, (memory.keys, memory.values, memory.mask)))


class Listener:
    def __init__(self):
        self.heard = []

    def note(self, layer, queries, sight):
        self.heard.append((layer, tuple(queries.shape)))


def test_a_recorder_hears_every_looking_layer_of_every_step():
    model, listener = loud_model(), Listener()
    memory = remember(model, numbers(2))
    batch = prompts([[[7, 8, 9], [7]], [[9], [9, 9]]])
    step = DecoderStep(model.decoder, memory, 4, listener)
    with torch.no_grad():
        step.prefill(*batch)
        step(torch.full((4,), 9))
    assert listener.heard == [(0, (2, 4, 6, 8)), (1, (2, 4, 6, 8)), (0, (2, 4, 2, 8)), (1, (2, 4, 2, 8))]
