"""Attention maps from recorded queries are the weights that the decoder uses; entropy stays within its bounds."""

import math

import pytest
import torch
from decoder_cases import random_decoder, random_memory, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.generation.decode_step import CachedDecodeStep
from mmx.interpret import QueryRecorder, attention_maps
from mmx.interpret.attention_stats import cross_attention_layers, entropy
from mmx.memory import Memory, cat
from mmx.nn.layers import split_heads


def cross_attention_input(decoder, layer, tokens, memory):
    """The hidden states [N, T, E] that enter the query projection of a cross-attention layer, and its module."""
    captured = []
    attention = cross_attention_layers(decoder)[layer].cross_attention
    handle = attention.query.register_forward_hook(lambda module, args, output: captured.append(args[0]))
    decoder(tokens, memory)
    handle.remove()
    return captured[0], attention


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "config",
    [{}, {"num_layers": 4, "cross_attention_every_n_layers": 2, "norm_placement": "post"}],
    ids=["every layer", "every 2nd layer"],
)
def test_maps_are_the_weights_inside_the_decoder(layer, config):
    decoder = random_decoder(**config)
    memory = random_memory(masked=2)
    tokens = random_tokens(2, 3, 4)
    recorder = QueryRecorder()
    assert torch.equal(decoder(tokens, memory), decoder(tokens, memory, recorder=recorder))
    assert recorder.layers == [0, 1]
    maps = attention_maps(recorder, memory, 3, layer)
    assert maps.shape == (2, 3, 4, 2, 5)
    states, attention = cross_attention_input(decoder, layer, tokens, memory)
    queries = split_heads(attention.query(states), 2)  # [B*K, H, T, D]
    for row in range(2):
        for stream in range(3):
            for head in range(2):
                scores = queries[row * 3 + stream, head] @ memory.keys[layer, row, head].T / math.sqrt(8)
                weights = torch.cat([scores[:, :3].softmax(-1), torch.zeros(4, 2)], -1)
                torch.testing.assert_close(maps[row, stream, :, head], weights, atol=1e-6, rtol=0)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 4, 2))


def test_weights_times_values_are_the_output_of_the_attention_kernel():
    """[B, K, T, H, S] @ values is the input of the output projection."""
    decoder = random_decoder()
    memory = random_memory()
    tokens = random_tokens(2, 3, 4)
    recorder = QueryRecorder()
    captured = []
    out = decoder.layers[1].cross_attention.out
    handle = out.register_forward_hook(lambda module, args, output: captured.append(args[0]))
    decoder(tokens, memory, recorder=recorder)
    handle.remove()
    maps = attention_maps(recorder, memory, 3, 1)
    expected = torch.einsum("bkths,bhsd->bkthd", maps, memory.values[1]).flatten(3).flatten(0, 1)
    torch.testing.assert_close(captured[0], expected, atol=1e-6, rtol=0)


def test_cached_steps_record_the_same_as_one_pass():
    decoder = random_decoder()
    memory = random_memory()
    tokens = random_tokens(2, 2, 5)
    stepwise = QueryRecorder()
    whole = QueryRecorder()
    step = CachedDecodeStep(decoder, memory, 4, stepwise)
    step.prefill(tokens[:, :, :2], torch.ones(2, 2, 2, dtype=torch.bool))
    for position in range(2, 5):
        step(tokens[:, :, position].flatten())
    decoder(tokens, memory, recorder=whole)
    for layer in (0, 1):
        one = attention_maps(stepwise, memory, 2, layer)
        other = attention_maps(whole, memory, 2, layer)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_streams_attend_to_their_own_question_and_masked_rows_to_nothing():
    decoder = random_decoder()
    recorder = QueryRecorder()
    questions = random_memory(batch=4, slots=3, source="question").fold_streams(2)
    memory = cat(random_memory(slots=5), questions).mask_out(torch.tensor([[False], [True]]))
    decoder(random_tokens(2, 2, 3), memory, recorder=recorder)
    maps = attention_maps(recorder, memory, 2, 0)
    assert (maps[0, 0, ..., 8:] == 0).all()
    assert (maps[0, 1, ..., 5:8] == 0).all()
    assert (maps[0, 0, ..., :8] > 0).all()
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 3, 2))
    assert (maps[1] == 0).all()


def test_an_empty_memory_gives_maps_without_slots():
    recorder = QueryRecorder()
    memory = Memory.empty(2, 2, 2, 8)
    random_decoder()(random_tokens(2, 2, 3), memory, recorder=recorder)
    assert attention_maps(recorder, memory, 2, 1).shape == (2, 2, 3, 2, 0)


def test_recorded_queries_hold_no_autograd_graph():
    recorder = QueryRecorder()
    random_decoder().requires_grad_(True)(random_tokens(), random_memory(), recorder=recorder)
    assert not recorder.queries(0, 1).requires_grad


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.floats(0, 30), st.integers(0, 2**31))
def test_entropy_is_between_zero_and_that_of_uniform_weights(slots, sharpness, seed):
    weights = (sharpness * torch.randn(3, slots, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    bits = entropy(weights)
    assert bits.shape == (3,)
    assert (bits >= 0).all()
    assert (bits <= math.log2(slots) + 1e-5).all()


def test_entropy_by_hand():
    weights = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0.5, 0.25, 0.25, 0], [0.0] * 4])
    assert entropy(weights).tolist() == [0.0, 1.0, 2.0, 1.5, 0.0]


def test_maps_respect_the_visibility_given_to_the_decoder():
    memory = random_memory()
    visibility = torch.ones(4, 5).tril().bool()
    recorder = QueryRecorder()
    random_decoder()(random_tokens(2, 3, 4), memory, recorder=recorder, visibility=visibility)
    maps = attention_maps(recorder, memory, 3, 0)
    assert maps.masked_select(~visibility[:, None]).eq(0).all()
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 4, 2))
