"""KVCache: appended tensors are held, streams can be reordered, added and dropped, and the memory never changes."""

import pytest
import torch
from decoder_cases import random_decoder, random_memory, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.errors import MmxError
from mmx.generation.decode_step import CachedDecodeStep
from mmx.nn.kv_cache import KVCache

properties = settings(max_examples=50, deadline=None)


def empty_cache(streams=3, capacity=6):
    return KVCache.allocate(2, streams, 2, capacity, 4, torch.zeros(1))


def fill(cache, length):
    """Append `length` random positions at once; return the keys and values of each layer."""
    streams = len(cache.mask)
    keys, values = torch.randn(2, 2, streams, 2, length, 4)
    cache.extend_mask(torch.ones(streams, length, dtype=torch.bool))
    for index in range(2):
        cache.layer(index).append(keys[index], values[index])
    cache.advance(length)
    return keys, values


def test_appended_keys_and_values_are_returned():
    cache = empty_cache()
    first = fill(cache, 3)
    second = fill(cache, 1)
    assert cache.length == 4
    for index in range(2):
        last = torch.randn(2, 3, 2, 1, 4)
        keys, values = cache.layer(index).append(*last)
        assert torch.equal(keys, torch.cat([first[0][index], second[0][index], last[0]], 2))
        assert torch.equal(values, torch.cat([first[1][index], second[1][index], last[1]], 2))
    assert cache.nbytes == 2 * 2 * 3 * 2 * 6 * 4 * 4


def test_the_mask_grows_and_keeps_padding():
    cache = empty_cache(2)
    first = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(cache.extend_mask(first), first)
    cache.advance(3)
    extended = cache.extend_mask(torch.tensor([[True], [False]]))
    assert extended.int().tolist() == [[1, 1, 0, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("extra", [1, 2])
def test_more_tokens_than_the_capacity_are_refused(extra):
    """One column too many would be broadcast into an empty slice and lost."""
    cache = empty_cache(capacity=4)
    fill(cache, 4)
    with pytest.raises(MmxError) as error:
        cache.extend_mask(torch.ones(3, extra, dtype=torch.bool))
    assert error.value.code == "kv_cache.capacity"
    assert error.value.details == {"capacity": 4, "needed": 4 + extra}


@properties
@given(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.integers(1, 6))
def test_reorder_is_indexing_for_any_number_of_streams(index, length):
    cache = empty_cache()
    fill(cache, length)
    cache.mask[1, 0] = False
    keys = cache.keys.clone()
    values = cache.values.clone()
    mask = cache.mask.clone()
    cache.reorder(torch.tensor(index))
    assert cache.length == length
    assert torch.equal(cache.keys[:, :, :, :length], keys[:, index, :, :length])
    assert torch.equal(cache.values[:, :, :, :length], values[:, index, :, :length])
    assert torch.equal(cache.mask, mask[index])


def test_tokens_after_a_reorder_continue_the_new_past():
    cache = empty_cache()
    past_keys, _ = fill(cache, 2)
    cache.reorder(torch.tensor([2, 2, 0, 1]))
    cache.extend_mask(torch.ones(4, 1, dtype=torch.bool))
    last = torch.randn(2, 4, 2, 1, 4)
    keys, _ = cache.layer(1).append(*last)
    assert torch.equal(keys, torch.cat([past_keys[1][[2, 2, 0, 1]], last[0]], 2))


@torch.no_grad()
def test_a_decoder_continues_reordered_streams():
    """Grow from 2 to 6 streams, permute, drop one memory: logits equal those of a full pass."""
    decoder = random_decoder(positions="rope")
    memory = random_memory(batch=2)
    step = CachedDecodeStep(decoder, memory, capacity=4)
    tokens = random_tokens(2, 1, 5)
    step.prefill(tokens, torch.ones_like(tokens, dtype=torch.bool))
    tokens = tokens.flatten(0, 1)
    for index in ([0, 0, 0, 1, 1, 1], [2, 0, 1, 5, 3, 3]):
        step.reorder(torch.tensor(index))
        tokens = torch.cat([tokens[index], random_tokens(1, 6, 1)[0]], 1)
        expected = decoder(tokens.view(2, 3, -1), memory)[:, :, -1].flatten(0, 1)
        torch.testing.assert_close(step(tokens[:, -1]), expected, atol=1e-5, rtol=0)
    step.select(torch.tensor([1]))
    tokens = torch.cat([tokens[3:], random_tokens(1, 3, 1)[0]], 1)
    expected = decoder(tokens[None], memory.select([1]))[0, :, -1]
    torch.testing.assert_close(step(tokens[:, -1]), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_memory_does_not_grow_with_the_number_of_beams():
    decoder = random_decoder()
    memory = random_memory(batch=2, slots=7)
    pointer = memory.keys.data_ptr()
    step = CachedDecodeStep(decoder, memory, capacity=3)
    step.prefill(torch.zeros(2, 1, 2, dtype=torch.long), torch.ones(2, 1, 2, dtype=torch.bool))
    nbytes = step.cache.nbytes
    step.reorder(torch.arange(2).repeat_interleave(8))
    step(torch.zeros(16, dtype=torch.long))
    assert step.memory is memory
    assert memory.keys.data_ptr() == pointer
    assert memory.nbytes == 2 * 2 * 2 * 2 * 7 * 8 * 4
    assert step.cache.nbytes == 8 * nbytes
