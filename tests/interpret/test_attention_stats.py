"""The spotlight in numbers: entropy, sinks and gates by hand and as properties; and the query that finds nothing."""

import math

import pytest
import torch
from decoder_cases import random_decoder, random_memory, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.interpret.attention_maps import attention_for_tokens
from mmx.interpret.attention_stats import (
    SINK,
    UNIFORM,
    attention_sink_mass,
    entropy,
    gate_values,
    is_uniform,
    relative_entropy,
)
from mmx.nn.attention import attention, attention_weights

properties = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31)


def drawn(slots, seed, sharpness=3.0, rows=4):
    """Random spotlights, [rows, S]."""
    return (sharpness * torch.randn(rows, slots, generator=torch.Generator().manual_seed(seed))).softmax(-1)


# ---- entropy ---------------------------------------------------------------------------------------------------------


def test_relative_entropy_by_hand():
    weights = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0.5, 0.25, 0.25, 0], [0.0] * 4])
    assert relative_entropy(weights).tolist() == [0.0, 0.5, 1.0, 0.75, 0.0]
    seen = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4, [True, True, True, False], [False] * 4])
    expected = [0.0, 1.0, 1.0, 1.5 / math.log2(3), 0.0]
    assert relative_entropy(weights, seen).tolist() == pytest.approx(expected, abs=1e-6)
    assert is_uniform(weights, seen).tolist() == [False, True, True, False, False]
    assert is_uniform(weights).tolist() == [False, False, True, False, False]


def test_one_slot_in_view_is_no_plain_average():
    """There was nothing to choose from: certain, and not lost."""
    assert relative_entropy(torch.ones(3, 1)).tolist() == [0.0] * 3
    assert not is_uniform(torch.ones(3, 1)).any()
    one = torch.tensor([True, False, False])
    assert relative_entropy(torch.tensor([[1.0, 0.0, 0.0]]), one).tolist() == [0.0]


def test_no_slots():
    assert entropy(torch.zeros(2, 0)).tolist() == [0.0, 0.0]
    nothing = torch.zeros(2, 0, dtype=torch.bool)
    assert relative_entropy(torch.zeros(2, 0), nothing).tolist() == [0.0, 0.0]
    assert is_uniform(torch.zeros(2, 0), nothing).tolist() == [False, False]


@properties
@given(st.integers(2, 12), st.floats(0, 20), seeds)
def test_entropy_is_that_of_a_loop_and_of_any_order(slots, sharpness, seed):
    weights = drawn(slots, seed, sharpness)
    expected = [-sum(p * math.log2(p) for p in row if p > 0) for row in weights.double().tolist()]
    assert entropy(weights).tolist() == pytest.approx(expected, abs=1e-5)
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(entropy(weights[:, order]), entropy(weights), atol=1e-5)
    share = relative_entropy(weights)
    assert (share >= 0).all() and (share <= 1 + 1e-5).all()
    assert share.tolist() == pytest.approx([bits / math.log2(slots) for bits in expected], abs=1e-5)


@properties
@given(st.integers(2, 8), st.integers(0, 8), seeds)
def test_slots_out_of_view_change_nothing(slots, hidden, seed):
    weights = drawn(slots, seed)
    padded = torch.cat([weights, torch.zeros(len(weights), hidden)], -1)
    seen = torch.arange(slots + hidden) < slots
    assert torch.allclose(relative_entropy(padded, seen), relative_entropy(weights), atol=1e-6)
    assert torch.equal(is_uniform(padded, seen), is_uniform(weights))


@properties
@given(st.integers(2, 40))
def test_the_plain_average_is_uniform_and_half_of_the_slots_is_not(slots):
    assert is_uniform(torch.full((slots,), 1 / slots))
    half = torch.zeros(2 * slots)
    half[:slots] = 1 / slots
    assert not is_uniform(half)
    assert relative_entropy(half).item() == pytest.approx(math.log2(slots) / math.log2(2 * slots), abs=1e-5)
    assert 0.9 < UNIFORM < 1


# ---- the query that finds nothing ------------------------------------------------------------------------------------


def orthogonal(slots, width):
    """Keys that vary in all but the last axis, and a query along the last: each score is exactly nought."""
    queries, keys = torch.zeros(1, 1, 3, width), torch.randn(1, 1, slots, width)
    queries[..., -1], keys[..., -1] = torch.tensor([0.3, -5.0, 1e3]), 0.0
    return queries, keys


def zero(slots, width):
    return torch.zeros(1, 1, 3, width), torch.randn(1, 1, slots, width)


def identical(slots, width):
    """Any query, and one key for all: scores are large, and all alike."""
    return 3 * torch.randn(1, 1, 3, width), torch.randn(1, 1, 1, width).expand(1, 1, slots, width).contiguous()


LOST = {"zero queries": zero, "orthogonal queries": orthogonal, "identical keys": identical}


@pytest.mark.parametrize("kind", LOST)
@properties
@given(slots=st.integers(2, 40), width=st.integers(2, 16), hidden=st.integers(0, 3), seed=seeds)
def test_a_query_that_finds_nothing_reads_the_plain_average(kind, slots, width, hidden, seed):
    """Each weight is 1 / S, and what comes back is the mean of the values in view; with masks, of those that exist."""
    torch.manual_seed(seed)
    (queries, keys), values = LOST[kind](slots + hidden, width), torch.randn(1, 1, slots + hidden, width)
    seen = torch.arange(slots + hidden) < slots
    mask = seen.view(1, 1, 1, -1) if hidden else None
    weights = attention_weights(queries, keys, mask)
    close = 1e-7 if kind != "identical keys" else 1e-6  # a product of matrices may sum equal columns in two orders
    assert float((weights[..., :slots] - 1 / slots).abs().max()) <= close
    assert (weights[..., slots:] == 0).all()
    mean = values[:, :, :slots].mean(2, keepdim=True).expand(-1, -1, 3, -1)
    torch.testing.assert_close(attention(queries, keys, values, mask), mean, atol=2e-6, rtol=0)
    assert is_uniform(weights, seen).all()
    assert entropy(weights).flatten().tolist() == pytest.approx([math.log2(slots)] * 3, abs=1e-5)


@pytest.mark.parametrize("kind", ["zero queries", "orthogonal queries"])
@pytest.mark.parametrize("slots", [1, 2, 4, 8, 64])
def test_where_division_does_not_round_the_average_is_exact(kind, slots):
    queries, keys = LOST[kind](slots, 8)
    assert torch.equal(attention_weights(queries, keys), torch.full((1, 1, 3, slots), 1 / slots))


def test_a_query_that_finds_something_is_not_flagged():
    keys = torch.eye(8)[None, None]
    weights = attention_weights(10 * keys[..., :3, :], keys)
    assert weights.argmax(-1).flatten().tolist() == [0, 1, 2]
    assert not is_uniform(weights).any()


def test_a_decoder_whose_queries_are_nought_looks_at_the_plain_average():
    decoder, memory, tokens = random_decoder(), random_memory(masked=1), random_tokens(2, 2, 3)
    look = decoder.layers[0].cross_attention
    look.query.weight.zero_(), look.query.bias.zero_()
    maps = attention_for_tokens(decoder, memory, tokens)  # [B, K, T, L, H, S]
    seen = memory.mask[:, None, None, None, None]
    assert is_uniform(maps, seen)[..., 0, :].all()
    assert not is_uniform(maps, seen)[..., 1, :].all()
    assert float((maps[..., 0, :, :4] - 0.25).abs().max()) == 0.0


# ---- sinks -----------------------------------------------------------------------------------------------------------


def test_sink_mass_by_hand():
    """Of two heads over two words: the first holds slot 0 throughout, the second wanders."""
    weights = torch.tensor([[[0.8, 0.1, 0.1, 0.0], [0.5, 0.0, 0.5, 0.0]], [[0.6, 0.2, 0.1, 0.1], [0.0, 0.5, 0.0, 0.5]]])
    assert attention_sink_mass(weights).tolist() == pytest.approx([0.7, 0.0])
    two = torch.tensor([[[0.5, 0.45, 0.05]], [[0.4, 0.55, 0.05]]])
    assert attention_sink_mass(two).tolist() == pytest.approx([0.95])
    assert attention_sink_mass(torch.zeros(3, 2, 4)).tolist() == [0.0, 0.0]


@properties
@given(st.integers(1, 6), st.integers(1, 10), st.floats(0, 10), seeds)
def test_sink_mass_is_that_of_a_loop(words, slots, sharpness, seed):
    weights = drawn(slots, seed, sharpness, words * 2).unflatten(0, (words, 2))
    for head, found in enumerate(attention_sink_mass(weights).tolist()):
        average = [sum(float(weights[t, head, s]) for t in range(words)) / words for s in range(slots)]
        if all(abs(held - SINK) > 1e-5 for held in average):
            assert found == pytest.approx(sum(held for held in average if held > SINK), abs=1e-5)
        assert 0 <= found <= 1 + 1e-5


@properties
@given(st.integers(4, 20), st.integers(1, 6))
def test_the_plain_average_of_four_slots_or_more_has_no_sink(slots, words):
    assert attention_sink_mass(torch.full((words, 3, slots), 1 / slots)).tolist() == [0.0] * 3


# ---- gates -----------------------------------------------------------------------------------------------------------


def test_gates_by_hand():
    decoder = random_decoder(gate="tanh", layers=4, cross_every=2)
    looks = [block for block in decoder.layers if block.cross_attention is not None]
    assert len(looks) == 2
    for block, opening in zip(looks, (0.0, -2.0)):
        block.cross_residual.gate.alpha.fill_(opening)
    assert gate_values(decoder) == pytest.approx([0.0, math.tanh(-2.0)])


def test_a_decoder_without_gates_has_none():
    assert gate_values(random_decoder()) == [None, None]


def test_a_shut_gate_lets_nothing_through_and_the_spotlight_shines_all_the_same():
    """Weights say where it looked; gates say whether that came to anything."""
    decoder, tokens = random_decoder(gate="tanh"), random_tokens(2, 1, 3)
    one, other = random_memory(), random_memory()
    for block in decoder.layers:
        block.cross_residual.gate.alpha.zero_()
    assert gate_values(decoder) == [0.0, 0.0]
    assert torch.equal(decoder(tokens, one), decoder(tokens, other))
    assert not torch.equal(attention_for_tokens(decoder, one, tokens), attention_for_tokens(decoder, other, tokens))
