"""FastDecodeStep against its slow reference, the modules of the decoder, for every configuration."""

import gc
import weakref

import pytest
import torch
from decoder_cases import VOCAB_SIZE, random_decoder, random_memory

from mmx.generation import CachedDecodeStep
from mmx.memory import Memory

CONFIGS = {
    "plain": {},
    "post-norm": {"norm_placement": "post", "embedding_norm": True, "lm_head_transform": True, "lm_head_bias": True},
    "llama": {"norm": "rms", "positions": "rope", "glu": True, "bias": False, "activation": "silu"},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "positions": "rope"},
    "gated": {"gate": "tanh", "cross_attention_every_n_layers": 2},
    "sinusoidal": {
        "positions": "sinusoidal",
        "embedding_scale": 4.0,
        "activation": "relu",
        "tie_word_embeddings": False,
    },
    "no positions": {"positions": "none", "activation": "gelu_tanh"},
}


def memory_for(config, batch, **changes):
    layers = 1 if config.get("cross_attention_every_n_layers") == 2 else 2
    return random_memory(batch, layers=layers, heads=config.get("num_heads", 2), **changes)


def fast_and_slow_steps(config, memory):
    decoder = random_decoder(**config)
    return CachedDecodeStep(decoder, memory, 8), CachedDecodeStep(decoder, memory, 8, fast=False)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [3, 1, 2, 3]], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_logits_equal_those_of_the_modules(name, lengths):
    torch.manual_seed(0)
    config = CONFIGS[name]
    fast, slow = fast_and_slow_steps(config, memory_for(config, 2, masked=2))
    assert fast.fast and not slow.fast
    tokens = torch.randint(VOCAB_SIZE, (2, 2, 3))
    mask = (torch.arange(3) < torch.tensor(lengths)[:, None]).view(2, 2, 3)
    assert_close(fast.prefill(tokens, mask), slow.prefill(tokens, mask))
    for position in range(6):
        generated = torch.randint(VOCAB_SIZE, (4,))
        assert_close(fast(generated), slow(generated))
        if position == 2:
            order = torch.tensor([1, 1, 3, 2])
            fast.reorder(order)
            slow.reorder(order)


@torch.inference_mode()
def test_stream_masks_and_selected_memories():
    torch.manual_seed(1)
    plain = random_memory(3)
    memory = Memory(plain.keys, plain.values, plain.mask, plain.layout, torch.rand(3, 2, 5) < 0.6)
    fast, slow = fast_and_slow_steps({}, memory)
    tokens = torch.randint(VOCAB_SIZE, (3, 2, 2))
    mask = torch.ones(3, 2, 2, dtype=torch.bool)
    assert_close(fast.prefill(tokens, mask), slow.prefill(tokens, mask))
    generated = torch.randint(VOCAB_SIZE, (6,))
    assert_close(fast(generated), slow(generated))
    for step in (fast, slow):
        step.select(torch.tensor([2, 0]))
    assert_close(fast(generated[:4]), slow(generated[:4]))


@pytest.mark.parametrize("shape", [{"slots": 0}, {"layers": 1}], ids=["no slots", "tied layers"])
@torch.inference_mode()
def test_empty_memory_and_tied_layers(shape):
    torch.manual_seed(2)
    fast, slow = fast_and_slow_steps({}, random_memory(2, **shape))
    tokens = torch.randint(VOCAB_SIZE, (2, 1, 2))
    mask = torch.ones(2, 1, 2, dtype=torch.bool)
    assert_close(fast.prefill(tokens, mask), slow.prefill(tokens, mask))
    assert_close(fast(tokens[:, 0, 0]), slow(tokens[:, 0, 0]))


def test_gradients_dropout_and_recording_use_the_modules():
    decoder = random_decoder()
    memory = random_memory()
    assert not CachedDecodeStep(decoder, memory, 4).fast, "gradients are enabled"
    with torch.no_grad():
        assert CachedDecodeStep(decoder, memory, 4).fast
        assert not CachedDecodeStep(decoder, memory, 4, recorder=object()).fast
        assert not CachedDecodeStep(decoder.train(), memory, 4).fast


@torch.inference_mode()
def test_a_memory_is_freed_with_its_step():
    """No reference cycle: keys and values are freed without the garbage collector."""
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
