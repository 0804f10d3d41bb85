"""Wait-k masks by hand, by loop, and in a decoder."""

import pytest
import torch
from decoder_cases import random_decoder, random_memory, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.interpret import QueryRecorder, attention_maps
from mmx.memory import Memory
from mmx.nn.relative_position import relative_distances
from mmx.nn.wait_k import wait_k_mask, wait_k_visibility


@pytest.mark.parametrize(
    ("k", "expected"), [(1, ["x...", "xx..", "xxx."]), (2, ["xx..", "xxx.", "xxxx"]), (9, ["xxxx"] * 3)]
)
def test_wait_k_mask_by_hand(k, expected):
    distances = relative_distances(torch.tensor([[0, 1, 2]]), random_memory(1, slots=4))
    mask = wait_k_mask(distances, k)[0, 0]
    rows = [["x" if allowed else "." for allowed in row] for row in mask.tolist()]
    assert ["".join(row) for row in rows] == expected
    assert torch.equal(mask, wait_k_visibility(3, 4, k))


def test_wait_k_mask_of_an_empty_memory():
    distances = relative_distances(torch.zeros(2, 3, dtype=torch.long), Memory.empty(1, 2, 1, 4))
    assert wait_k_mask(distances, 1).shape == (2, 1, 3, 0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 9))
def test_each_position_may_attend_one_more_slot(length, slots, k):
    visibility = wait_k_visibility(length, slots, k)
    assert visibility.sum(-1).tolist() == [min(position + k, slots) for position in range(length)]
    assert (visibility.long().diff(dim=-1) <= 0).all(), "the first slots, without a gap"


def test_wait_k_of_a_decoder_equals_the_visibility():
    wait_k_decoder = random_decoder(wait_k=2)
    plain = random_decoder()
    plain.load_state_dict(wait_k_decoder.state_dict())
    memory = random_memory()
    tokens = random_tokens(2, 2, 4)
    expected = plain(tokens, memory, visibility=wait_k_visibility(4, 5, 2))
    assert torch.equal(wait_k_decoder(tokens, memory), expected)


def test_visibility_and_masked_slots_restrict_wait_k_further():
    decoder = random_decoder(wait_k=2)
    recorder = QueryRecorder()
    masked = torch.tensor([True, False, False, False, False])
    visibility = torch.rand(4, 5) < 0.7
    memory = random_memory(slots=5)
    decoder(random_tokens(2, 1, 4), memory.mask_out(masked), recorder=recorder, visibility=visibility)
    maps = attention_maps(recorder, memory, 1, 0)[:, 0]
    allowed = visibility & wait_k_visibility(4, 5, 2) & ~masked
    assert torch.equal(maps > 0, allowed[None, :, None].expand_as(maps))
