"""CachedDecodeStep against UncachedDecodeStep: reordering, selected memories, prompts of unequal length."""

import pytest
import torch
from generation_cases import encode_inputs, pad_prompts, random_inputs, varied_model

from mmx.config.schema import GenerationConfig
from mmx.errors import MmxError
from mmx.generation import CachedDecodeStep, generate
from mmx.generation.decode_step import UncachedDecodeStep

CONFIGS = [
    {},
    {"positions": "rope", "norm": "rms", "glu": True},
    {"positions": "sinusoidal", "cross_attention_every_n_layers": 2},
]


def random_prompts(memories, streams, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for lengths in torch.randint(1, 9, (memories, streams), generator=generator).tolist():
        rows.append([torch.randint(6, 262, (length,), generator=generator).tolist() for length in lengths])
    return pad_prompts(rows)


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_cached_logits_equal_uncached_ones_after_reordering_and_selecting(config):
    model = varied_model(**config)
    memories = 6
    streams = 4
    memory = encode_inputs(model, random_inputs(memories))
    batch = random_prompts(memories, streams)
    steps = [CachedDecodeStep(model.decoder, memory, 9), UncachedDecodeStep(model.decoder, memory)]
    generator = torch.Generator().manual_seed(2)
    cached, uncached = (step.prefill(*batch) for step in steps)
    torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=1e-5)
    for position in range(8):
        if position in (2, 5):  # drop two memories and permute the others
            rows = torch.randperm(memories, generator=generator)[: memories - 2]
            memories -= 2
            for step in steps:
                step.select(rows)
        if position % 2:  # streams continue from others of their memory; at position 3 their number doubles
            new_streams = 2 * streams if position == 3 else streams
            index = torch.randint(0, streams, (memories, new_streams), generator=generator)
            index = (torch.arange(memories)[:, None] * streams + index).flatten()
            streams = new_streams
            for step in steps:
                step.reorder(index)
        tokens = torch.randint(6, 262, (memories * streams,), generator=generator)
        cached, uncached = (step(tokens) for step in steps)
        torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=1e-5)
        assert cached.shape == (memories * streams, 262)


def test_cached_texts_equal_uncached_ones_for_200_prompts():
    model = varied_model()
    memory = encode_inputs(model, random_inputs(20))
    batch = random_prompts(20, 10, seed=1)
    found = []
    with torch.no_grad():
        for step in (CachedDecodeStep(model.decoder, memory, 8), UncachedDecodeStep(model.decoder, memory)):
            rows = generate(step, batch, GenerationConfig(max_new_tokens=8), 80)
            found.append([text for row in rows for texts in row for text in texts])
    cached, uncached = found
    assert [text.tokens for text in cached] == [text.tokens for text in uncached]
    assert len(cached) == 200
    assert len({text.tokens for text in cached}) > 50, "texts do not differ enough for a comparison"
    assert 0 < sum(text.finished for text in cached) < 200, "texts must end at different lengths"
    for one, other in zip(cached, uncached, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@torch.no_grad()
def test_padding_of_prompts_changes_no_logits():
    model = varied_model()
    memory = encode_inputs(model, random_inputs(3))
    tokens, mask = random_prompts(3, 2)
    padded_tokens = torch.nn.functional.pad(tokens, (0, 7), value=99)
    padded_mask = torch.nn.functional.pad(mask, (0, 7))
    short = CachedDecodeStep(model.decoder, memory, 3)
    padded = CachedDecodeStep(model.decoder, memory, 3)
    assert torch.allclose(short.prefill(tokens, mask), padded.prefill(padded_tokens, padded_mask), atol=1e-5)
    for _ in range(3):
        token = torch.randint(6, 262, (6,))
        assert torch.allclose(short(token), padded(token), atol=1e-5)


@torch.no_grad()
def test_decoding_does_not_change_the_memory():
    model = varied_model()
    memory = encode_inputs(model, random_inputs(4))
    before = [tensor.clone() for tensor in (memory.keys, memory.values, memory.mask)]
    step = CachedDecodeStep(model.decoder, memory, 4)
    step.prefill(*random_prompts(4, 2))
    step.reorder(torch.tensor([1, 0, 2, 2, 4, 5, 7, 6]))
    step(torch.full((8,), 9))
    assert step.memory is memory
    step.select(torch.tensor([3, 1]))
    step(torch.full((4,), 9))
    assert step.memory.batch_size == 2
    assert memory.batch_size == 4
    for tensor, expected in zip((memory.keys, memory.values, memory.mask), before, strict=True):
        assert torch.equal(tensor, expected)


class ShapeRecorder:
    def __init__(self):
        self.calls = []

    def record(self, layer, queries, inputs):
        self.calls.append((layer, tuple(queries.shape)))


@torch.no_grad()
def test_a_recorder_receives_every_cross_attention_layer_of_every_step():
    model = varied_model()
    recorder = ShapeRecorder()
    memory = encode_inputs(model, random_inputs(2))
    step = CachedDecodeStep(model.decoder, memory, 4, recorder)
    step.prefill(*pad_prompts([[[7, 8, 9], [7]], [[9], [9, 9]]]))
    step(torch.full((4,), 9))
    assert recorder.calls == [(0, (2, 4, 6, 8)), (1, (2, 4, 6, 8)), (0, (2, 4, 2, 8)), (1, (2, 4, 2, 8))]


def test_a_step_without_prompts_is_refused():
    model = varied_model()
    step = CachedDecodeStep(model.decoder, encode_inputs(model, random_inputs(1)), 4)
    with pytest.raises(MmxError) as error:
        step(torch.tensor([7]))
    assert error.value.code == "generation.no_prefill"
