"""TextDecoder: cached decoding, causality, padding, streams, visibility, and parity with PyTorch's transformer."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from decoder_cases import VOCAB_SIZE, random_decoder, random_memory, random_tokens, randomize_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmx.config.schema import DecoderConfig, ProjectionConfig
from mmx.errors import MmxError
from mmx.memory import Memory, Segment, cat
from mmx.models.decoder import TextDecoder
from mmx.models.projection import KeyValueProjection
from mmx.nn.cross_attention import CrossAttentionInputs
from mmx.nn.features import Features
from mmx.nn.prepack import MIN_NUMEL
from mmx.nn.transformer import DecoderLayer

properties = settings(max_examples=50, deadline=None)

CHOICES = {
    "positions": ["learned", "sinusoidal", "rope", "none"],
    "norm_placement": ["pre", "post"],
    "gate": ["none", "tanh"],
    "cross_attention_every_n_layers": [1, 2],
    "glu": [False, True],
    "tie_word_embeddings": [True, False],
    "embedding_norm": [False, True],
    "lm_head_transform": [False, True],
    "norm": ["layer", "rms"],
    "bias": [True, False],
    "lm_head_bias": [False, True],
}
FIRST = ["positions", "norm_placement", "gate", "cross_attention_every_n_layers"]


def combinations():
    """Every combination of the first four options; the others vary so that each value meets each of those."""
    others = [name for name in CHOICES if name not in FIRST]
    for number, chosen in enumerate(product(*(CHOICES[name] for name in FIRST))):
        bits = number * 37 + number // 4
        varied = {name: CHOICES[name][bits >> i & 1] for i, name in enumerate(others)}
        yield dict(zip(FIRST, chosen)) | varied


any_config = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()})


def memory_layers(decoder):
    return len(decoder.config.cross_attention_layers)


def pad(tokens, mask, left, right):
    """Add masked random tokens on both sides."""
    padding = [torch.randint(VOCAB_SIZE, (*tokens.shape[:2], n)) for n in (left, right)]
    masked = [torch.zeros_like(part, dtype=torch.bool) for part in padding]
    return torch.cat([padding[0], tokens, padding[1]], -1), torch.cat([masked[0], mask, masked[1]], -1)


# ---- cache -----------------------------------------------------------------------------------------------------


def check_cache(config):
    decoder = random_decoder(**config)
    memory, tokens = random_memory(layers=memory_layers(decoder), masked=1), random_tokens(2, 2, 6)
    uncached = decoder(tokens, memory)
    cache = decoder.new_cache(4, 6)
    cached = [decoder(part, memory, cache=cache) for part in tokens.split([3, 1, 1, 1], -1)]
    assert cache.length == 6
    torch.testing.assert_close(torch.cat(cached, 2), uncached, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", combinations(), ids=lambda config: "-".join(str(config[name]) for name in FIRST))
def test_cached_decoding_equals_one_pass(config):
    check_cache(config)


@properties
@given(any_config, st.integers(0, 2**31))
def test_cached_decoding_equals_one_pass_for_any_decoder(config, seed):
    torch.manual_seed(seed)
    check_cache(config)


@pytest.mark.parametrize("positions", CHOICES["positions"])
def test_prompts_of_different_lengths_continue_in_one_cache(positions):
    """Prompts of 2 and 5 tokens, padded on the right, then two more tokens each: equal to decoding each alone."""
    decoder, memory, tokens = random_decoder(positions=positions), random_memory(), random_tokens(2, 1, 7)
    lengths = (2, 5)
    prompt = torch.stack([F.pad(tokens[row, :, :n], (0, 5 - n), value=9) for row, n in enumerate(lengths)])
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None])[:, None]
    cache = decoder.new_cache(2, 7)
    decoder(prompt, memory, mask, cache)
    for step in range(2):
        newest = torch.stack([tokens[row, :, n + step : n + step + 1] for row, n in enumerate(lengths)])
        logits = decoder(newest, memory, cache=cache)
        for row, n in enumerate(lengths):
            alone = decoder(tokens[row : row + 1, :, : n + step + 1], memory.select([row]))
            torch.testing.assert_close(logits[row, :, -1], alone[0, :, -1], atol=1e-5, rtol=0)


def test_the_cache_and_the_memory_under_autocast():
    """A float32 cache and memory with bfloat16 queries: the cache adds no rounding."""
    decoder, memory, tokens = random_decoder(positions="rope"), random_memory(), random_tokens(2, 2, 5)
    exact = decoder(tokens, memory)
    with torch.autocast("cpu", torch.bfloat16):
        uncached = decoder(tokens, memory)
        cache = decoder.new_cache(4, 5)
        cached = torch.cat([decoder(part, memory, cache=cache) for part in tokens.split(1, -1)], 2)
    assert uncached.dtype == torch.bfloat16
    # Logits of up to 4 have 8 bits: one rounding is 2^-7, and about ten follow one another.
    torch.testing.assert_close(cached, uncached, atol=0.1, rtol=0)
    torch.testing.assert_close(uncached.float(), exact, atol=0.2, rtol=0)


@pytest.mark.parametrize("positions", CHOICES["positions"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.2), (torch.float64, 1e-5)])
def test_a_decoder_in_another_dtype(dtype, tolerance, positions):
    decoder, memory, tokens = random_decoder(positions=positions), random_memory(), random_tokens()
    exact = decoder(tokens, memory)
    other = decoder.to(dtype)(tokens, memory.to(dtype=dtype), cache=decoder.new_cache(2, 6))
    assert other.dtype == dtype
    torch.testing.assert_close(other.float(), exact, atol=tolerance, rtol=0)


# ---- masks ----------------------------------------------------------------------------------------------------


@properties
@given(any_config, st.integers(0, 5), st.integers(0, 2**31))
def test_later_tokens_change_no_earlier_logit(config, position, seed):
    torch.manual_seed(seed)
    decoder = random_decoder(**config)
    memory, tokens = random_memory(layers=memory_layers(decoder)), random_tokens()
    changed = tokens.clone()
    changed[..., position:] = (changed[..., position:] + 1) % VOCAB_SIZE
    before, after = decoder(tokens, memory), decoder(changed, memory)
    assert torch.equal(before[:, :, :position], after[:, :, :position])
    assert (before[:, :, position:] - after[:, :, position:]).abs().amax((0, 1, 3)).min() > 1e-3


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_no_gradient_flows_to_later_tokens(placement):
    decoder, memory = random_decoder(norm_placement=placement).requires_grad_(True), random_memory()
    embedded = []
    decoder.embedding.register_forward_hook(lambda _, __, out: embedded.append(out))
    logits = decoder(random_tokens(), memory)
    for position in range(6):
        (gradient,) = torch.autograd.grad(logits[:, :, position].square().sum(), embedded, retain_graph=True)
        assert (gradient[:, position + 1 :] == 0).all()
        assert (gradient[:, : position + 1] != 0).any(-1).all()


@properties
@given(any_config, st.integers(0, 32), st.integers(0, 32), st.integers(0, 64), st.integers(0, 2**31))
def test_padding_of_text_and_memory_changes_no_logit(config, left, right, slots, seed):
    torch.manual_seed(seed)
    decoder = random_decoder(**config)
    layers = memory_layers(decoder)
    memory, tokens = random_memory(layers=layers), random_tokens(2, 2, 6)
    mask = torch.arange(6) < torch.tensor([[6, 2], [4, 1]])[..., None]
    masked = random_memory(slots=slots, layers=layers, masked=slots, source="masked")
    masked = Memory(1e4 * masked.keys, 1e4 * masked.values, masked.mask, masked.layout)
    expected = decoder(tokens, memory, mask)
    padded_tokens, padded_mask = pad(tokens, mask, left, right)
    padded = decoder(padded_tokens, cat(memory, masked), padded_mask)
    torch.testing.assert_close(padded[:, :, left : left + 6][mask], expected[mask], atol=1e-5, rtol=0)
    assert torch.isfinite(padded).all()


def test_texts_of_different_lengths_in_one_batch_equal_each_alone():
    decoder, memory, tokens = random_decoder(), random_memory(batch=2), random_tokens(2, 5, 7)
    lengths = torch.tensor([[7, 1, 3, 4, 2], [2, 6, 7, 1, 5]])
    together = decoder(tokens, memory, torch.arange(7) < lengths[..., None])
    for row, k in product(range(2), range(5)):
        n = int(lengths[row, k])
        alone = decoder(tokens[row : row + 1, k : k + 1, :n], memory.select([row]))
        torch.testing.assert_close(together[row, k, :n], alone[0, 0], atol=1e-5, rtol=0)


def test_the_memory_changes_the_logits():
    decoder, tokens = random_decoder(), random_tokens()
    assert (decoder(tokens, random_memory()) - decoder(tokens, random_memory())).abs().amax((1, 2, 3)).min() > 0.1


@pytest.mark.parametrize("gate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_an_empty_memory_equals_a_masked_one(gate, bias):
    decoder, tokens, memory = random_decoder(gate=gate, bias=bias), random_tokens(2, 3, 6), random_memory()
    empty = decoder(tokens, decoder.empty_memory(2))
    masked = decoder(tokens, memory.mask_out(torch.ones(2, 5, dtype=torch.bool)))
    torch.testing.assert_close(masked, empty, atol=1e-6, rtol=0)
    assert (decoder(tokens, memory) - empty).abs().max() > 0.1


@pytest.mark.parametrize("streams", [1, 3])
def test_visibility_restricts_the_slots_of_each_position(streams):
    """Position t attends to the first t+1 slots: equal to position t over a memory with those slots only."""
    decoder, memory, tokens = random_decoder(), random_memory(slots=6, masked=1), random_tokens(2, streams, 6)
    unrestricted = decoder(tokens, memory, visibility=torch.ones(6, 6, dtype=torch.bool))
    torch.testing.assert_close(unrestricted, decoder(tokens, memory), atol=1e-6, rtol=0)
    # One layer, because self-attention would pass on what earlier positions attended to.
    decoder, memory = random_decoder(num_layers=1), random_memory(slots=6, layers=1, masked=1)
    triangle = torch.ones(6, 6, dtype=torch.bool).tril()
    limited = decoder(tokens, memory, visibility=triangle)
    for position in range(6):
        cut = decoder(tokens, memory.mask_out(~triangle[position]))
        torch.testing.assert_close(limited[:, :, position], cut[:, :, position], atol=1e-5, rtol=0)
    masked = decoder(tokens, memory, visibility=torch.zeros(6, 6, dtype=torch.bool))
    torch.testing.assert_close(masked, decoder(tokens, decoder.empty_memory(2)), atol=1e-5, rtol=0)


def test_visibility_together_with_a_stream_mask():
    decoder, tokens, image = random_decoder(num_layers=1), random_tokens(2, 2, 4), random_memory(slots=3, layers=1)
    questions = random_memory(batch=4, slots=2, layers=1, source="question")
    visibility = torch.rand(4, 5) < 0.6
    folded = torch.cat([visibility, visibility[:, 3:]], 1)
    together = decoder(tokens, cat(image, questions.fold_streams(2)), visibility=folded)
    for k in range(2):
        own = cat(image, questions.select([k, 2 + k]))
        alone = decoder(tokens[:, k : k + 1], own, visibility=visibility)
        torch.testing.assert_close(together[:, k : k + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_tanh_gate_starts_as_a_language_model(placement):
    torch.manual_seed(1)
    decoder = TextDecoder(
        DecoderConfig(hidden_size=16, num_heads=2, num_layers=2, gate="tanh", norm_placement=placement), VOCAB_SIZE
    )
    decoder.eval()
    tokens = random_tokens()
    assert torch.equal(decoder(tokens, random_memory()), decoder(tokens, decoder.empty_memory(2)))
    randomize_parameters(decoder)
    assert (decoder(tokens, random_memory()) - decoder(tokens, decoder.empty_memory(2))).abs().max() > 0.01


def test_one_tied_layer_equals_three_equal_layers():
    decoder, tokens, one = random_decoder(num_layers=3), random_tokens(), random_memory(layers=1)
    three = Memory(*(t.expand(3, -1, -1, -1, -1) for t in (one.keys, one.values)), one.mask, one.layout)
    assert torch.equal(decoder(tokens, one), decoder(tokens, three))


@pytest.mark.parametrize(
    "memory",
    [{"batch": 1}, {"batch": 4}, {"layers": 3}, {"heads": 4}, {"width": 4}],
    ids=lambda m: next(iter(m)),
)
def test_a_memory_of_another_shape_is_refused(memory):
    with pytest.raises(MmxError) as error:
        random_decoder()(random_tokens(), random_memory(**memory))
    assert error.value.code == "memory.shape"
    assert error.value.details["expected"] == [2, 2, 2, 8]


# ---- parity with PyTorch's transformer, float64 ----------------------------------------------------------------


def copy_self_attention(layer, reference):
    with torch.no_grad():
        layer.self_attention.qkv.weight.copy_(reference.self_attn.in_proj_weight)
        layer.self_attention.qkv.bias.copy_(reference.self_attn.in_proj_bias)
    layer.self_attention.out.load_state_dict(reference.self_attn.out_proj.state_dict())
    layer.feed_forward.up.load_state_dict(reference.linear1.state_dict())
    layer.feed_forward.out.load_state_dict(reference.linear2.state_dict())
    layer.self_residual.norm.load_state_dict(reference.norm1.state_dict())


def reference_layer(layer_class, norm_first, activation):
    reference = layer_class(16, 4, 40, 0.0, activation, norm_first=norm_first, batch_first=True)
    return randomize_parameters(reference).double().eval()


def layer_config(norm_first, activation):
    sizes = {"hidden_size": 16, "num_heads": 4, "intermediate_size": 40, "num_layers": 1}
    placement = "pre" if norm_first else "post"
    return DecoderConfig(**sizes, activation=activation, norm_placement=placement, dropout=0.0)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_layers_without_cross_attention_equal_torchs_encoder(norm_first, activation):
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    memory = Memory.empty(1, 3, 4, 4)
    found = x
    expected = x
    for _ in range(3):
        reference = reference_layer(nn.TransformerEncoderLayer, norm_first, activation)
        layer = DecoderLayer(layer_config(norm_first, activation), None).double().eval()
        copy_self_attention(layer, reference)
        layer.feed_residual.norm.load_state_dict(reference.norm2.state_dict())
        expected = reference(expected, src_mask=~causal)
        positions = torch.arange(5).expand(3, 5)
        found = layer(found, causal[None, None], positions, None, CrossAttentionInputs(memory, memory.mask))
    assert float(expected.detach().std()) > 0.5
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_layer_with_cross_attention_equals_torchs_decoder(norm_first, activation):
    """The key and value rows of its cross-attention go to the projection of the source, the rest to the layer."""
    reference = reference_layer(nn.TransformerDecoderLayer, norm_first, activation)
    config = layer_config(norm_first, activation)
    layer = DecoderLayer(config, 0).double().eval()
    copy_self_attention(layer, reference)
    layer.cross_residual.norm.load_state_dict(reference.norm2.state_dict())
    layer.feed_residual.norm.load_state_dict(reference.norm3.state_dict())
    projection = KeyValueProjection(ProjectionConfig(norm="none", positions="none"), config, 16, 1, "image").double()
    weights = reference.multihead_attn.in_proj_weight.chunk(3)
    biases = reference.multihead_attn.in_proj_bias.chunk(3)
    linears = (layer.cross_attention.query, projection.key, projection.value)
    for linear, weight, bias in zip(linears, weights, biases):
        linear.load_state_dict({"weight": weight, "bias": bias})
    layer.cross_attention.out.load_state_dict(reference.multihead_attn.out_proj.state_dict())

    x = torch.randn(3, 5, 16, dtype=torch.float64)
    states = torch.randn(3, 7, 16, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = reference(x, states, tgt_mask=~causal, memory_key_padding_mask=~mask)
    memory = projection(Features(states, mask))
    assert memory.layout == (Segment("image", 0, 7),)
    positions = torch.arange(5).expand(3, 5)
    found = layer(x, causal[None, None], positions, None, CrossAttentionInputs(memory, mask[:, None, None]))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


# ---- head ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_the_product_with_the_output_weight(tied, transform, bias):
    decoder = random_decoder(tie_word_embeddings=tied, lm_head_transform=transform, lm_head_bias=bias)
    memory = random_memory()
    tokens = random_tokens()
    head = decoder.lm_head
    states = decoder.hidden_states(tokens, memory)
    assert states.shape == (2, 1, 6, 16)
    if transform:
        states = head.transform.norm(F.gelu(head.transform.dense(states)))
    weight = decoder.embedding.weight if tied else head.weight
    expected = states @ weight.T + (head.bias if bias else 0)
    torch.testing.assert_close(decoder(tokens, memory), expected, atol=1e-5, rtol=0)
    names = [name for name, parameter in decoder.named_parameters() if parameter.shape == (VOCAB_SIZE, 16)]
    assert names == (["embedding.weight"] if tied else ["embedding.weight", "lm_head.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_prepacked_head_is_a_submodule_that_is_not_saved(tied):
    config = DecoderConfig(hidden_size=64, num_layers=1, num_heads=2, tie_word_embeddings=tied)
    decoder = TextDecoder(config, MIN_NUMEL // 64).eval().requires_grad_(False)
    names = list(decoder.state_dict())
    states = torch.randn(2, 64)
    expected = decoder.logits(states)
    decoder.prepack("float")
    assert decoder.is_prepacked
    assert decoder.lm_head.prepacked in list(decoder.modules())
    assert list(decoder.state_dict()) == names
    torch.testing.assert_close(decoder.logits(states), expected, atol=1e-4, rtol=0)
    copied = copy.deepcopy(decoder)
    assert torch.equal(copied.logits(states), decoder.logits(states))


def test_it_keeps_no_state():
    """A second run after other runs, and a deep copy, return the same."""
    decoder = random_decoder()
    memory = random_memory()
    tokens = random_tokens()
    first = decoder(tokens, memory)
    copied = copy.deepcopy(decoder)
    decoder(random_tokens(2, 3, 9), random_memory(), cache=decoder.new_cache(6, 9))
    assert torch.equal(decoder(tokens, memory), first)
    assert torch.equal(copied(tokens, memory), first)
