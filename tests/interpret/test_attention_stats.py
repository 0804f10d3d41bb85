"""Attention statistics: entropy, sinks and gates by hand and as properties, and queries that match no key."""

import math

import pytest
import torch
from decoder_cases import random_decoder, random_memory, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.interpret.attention_maps import attention_for_tokens
from mmx.interpret.attention_stats import (
    SINK_THRESHOLD,
    UNIFORM_THRESHOLD,
    attention_sink_mass,
    cross_attention_layers,
    entropy,
    gate_values,
    is_uniform,
    normalized_entropy,
)
from mmx.nn.attention import attention, attention_weights

properties = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31)


def random_weights(slots, seed, sharpness=3.0, rows=4):
    """Random attention weights, [rows, S]."""
    return (sharpness * torch.randn(rows, slots, generator=torch.Generator().manual_seed(seed))).softmax(-1)


# ---- entropy ---------------------------------------------------------------------------------------------------------


def test_normalized_entropy_by_hand():
    weights = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0.5, 0.25, 0.25, 0], [0.0] * 4])
    assert normalized_entropy(weights).tolist() == [0.0, 0.5, 1.0, 0.75, 0.0]
    visible = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4, [True, True, True, False], [False] * 4])
    expected = [0.0, 1.0, 1.0, 1.5 / math.log2(3), 0.0]
    assert normalized_entropy(weights, visible).tolist() == pytest.approx(expected, abs=1e-6)
    assert is_uniform(weights, visible).tolist() == [False, True, True, False, False]
    assert is_uniform(weights).tolist() == [False, False, True, False, False]


def test_one_visible_slot_is_not_uniform_attention():
    assert normalized_entropy(torch.ones(3, 1)).tolist() == [0.0] * 3
    assert not is_uniform(torch.ones(3, 1)).any()
    one = torch.tensor([True, False, False])
    assert normalized_entropy(torch.tensor([[1.0, 0.0, 0.0]]), one).tolist() == [0.0]


def test_no_slots():
    assert entropy(torch.zeros(2, 0)).tolist() == [0.0, 0.0]
    nothing = torch.zeros(2, 0, dtype=torch.bool)
    assert normalized_entropy(torch.zeros(2, 0), nothing).tolist() == [0.0, 0.0]
    assert is_uniform(torch.zeros(2, 0), nothing).tolist() == [False, False]


@properties
@given(st.integers(2, 12), st.floats(0, 20), seeds)
def test_entropy_equals_a_loop_and_is_independent_of_the_order(slots, sharpness, seed):
    weights = random_weights(slots, seed, sharpness)
    expected = [-sum(p * math.log2(p) for p in row if p > 0) for row in weights.double().tolist()]
    assert entropy(weights).tolist() == pytest.approx(expected, abs=1e-5)
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(entropy(weights[:, order]), entropy(weights), atol=1e-5)
    normalized = normalized_entropy(weights)
    assert (normalized >= 0).all()
    assert (normalized <= 1 + 1e-5).all()
    assert normalized.tolist() == pytest.approx([bits / math.log2(slots) for bits in expected], abs=1e-5)


@properties
@given(st.integers(2, 8), st.integers(0, 8), seeds)
def test_masked_slots_change_nothing(slots, masked, seed):
    weights = random_weights(slots, seed)
    padded = torch.cat([weights, torch.zeros(len(weights), masked)], -1)
    visible = torch.arange(slots + masked) < slots
    assert torch.allclose(normalized_entropy(padded, visible), normalized_entropy(weights), atol=1e-6)
    assert torch.equal(is_uniform(padded, visible), is_uniform(weights))


@properties
@given(st.integers(2, 40))
def test_equal_weights_are_uniform_and_those_on_half_of_the_slots_are_not(slots):
    assert is_uniform(torch.full((slots,), 1 / slots))
    half = torch.zeros(2 * slots)
    half[:slots] = 1 / slots
    assert not is_uniform(half)
    assert normalized_entropy(half).item() == pytest.approx(math.log2(slots) / math.log2(2 * slots), abs=1e-5)
    assert 0.9 < UNIFORM_THRESHOLD < 1


# ---- queries that match no key ---------------------------------------------------------------------------------------


def orthogonal_queries(slots, width):
    """Keys without a last component, and queries with nothing else: every score is exactly zero."""
    queries = torch.zeros(1, 1, 3, width)
    queries[..., -1] = torch.tensor([0.3, -5.0, 1e3])
    keys = torch.randn(1, 1, slots, width)
    keys[..., -1] = 0.0
    return queries, keys


def zero_queries(slots, width):
    return torch.zeros(1, 1, 3, width), torch.randn(1, 1, slots, width)


def identical_keys(slots, width):
    """Scores are large and equal."""
    return 3 * torch.randn(1, 1, 3, width), torch.randn(1, 1, 1, width).expand(1, 1, slots, width).contiguous()


UNIFORM_CASES = {
    "zero queries": zero_queries,
    "orthogonal queries": orthogonal_queries,
    "identical keys": identical_keys,
}


@pytest.mark.parametrize("kind", UNIFORM_CASES)
@properties
@given(slots=st.integers(2, 40), width=st.integers(2, 16), masked=st.integers(0, 3), seed=seeds)
def test_a_query_that_matches_no_key_gets_the_mean_of_the_visible_values(kind, slots, width, masked, seed):
    torch.manual_seed(seed)
    queries, keys = UNIFORM_CASES[kind](slots + masked, width)
    values = torch.randn(1, 1, slots + masked, width)
    visible = torch.arange(slots + masked) < slots
    mask = visible.view(1, 1, 1, -1) if masked else None
    weights = attention_weights(queries, keys, mask)
    # A matrix product may sum equal columns in different orders.
    tolerance = 1e-7 if kind != "identical keys" else 1e-6
    assert float((weights[..., :slots] - 1 / slots).abs().max()) <= tolerance
    assert (weights[..., slots:] == 0).all()
    mean = values[:, :, :slots].mean(2, keepdim=True).expand(-1, -1, 3, -1)
    torch.testing.assert_close(attention(queries, keys, values, mask), mean, atol=2e-6, rtol=0)
    assert is_uniform(weights, visible).all()
    assert entropy(weights).flatten().tolist() == pytest.approx([math.log2(slots)] * 3, abs=1e-5)


@pytest.mark.parametrize("kind", ["zero queries", "orthogonal queries"])
@pytest.mark.parametrize("slots", [1, 2, 4, 8, 64])
def test_weights_are_exact_for_powers_of_two(kind, slots):
    queries, keys = UNIFORM_CASES[kind](slots, 8)
    assert torch.equal(attention_weights(queries, keys), torch.full((1, 1, 3, slots), 1 / slots))


def test_a_query_that_matches_a_key_is_not_uniform():
    keys = torch.eye(8)[None, None]
    weights = attention_weights(10 * keys[..., :3, :], keys)
    assert weights.argmax(-1).flatten().tolist() == [0, 1, 2]
    assert not is_uniform(weights).any()


def test_a_decoder_with_zero_queries_attends_uniformly():
    decoder = random_decoder()
    memory = random_memory(masked=1)
    query = decoder.layers[0].cross_attention.query
    query.weight.zero_()
    query.bias.zero_()
    maps = attention_for_tokens(decoder, memory, random_tokens(2, 2, 3))  # [B, K, T, L, H, S]
    visible = memory.mask[:, None, None, None, None]
    assert is_uniform(maps, visible)[..., 0, :].all()
    assert not is_uniform(maps, visible)[..., 1, :].all()
    assert float((maps[..., 0, :, :4] - 0.25).abs().max()) == 0.0


# ---- sinks -----------------------------------------------------------------------------------------------------------


def test_sink_mass_by_hand():
    """Two heads over two positions: slot 0 is a sink of the first head; the second has none."""
    weights = torch.tensor([[[0.8, 0.1, 0.1, 0.0], [0.5, 0.0, 0.5, 0.0]], [[0.6, 0.2, 0.1, 0.1], [0.0, 0.5, 0.0, 0.5]]])
    assert attention_sink_mass(weights).tolist() == pytest.approx([0.7, 0.0])
    two = torch.tensor([[[0.5, 0.45, 0.05]], [[0.4, 0.55, 0.05]]])
    assert attention_sink_mass(two).tolist() == pytest.approx([0.95])
    assert attention_sink_mass(torch.zeros(3, 2, 4)).tolist() == [0.0, 0.0]


@properties
@given(st.integers(1, 6), st.integers(1, 10), st.floats(0, 10), seeds)
def test_sink_mass_equals_a_loop(words, slots, sharpness, seed):
    weights = random_weights(slots, seed, sharpness, words * 2).unflatten(0, (words, 2))
    for head, found in enumerate(attention_sink_mass(weights).tolist()):
        average = [sum(float(weights[t, head, s]) for t in range(words)) / words for s in range(slots)]
        if all(abs(mass - SINK_THRESHOLD) > 1e-5 for mass in average):
            assert found == pytest.approx(sum(mass for mass in average if mass > SINK_THRESHOLD), abs=1e-5)
        assert 0 <= found <= 1 + 1e-5


@properties
@given(st.integers(4, 20), st.integers(1, 6))
def test_uniform_attention_over_four_or_more_slots_has_no_sink(slots, words):
    assert attention_sink_mass(torch.full((words, 3, slots), 1 / slots)).tolist() == [0.0] * 3


# ---- gates -----------------------------------------------------------------------------------------------------------


def test_gate_values_are_tanh_of_alpha():
    decoder = random_decoder(gate="tanh", num_layers=4, cross_attention_every_n_layers=2)
    layers = cross_attention_layers(decoder)
    assert len(layers) == 2
    for layer, alpha in zip(layers, (0.0, -2.0), strict=True):
        layer.cross_residual.gate.alpha.fill_(alpha)
    assert gate_values(decoder) == pytest.approx([0.0, math.tanh(-2.0)])


def test_a_decoder_without_gates():
    assert gate_values(random_decoder()) == [None, None]


def test_behind_a_closed_gate_attention_differs_but_logits_do_not():
    decoder = random_decoder(gate="tanh")
    tokens = random_tokens(2, 1, 3)
    one = random_memory()
    other = random_memory()
    for layer in decoder.layers:
        layer.cross_residual.gate.alpha.zero_()
    assert gate_values(decoder) == [0.0, 0.0]
    assert torch.equal(decoder(tokens, one), decoder(tokens, other))
    assert not torch.equal(attention_for_tokens(decoder, one, tokens), attention_for_tokens(decoder, other, tokens))
