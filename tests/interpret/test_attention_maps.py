"""Attention maps: what the Recorder noted gives the very weights the decoder used; entropy stays within its bounds."""

import math

import pytest
import torch
from decoder_cases import random_decoder, random_memory, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.generation.decode_step import CachedDecodeStep
from mmx.interpret import QueryRecorder, attention_maps
from mmx.interpret.attention_stats import entropy
from mmx.memory import Memory, cat
from mmx.nn.layers import split_heads


def states_that_look(decoder, layer, tokens, memory):
    """What enters each looking layer's queries: the normed states at its cross-attention, [N, T, E]."""
    caught = []
    looks = [block for block in decoder.layers if block.cross_attention is not None]
    handle = looks[layer].cross_attention.query.register_forward_hook(lambda _, given, __: caught.append(given[0]))
    decoder(tokens, memory)
    handle.remove()
    return caught[0], looks[layer].cross_attention


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "facts",
    [{}, {"num_layers": 4, "cross_attention_every_n_layers": 2, "norm_placement": "post"}],
    ids=["each", "every 2nd"],
)
def test_maps_are_the_weights_inside_the_decoder(layer, facts):
    decoder, memory, tokens = random_decoder(**facts), random_memory(masked=2), random_tokens(2, 3, 4)
    recorder = QueryRecorder()
    plain, recorded = decoder(tokens, memory), decoder(tokens, memory, recorder=recorder)
    assert torch.equal(plain, recorded)
    assert recorder.layers == [0, 1]
    maps = attention_maps(recorder, memory, 3, layer)
    assert maps.shape == (2, 3, 4, 2, 5)
    asked, look = states_that_look(decoder, layer, tokens, memory)
    for row in range(2):
        for k in range(3):
            for place in range(4):
                for head in range(2):
                    query = split_heads(look.query(asked), 2)[row * 3 + k, head, place]
                    scores = memory.keys[layer, row, head] @ query / math.sqrt(8)
                    weights = torch.cat([scores[:3].softmax(0), torch.zeros(2)])
                    torch.testing.assert_close(maps[row, k, place, head], weights, atol=1e-6, rtol=0)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 4, 2))


def test_weights_times_values_are_what_came_back():
    """The map of a layer explains the output of its kernel: [B, K, T, H, S] @ values = what enters `out`."""
    decoder, memory, tokens, recorder = random_decoder(), random_memory(), random_tokens(2, 3, 4), QueryRecorder()
    read = []
    look = decoder.layers[1].cross_attention
    handle = look.out.register_forward_hook(lambda _, given, __: read.append(given[0]))
    decoder(tokens, memory, recorder=recorder)
    handle.remove()
    maps = attention_maps(recorder, memory, 3, 1)
    expected = torch.einsum("bkths,bhsd->bkthd", maps, memory.values[1]).flatten(3).flatten(0, 1)
    torch.testing.assert_close(read[0], expected, atol=1e-6, rtol=0)


def test_steps_through_the_cache_record_what_one_pass_does():
    decoder, memory, tokens = random_decoder(), random_memory(), random_tokens(2, 2, 5)
    stepwise, whole = QueryRecorder(), QueryRecorder()
    step = CachedDecodeStep(decoder, memory, 4, stepwise)
    step.prefill(tokens[:, :, :2], torch.ones(2, 2, 2, dtype=torch.bool))
    for place in range(2, 5):
        step(tokens[:, :, place].flatten())
    decoder(tokens, memory, recorder=whole)
    for layer in (0, 1):
        one, other = (attention_maps(r, memory, 2, layer) for r in (stepwise, whole))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_stream_looks_at_no_other_question_and_a_blind_row_at_nothing():
    decoder, tokens, recorder = random_decoder(), random_tokens(2, 2, 3), QueryRecorder()
    questions = random_memory(batch=4, slots=3, source="question").fold_streams(2)
    picture = random_memory(slots=5)
    memory = cat(picture, questions).mask_out(torch.tensor([[False], [True]]))
    decoder(tokens, memory, recorder=recorder)
    maps = attention_maps(recorder, memory, 2, 0)
    assert (maps[0, 0, ..., 8:] == 0).all()
    assert (maps[0, 1, ..., 5:8] == 0).all()
    assert (maps[0, 0, ..., :8] > 0).all()
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 3, 2))
    assert (maps[1] == 0).all()


def test_no_slots_give_maps_without_columns():
    decoder, recorder = random_decoder(), QueryRecorder()
    memory = Memory.empty(2, 2, 2, 8)
    decoder(random_tokens(2, 2, 3), memory, recorder=recorder)
    assert attention_maps(recorder, memory, 2, 1).shape == (2, 2, 3, 2, 0)


def test_what_is_noted_holds_no_graph():
    decoder, memory, recorder = random_decoder().requires_grad_(True), random_memory(), QueryRecorder()
    decoder(random_tokens(), memory, recorder=recorder)
    assert not recorder.queries(0, 1).requires_grad


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.floats(0, 30), st.integers(0, 2**31))
def test_entropy_lies_between_certainty_and_the_plain_average(slots, sharpness, seed):
    weights = (sharpness * torch.randn(3, slots, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    bits = entropy(weights)
    assert bits.shape == (3,)
    assert (bits >= 0).all()
    assert (bits <= math.log2(slots) + 1e-5).all()


def test_entropy_by_hand():
    weights = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0.5, 0.25, 0.25, 0], [0.0] * 4])
    assert entropy(weights).tolist() == [0.0, 1.0, 2.0, 1.5, 0.0]


def test_maps_honour_the_visibility_the_decoder_was_given():
    decoder, memory, tokens = random_decoder(), random_memory(masked=0), random_tokens(2, 3, 4)
    visibility = torch.ones(4, 5).tril().bool()
    recorder = QueryRecorder()
    decoder(tokens, memory, recorder=recorder, visibility=visibility)
    maps = attention_maps(recorder, memory, 3, 0)
    assert maps.masked_select(~visibility[:, None]).eq(0).all()
    assert torch.allclose(maps.sum(-1), torch.ones(2, 3, 4, 2))
