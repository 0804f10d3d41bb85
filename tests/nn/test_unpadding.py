"""Leaving out padding in the linear layers changes nothing but their cost."""

import pytest
import torch
from decoder_cases import random_decoder, random_memory, random_tokens
from torch import nn

from mmx.nn import transformer, unpadding
from mmx.nn.unpadding import apply_unpadded, unpadded_indices


def lengths_mask(*lengths, longest):
    """bool [N, T], True before each length."""
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


@pytest.fixture
def small_multiple(monkeypatch):
    monkeypatch.setattr(unpadding, "MULTIPLE", 4)


def test_indices_are_the_positions_that_exist_and_padding_up_to_the_multiple(small_multiple):
    mask = lengths_mask(2, 0, 4, longest=5)
    assert unpadded_indices(mask).tolist() == [0, 1, 10, 11, 12, 13, 2, 3]
    mask = lengths_mask(2, 0, 2, longest=5)
    assert unpadded_indices(mask).tolist() == [0, 1, 10, 11]


@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 5, 3), (4, 4, 5)])
def test_all_positions_are_computed_where_there_is_little_padding(small_multiple, lengths):
    assert unpadded_indices(lengths_mask(*lengths, longest=5)) is None


def test_few_texts_are_not_worth_copying():
    assert unpadded_indices(lengths_mask(1, 1, longest=100)) is None
    assert len(unpadded_indices(lengths_mask(1, 1, longest=200))) == 256


def test_a_module_sees_only_the_chosen_positions():
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    x = torch.randn(2, 4, 3)
    indices = torch.tensor([0, 5, 6])
    seen = []
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    found = apply_unpadded(linear, x, indices).flatten(0, 1)
    assert seen == [(3, 3)]
    expected = linear(x).flatten(0, 1)
    torch.testing.assert_close(found[indices], expected[indices])
    assert found[[1, 2, 3, 4, 7]].count_nonzero() == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "rope", "norm": "rms", "glu": True, "bias": False},
        {"norm_placement": "post", "embedding_norm": True, "gate": "tanh"},
        {"num_kv_heads": 2, "positions": "rope"},
        {"cross_attention_positions": "relative"},
    ],
)
@pytest.mark.parametrize("left", [False, True])
def test_states_and_gradients_are_those_with_padding(monkeypatch, small_multiple, options, left):
    decoder = random_decoder(**options).requires_grad_(True)
    layers = len(decoder.config.cross_attention_layers)
    memory = random_memory(layers=layers, masked=1)
    tokens = random_tokens(2, 3, 8)
    mask = lengths_mask(3, 8, 1, 2, 5, 0, longest=8).unflatten(0, (2, 3))
    mask = mask.flip(-1) if left else mask
    num_positions = []
    decoder.layers[0].feed_forward.up.register_forward_pre_hook(
        lambda module, args: num_positions.append(args[0].numel() // args[0].shape[-1])
    )
    results = []
    for replacement in (unpadded_indices, lambda exists: None):
        monkeypatch.setattr(transformer, "unpadded_indices", replacement)
        decoder.zero_grad()
        states = decoder.hidden_states(tokens, memory, mask)[mask]
        states.square().sum().backward()
        results.append([states.detach(), *(p.grad for p in decoder.parameters() if p.grad is not None)])
    assert num_positions == [20, 48]
    assert len(results[0]) == len(results[1]) > 10
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
