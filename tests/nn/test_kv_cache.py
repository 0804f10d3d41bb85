"""KeyValueCache: what is appended is held, streams may be reordered, multiply and leave; the memory stays as it is."""

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
    """Say `length` tokens in one go; returns what each layer was given."""
    streams = len(cache.mask)
    given_keys, given_values = torch.randn(2, 2, streams, 2, length, 4)
    cache.extend_mask(torch.ones(streams, length, dtype=torch.bool))
    for index in range(2):
        cache.layer(index).append(given_keys[index], given_values[index])
    cache.advance(length)
    return given_keys, given_values


def test_what_is_appended_is_held():
    cache = empty_cache()
    first, second = fill(cache, 3), fill(cache, 1)
    assert cache.length == 4
    for index in range(2):
        newest = torch.randn(2, 3, 2, 1, 4)
        keys, values = cache.layer(index).append(*newest)
        assert torch.equal(keys, torch.cat([first[0][index], second[0][index], newest[0]], 2))
        assert torch.equal(values, torch.cat([first[1][index], second[1][index], newest[1]], 2))
    assert cache.nbytes == 2 * 2 * 3 * 2 * 6 * 4 * 4


def test_the_mask_grows_and_remembers_padding():
    cache = empty_cache(2)
    first = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(cache.extend_mask(first), first)
    cache.advance(3)
    grown = cache.extend_mask(torch.tensor([[True], [False]]))
    assert grown.int().tolist() == [[1, 1, 0, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("more", [1, 2])
def test_more_than_it_has_room_for_is_refused(more):
    """One column too many would be broadcast into no column at all, and be lost without a word."""
    cache = empty_cache(capacity=4)
    fill(cache, 4)
    with pytest.raises(MmxError, match=f"room for 4 positions, not for {4 + more}; allocate a larger capacity"):
        cache.extend_mask(torch.ones(3, more, dtype=torch.bool))


@properties
@given(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.integers(1, 6))
def test_reorder_is_indexing_for_any_number_of_streams(index, length):
    cache = empty_cache()
    fill(cache, length)
    cache.mask[1, 0] = False
    before = [t.clone() for t in (cache.keys, cache.values, cache.mask)]
    cache.reorder(torch.tensor(index))
    assert cache.length == length
    assert cache.keys.shape[1] == cache.values.shape[1] == len(cache.mask) == len(index)
    for place, origin in enumerate(index):
        assert torch.equal(cache.keys[:, place, :, :length], before[0][:, origin, :, :length])
        assert torch.equal(cache.values[:, place, :, :length], before[1][:, origin, :, :length])
        assert torch.equal(cache.mask[place], before[2][origin])


def test_after_a_reorder_the_next_token_goes_on_from_the_new_past():
    cache = empty_cache()
    first = fill(cache, 2)
    cache.reorder(torch.tensor([2, 2, 0, 1]))
    cache.extend_mask(torch.ones(4, 1, dtype=torch.bool))
    newest = torch.randn(2, 4, 2, 1, 4)
    keys, _ = cache.layer(1).append(*newest)
    assert torch.equal(keys, torch.cat([first[0][1][[2, 2, 0, 1]], newest[0]], 2))


def test_a_decoder_goes_on_from_reordered_streams():
    """Grow from 2 to 6 streams, shuffle, shrink to one memory: as if each text had been read anew."""
    decoder, memory = random_decoder(positions="rope"), random_memory(batch=2)
    step = CachedDecodeStep(decoder, memory, capacity=4)
    said = random_tokens(2, 1, 5)
    step.prefill(said, torch.ones_like(said, dtype=torch.bool))
    said = said.flatten(0, 1)
    for index in ([0, 0, 0, 1, 1, 1], [2, 0, 1, 5, 3, 3]):
        step.reorder(torch.tensor(index))
        said = torch.cat([said[index], random_tokens(1, 6, 1)[0]], 1)
        logits = step(said[:, -1])
        anew = decoder(said.view(2, 3, -1), memory)[:, :, -1].flatten(0, 1)
        torch.testing.assert_close(logits, anew, atol=1e-5, rtol=0)
    step.select(torch.tensor([1]))
    said = torch.cat([said[3:], random_tokens(1, 3, 1)[0]], 1)
    anew = decoder(said[None], memory.select([1]))[0, :, -1]
    torch.testing.assert_close(step(said[:, -1]), anew, atol=1e-5, rtol=0)


def test_the_memory_does_not_grow_with_the_beams():
    decoder, memory = random_decoder(), random_memory(batch=2, slots=7)
    held, pointer = memory.nbytes, memory.keys.data_ptr()
    step = CachedDecodeStep(decoder, memory, capacity=3)
    tokens = random_tokens(2, 1, 4)
    step.prefill(tokens, torch.ones_like(tokens, dtype=torch.bool))
    small = step.cache.nbytes
    step.reorder(torch.arange(2).repeat_interleave(8))
    step(torch.zeros(16, dtype=torch.long))
    assert step.memory is memory
    assert (step.memory.nbytes, step.memory.keys.data_ptr()) == (held, pointer)
    assert held == 2 * 2 * 2 * 2 * 7 * 8 * 4
    assert step.cache.nbytes == 8 * small, "only the self-attention cache multiplies"
