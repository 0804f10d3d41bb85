"""The unrolled step against its slow twin, the modules of the decoder: every kind of it, padding, streams, views."""

import gc
import weakref

import pytest
import torch
from decoder_cases import VOCAB_SIZE, random_decoder, random_memory

from mmx.generation import CachedDecodeStep

KINDS = {
    "plain": {},
    "post": {"norm_placement": "post", "embedding_norm": True, "lm_head_transform": True, "lm_head_bias": True},
    "llama": {"norm": "rms", "positions": "rope", "glu": True, "bias": False, "activation": "silu"},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "positions": "rope"},
    "glu": {"gate": "tanh", "cross_attention_every_n_layers": 2},
    "waves": {"positions": "sinusoidal", "embedding_scale": 4.0, "activation": "relu", "tie_word_embeddings": False},
    "no positions": {"positions": "none", "activation": "gelu_tanh"},
}


def memory_for(facts, batch, **changes):
    layers = 1 if facts.get("cross_attention_every_n_layers") == 2 else 2
    return random_memory(batch, layers=layers, heads=facts.get("heads", 2), **changes)


def steps_of(facts, memory):
    decoder = random_decoder(**facts)
    return [CachedDecodeStep(decoder, memory, 8, unrolled=unrolled) for unrolled in (True, False)]


def assert_alike(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [3, 1, 2, 3]], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_scores_are_those_of_the_modules(kind, lengths):
    torch.manual_seed(0)
    memory = memory_for(KINDS[kind], 2, masked=2)
    tokens = torch.randint(VOCAB_SIZE, (2, 2, 3))
    mask = (torch.arange(3) < torch.tensor(lengths)[:, None]).view(2, 2, 3)
    fast, slow = steps_of(KINDS[kind], memory)
    assert fast.unrolled and not slow.unrolled
    assert_alike(fast.prefill(tokens, mask), slow.prefill(tokens, mask))
    for turn in range(6):
        said = torch.randint(VOCAB_SIZE, (4,))
        assert_alike(fast(said), slow(said))
        if turn == 2:
            order = torch.tensor([1, 1, 3, 2])
            fast.reorder(order), slow.reorder(order)


@torch.inference_mode()
def test_what_streams_may_see_and_who_has_left_is_heeded():
    torch.manual_seed(1)
    shown = torch.rand(3, 2, 5) < 0.6
    whole = random_memory(3)
    memory = type(whole)(whole.keys, whole.values, whole.mask, whole.layout, shown)
    fast, slow = steps_of({}, memory)
    tokens, mask = torch.randint(VOCAB_SIZE, (3, 2, 2)), torch.ones(3, 2, 2, dtype=torch.bool)
    assert_alike(fast.prefill(tokens, mask), slow.prefill(tokens, mask))
    said = torch.randint(VOCAB_SIZE, (6,))
    assert_alike(fast(said), slow(said))
    [step.select(torch.tensor([2, 0])) for step in (fast, slow)]
    assert_alike(fast(said[:4]), slow(said[:4]))


@torch.inference_mode()
def test_nothing_to_see_and_one_shared_layer():
    torch.manual_seed(2)
    for memory in (random_memory(2, slots=0), random_memory(2, layers=1)):
        fast, slow = steps_of({}, memory)
        tokens, mask = torch.randint(VOCAB_SIZE, (2, 1, 2)), torch.ones(2, 1, 2, dtype=torch.bool)
        assert_alike(fast.prefill(tokens, mask), slow.prefill(tokens, mask))
        assert_alike(fast(tokens[:, 0, 0]), slow(tokens[:, 0, 0]))


def test_training_and_recording_go_through_the_modules():
    decoder, memory = random_decoder(), random_memory()
    assert not CachedDecodeStep(decoder, memory, 4).unrolled, "gradients are on"
    with torch.no_grad():
        assert CachedDecodeStep(decoder, memory, 4).unrolled
        assert not CachedDecodeStep(decoder, memory, 4, recorder=object()).unrolled
        assert not CachedDecodeStep(decoder.train(), memory, 4).unrolled


@torch.inference_mode()
def test_a_memory_goes_with_the_step_that_looked_at_it():
    """Circles of closures would keep every picture's keys and values until the garbage collector comes by."""
    memory = random_memory()
    keys = weakref.ref(memory.keys)
    step = CachedDecodeStep(random_decoder(), memory, 4)
    step.prefill(torch.zeros(2, 1, 1, dtype=torch.long), torch.ones(2, 1, 1, dtype=torch.bool))
    step(torch.zeros(2, dtype=torch.long))
    gc.disable()
    try:
        del memory, step
        assert keys() is None
    finally:
        gc.enable()
