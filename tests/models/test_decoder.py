"""TextDecoder: step by step as in one pass, causal, blind to padding, each stream alone, and equal to PyTorch's own."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from decoder_cases import VOCAB_SIZE, randomize_parameters, random_decoder, random_memory, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmx.config.schema import DecoderConfig, ProjectionConfig
from mmx.errors import MmxError
from mmx.memory import Memory, Segment, cat
from mmx.models.decoder import TextDecoder
from mmx.models.projection import KeyValueProjection
from mmx.nn.features import Features
from mmx.nn.cross_attention import CrossAttentionInputs
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
    """Every combination of the first four facts; the others take turns, so that each value meets each of theirs."""
    others = [name for name in CHOICES if name not in FIRST]
    for number, chosen in enumerate(product(*(CHOICES[name] for name in FIRST))):
        turns = number * 37 + number // 4
        yield dict(zip(FIRST, chosen)) | {name: CHOICES[name][turns >> i & 1] for i, name in enumerate(others)}


any_facts = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()})


def looking(decoder):
    return len(decoder.config.looking)


def pad(tokens, mask, left, right):
    """Junk tokens on both sides, masked."""
    junk = [torch.randint(VOCAB_SIZE, (*tokens.shape[:2], n)) for n in (left, right)]
    nothing = [torch.zeros_like(j, dtype=torch.bool) for j in junk]
    return torch.cat([junk[0], tokens, junk[1]], -1), torch.cat([nothing[0], mask, nothing[1]], -1)


# ---- cache -----------------------------------------------------------------------------------------------------


def check_cache(facts):
    decoder = random_decoder(**facts)
    memory, tokens = random_memory(layers=looking(decoder), masked=1), random_tokens(2, 2, 6)
    at_once = decoder(tokens, memory)
    cache, pieces = decoder.new_cache(4, 6), []
    for piece in tokens.split([3, 1, 1, 1], -1):
        pieces.append(decoder(piece, memory, cache=cache))
    assert cache.length == 6
    torch.testing.assert_close(torch.cat(pieces, 2), at_once, atol=1e-5, rtol=0)


@pytest.mark.parametrize("facts", combinations(), ids=lambda facts: "-".join(str(facts[name]) for name in FIRST))
def test_cached_is_uncached(facts):
    check_cache(facts)


@properties
@given(any_facts, st.integers(0, 2**31))
def test_cached_is_uncached_for_any_decoder(facts, seed):
    torch.manual_seed(seed)
    check_cache(facts)


@pytest.mark.parametrize("positions", CHOICES["positions"])
def test_texts_of_different_lengths_go_on_through_one_cache(positions):
    """Prompts of 2 and 5 tokens, padded right, then two more tokens each: as if each had been read alone."""
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
    """A float32 cache and memory beside bfloat16 queries: the cache rounds nothing that would not be rounded anyway."""
    decoder, memory, tokens = random_decoder(positions="rope"), random_memory(), random_tokens(2, 2, 5)
    exact = decoder(tokens, memory)
    with torch.autocast("cpu", torch.bfloat16):
        at_once = decoder(tokens, memory)
        cache = decoder.new_cache(4, 5)
        stepwise = torch.cat([decoder(piece, memory, cache=cache) for piece in tokens.split(1, -1)], 2)
    assert at_once.dtype == torch.bfloat16
    # Logits of up to 4 carry 8 bits: one rounding is 2^-7, and some ten follow one another on the way.
    torch.testing.assert_close(stepwise, at_once, atol=0.1, rtol=0)
    torch.testing.assert_close(at_once.float(), exact, atol=0.2, rtol=0)


@pytest.mark.parametrize("positions", CHOICES["positions"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.2), (torch.float64, 1e-5)])
def test_a_whole_decoder_in_another_type(dtype, tolerance, positions):
    decoder, memory, tokens = random_decoder(positions=positions), random_memory(), random_tokens()
    exact = decoder(tokens, memory)
    other = decoder.to(dtype)(tokens, memory.to(dtype=dtype), cache=decoder.new_cache(2, 6))
    assert other.dtype == dtype
    torch.testing.assert_close(other.float(), exact, atol=tolerance, rtol=0)


# ---- what may be seen ------------------------------------------------------------------------------------------


@properties
@given(any_facts, st.integers(0, 5), st.integers(0, 2**31))
def test_no_position_knows_what_comes_after_it(facts, place, seed):
    torch.manual_seed(seed)
    decoder = random_decoder(**facts)
    memory, tokens = random_memory(layers=looking(decoder)), random_tokens()
    changed = tokens.clone()
    changed[..., place:] = (changed[..., place:] + 1) % VOCAB_SIZE
    before, after = decoder(tokens, memory), decoder(changed, memory)
    assert torch.equal(before[:, :, :place], after[:, :, :place])
    assert (before[:, :, place:] - after[:, :, place:]).abs().amax((0, 1, 3)).min() > 1e-3


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_no_gradient_comes_from_the_future(placement):
    decoder, memory = random_decoder(norm_placement=placement).requires_grad_(True), random_memory()
    embedded = []
    decoder.embedding.register_forward_hook(lambda _, __, out: embedded.append(out))
    logits = decoder(random_tokens(), memory)
    for place in range(6):
        (gradient,) = torch.autograd.grad(logits[:, :, place].square().sum(), embedded, retain_graph=True)
        assert (gradient[:, place + 1 :] == 0).all()
        assert (gradient[:, : place + 1] != 0).any(-1).all()


@properties
@given(any_facts, st.integers(0, 32), st.integers(0, 32), st.integers(0, 64), st.integers(0, 2**31))
def test_padding_of_text_and_source_changes_no_logit(facts, left, right, slots, seed):
    torch.manual_seed(seed)
    decoder = random_decoder(**facts)
    layers = looking(decoder)
    memory, tokens = random_memory(layers=layers), random_tokens(2, 2, 6)
    mask = torch.arange(6) < torch.tensor([[6, 2], [4, 1]])[..., None]
    junk = random_memory(slots=slots, layers=layers, masked=slots, source="junk")
    junk = Memory(1e4 * junk.keys, 1e4 * junk.values, junk.mask, junk.layout)
    plain = decoder(tokens, memory, mask)
    padded = decoder(pad(tokens, mask, left, right)[0], cat(memory, junk), pad(tokens, mask, left, right)[1])
    torch.testing.assert_close(padded[:, :, left : left + 6][mask], plain[mask], atol=1e-5, rtol=0)
    assert torch.isfinite(padded).all()


def test_texts_of_many_lengths_at_once_are_as_each_alone():
    decoder, memory, tokens = random_decoder(), random_memory(batch=2), random_tokens(2, 5, 7)
    lengths = torch.tensor([[7, 1, 3, 4, 2], [2, 6, 7, 1, 5]])
    together = decoder(tokens, memory, torch.arange(7) < lengths[..., None])
    for row, k in product(range(2), range(5)):
        n = int(lengths[row, k])
        alone = decoder(tokens[row : row + 1, k : k + 1, :n], memory.select([row]))
        torch.testing.assert_close(together[row, k, :n], alone[0, 0], atol=1e-5, rtol=0)


def test_the_memory_is_looked_at():
    decoder, tokens = random_decoder(), random_tokens()
    assert (decoder(tokens, random_memory()) - decoder(tokens, random_memory())).abs().amax((1, 2, 3)).min() > 0.1


@pytest.mark.parametrize("gate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_an_empty_memory_says_what_a_masked_one_says(gate, biases):
    decoder, tokens, memory = random_decoder(gate=gate, biases=biases), random_tokens(2, 3, 6), random_memory()
    nothing = decoder(tokens, decoder.empty_memory(2))
    blind = decoder(tokens, memory.mask_out(torch.ones(2, 5, dtype=torch.bool)))
    torch.testing.assert_close(blind, nothing, atol=1e-6, rtol=0)
    assert (decoder(tokens, memory) - nothing).abs().max() > 0.1


@pytest.mark.parametrize("streams", [1, 3])
def test_visibility_says_which_slots_each_position_may_see(streams):
    """Position t sees the first t+1 slots: as a run over a memory cut there says at position t."""
    decoder, memory, tokens = random_decoder(), random_memory(slots=6, masked=1), random_tokens(2, streams, 6)
    seen = decoder(tokens, memory, visibility=torch.ones(6, 6, dtype=torch.bool))
    torch.testing.assert_close(seen, decoder(tokens, memory), atol=1e-6, rtol=0)
    # One block, so that what earlier positions saw does not come back through self-attention.
    decoder, memory = random_decoder(layers=1), random_memory(slots=6, layers=1, masked=1)
    stairs = torch.ones(6, 6, dtype=torch.bool).tril()
    limited = decoder(tokens, memory, visibility=stairs)
    for place in range(6):
        cut = decoder(tokens, memory.mask_out(~stairs[place]))
        torch.testing.assert_close(limited[:, :, place], cut[:, :, place], atol=1e-5, rtol=0)
    blind = decoder(tokens, memory, visibility=torch.zeros(6, 6, dtype=torch.bool))
    torch.testing.assert_close(blind, decoder(tokens, decoder.empty_memory(2)), atol=1e-5, rtol=0)


def test_visibility_beside_questions_that_belong_to_streams():
    decoder, tokens, picture = random_decoder(layers=1), random_tokens(2, 2, 4), random_memory(slots=3, layers=1)
    questions = random_memory(batch=4, slots=2, layers=1, source="question")
    visibility = torch.rand(4, 5) < 0.6
    folded = torch.cat([visibility, visibility[:, 3:]], 1)
    together = decoder(tokens, cat(picture, questions.fold_streams(2)), visibility=folded)
    for k in range(2):
        own = cat(picture, questions.select([k, 2 + k]))
        alone = decoder(tokens[:, k : k + 1], own, visibility=visibility)
        torch.testing.assert_close(together[:, k : k + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_shut_gate_starts_as_a_decoder_of_text_alone(placement):
    torch.manual_seed(1)
    decoder = TextDecoder(
        DecoderConfig(hidden_size=16, num_heads=2, num_layers=2, gate="tanh", norm_placement=placement), VOCAB_SIZE
    )
    decoder.eval()
    tokens = random_tokens()
    assert torch.equal(decoder(tokens, random_memory()), decoder(tokens, decoder.empty_memory(2)))
    randomize_parameters(decoder)
    assert (decoder(tokens, random_memory()) - decoder(tokens, decoder.empty_memory(2))).abs().max() > 0.01


def test_one_shared_layer_says_what_equal_layers_would():
    decoder, tokens, one = random_decoder(layers=3), random_tokens(), random_memory(layers=1)
    three = Memory(*(t.expand(3, -1, -1, -1, -1) for t in (one.keys, one.values)), one.mask, one.layout)
    assert torch.equal(decoder(tokens, one), decoder(tokens, three))


@pytest.mark.parametrize(
    "memory",
    [{"batch": 1}, {"batch": 4}, {"num_layers": 3}, {"num_heads": 4}, {"hidden_size": 4}],
    ids=lambda m: next(iter(m)),
)
def test_a_memory_that_is_not_of_this_decoder_is_refused(memory):
    given_ = random_memory(**memory)
    sentence = r"the memory is \[L, B, H, D\] .*, expected \[2, 2, 2, 8\]; encode with this model"
    with pytest.raises(MmxError, match=sentence):
        random_decoder()(random_tokens(), given_)


# ---- against PyTorch's own transformer, float64 ----------------------------------------------------------------


def copy_self_attention(block, layer):
    pairs = [(block.self_attention.qkv.weight, layer.self_attn.in_proj_weight)]
    pairs += [(block.self_attention.qkv.bias, layer.self_attn.in_proj_bias)]
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.copy_(theirs)
    block.self_attention.out.load_state_dict(layer.self_attn.out_proj.state_dict())
    block.feed_forward.up.load_state_dict(layer.linear1.state_dict())
    block.feed_forward.out.load_state_dict(layer.linear2.state_dict())
    block.self_residual.norm.load_state_dict(layer.norm1.state_dict())


def theirs_of(kind, norm_first, activation):
    layer = kind(16, 4, 40, 0.0, activation, norm_first=norm_first, batch_first=True)
    return randomize_parameters(layer).double().eval()


def ours_of(norm_first, activation, looking):
    facts = {"hidden_size": 16, "num_heads": 4, "intermediate_size": 40, "activation": activation, "dropout": 0.0}
    config = DecoderConfig(**facts, norm_placement="pre" if norm_first else "post", num_layers=1)
    return config, DecoderLayer(config, looking).double().eval()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_stack_without_looking_is_torchs_transformer_encoder(norm_first, activation):
    layers = [theirs_of(nn.TransformerEncoderLayer, norm_first, activation) for _ in range(3)]
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    ours = theirs = x
    memory = Memory.empty(1, 3, 4, 4)
    for layer in layers:
        config, block = ours_of(norm_first, activation, None)
        copy_self_attention(block, layer)
        block.feed_residual.norm.load_state_dict(layer.norm2.state_dict())
        theirs = layer(theirs, src_mask=~causal)
        ours = block(
            ours, causal[None, None], torch.arange(5).expand(3, 5), None, CrossAttentionInputs(memory, memory.mask)
        )
    assert float(theirs.detach().std()) > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_looking_block_is_torchs_transformer_decoder(norm_first, activation):
    """Their cross-attention's key and value rows go to the projection of the source, the rest to the block."""
    layer = theirs_of(nn.TransformerDecoderLayer, norm_first, activation)
    config, block = ours_of(norm_first, activation, 0)
    copy_self_attention(block, layer)
    block.cross_residual.norm.load_state_dict(layer.norm2.state_dict())
    block.feed_residual.norm.load_state_dict(layer.norm3.state_dict())
    options = ProjectionConfig(norm="none", positions="none")
    projection = KeyValueProjection(options, config, 16, 1, "image").double()
    weights, biases = (p.chunk(3) for p in (layer.multihead_attn.in_proj_weight, layer.multihead_attn.in_proj_bias))
    for part, weight, bias in zip((block.cross_attention.query, projection.key, projection.value), weights, biases):
        part.load_state_dict({"sampling_weight": weight, "bias": bias})
    block.cross_attention.out.load_state_dict(layer.multihead_attn.out_proj.state_dict())

    x, states = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 7, 16, dtype=torch.float64)
    mask, causal = torch.arange(7) < torch.tensor([[7], [4], [1]]), torch.ones(5, 5, dtype=torch.bool).tril()
    theirs = layer(x, states, tgt_mask=~causal, memory_key_padding_mask=~mask)
    memory = projection(Features(states, mask))
    assert memory.layout == (Segment("image", 0, 7),)
    positions = torch.arange(5).expand(3, 5)
    ours = block(x, causal[None, None], positions, None, CrossAttentionInputs(memory, mask[:, None, None]))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


# ---- head ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_head_by_hand(tied, transform, bias):
    decoder = random_decoder(tied_embeddings=tied, head_transform=transform, head_bias=bias)
    memory, tokens = random_memory(), random_tokens()
    states, head = decoder.hidden_states(tokens, memory), decoder.lm_head
    assert states.shape == (2, 1, 6, 16)
    inner = head.transform.norm(F.gelu(head.transform.dense(states))) if transform else states
    table = decoder.embedding.weight if tied else lm_head.weight
    expected = inner @ table.T + (head.bias if bias else 0)
    torch.testing.assert_close(decoder(tokens, memory), expected, atol=1e-5, rtol=0)
    tables = [name for name, p in decoder.named_parameters() if p.shape == (VOCAB_SIZE, 16)]
    assert tables == (["embedding.weight"] if tied else ["embedding.weight", "lm_head.weight"])


def test_it_keeps_no_state():
    """Two runs in between other runs, and a deep copy, say the same."""
    decoder, memory, tokens = random_decoder(), random_memory(), random_tokens()
    first, twin = decoder(tokens, memory), copy.deepcopy(decoder)
    decoder(random_tokens(2, 3, 9), random_memory(), cache=decoder.new_cache(6, 9))
    assert torch.equal(decoder(tokens, memory), first)
    assert torch.equal(twin(tokens, memory), first)
