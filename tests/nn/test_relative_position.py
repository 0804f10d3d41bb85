"""Relative positions in cross-attention: bias and wait-k by hand and by loops, one pass as step by step, and which
sources a decoder without any position cannot tell apart.

Axes: B memories, K streams, T text positions, S slots, L cross-attention layers, H heads, D head dimension.
"""

import math

import pytest
import torch
from decoder_cases import VOCAB_SIZE, random_decoder, random_memory, random_tokens, randomize_parameters
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.config.schema import GenerationConfig, ProjectionConfig, SourceConfig
from mmx.generation import CachedDecodeStep, PromptBatch, generate
from mmx.generation.decode_step import UncachedDecodeStep
from mmx.interpret import QueryRecorder, attention_for_tokens, attention_maps
from mmx.memory import Memory, Segment, cat
from mmx.nn.attention import attention_weights
from mmx.nn.relative_position import RelativeDistances, RelativePositionBias, relative_distances
from mmx.nn.wait_k import wait_k_mask
from mmx.testing import tiny_model

CONFIGS = {
    "relative": {"cross_attention_positions": "relative", "max_relative_distance": 3},
    "wait_k": {"wait_k": 2},
    "both": {"cross_attention_positions": "relative", "max_relative_distance": 2, "wait_k": 1, "positions": "rope"},
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def text_and_grid(batch=2):
    """A sequence of 5 slots, the last one masked, and a grid of 2 x 2 after one slot of the whole image."""
    text = random_memory(batch, masked=1, source="text")
    return cat(text, random_memory(batch, slots=5, source="image", grid=(2, 2)))


def assert_close(found, expected, atol=2e-6):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)


# ---- by hand and by loop ---------------------------------------------------------------------------------------------


def bias_with_weight(weight):
    bias = RelativePositionBias(len(weight), len(weight[0]) // 2)
    bias.weight.data = torch.tensor(weight)
    return bias


def test_bias_by_hand():
    """Distances are slot position minus text position; with max_distance 1 there are three values per head."""
    distances = relative_distances(torch.tensor([[0, 1, 2]]), random_memory(1, slots=4))
    assert distances.offset[0].tolist() == [[0, 1, 2, 3], [-1, 0, 1, 2], [-2, -1, 0, 1]]
    assert distances.ordered.tolist() == [True] * 4
    bias = bias_with_weight([[1.0, 2.0, 4.0]])
    assert bias(distances)[0, 0].tolist() == [[2, 4, 4, 4], [1, 2, 4, 4], [1, 1, 2, 4]]


def test_attention_weights_with_a_known_bias():
    """With keys of zero the weights are the softmax of the bias, 2 : 2 : 4 : 1."""
    bias = bias_with_weight([[math.log(2.0), math.log(4.0), 0.0], [0.0, 0.0, 0.0]])
    distances = relative_distances(torch.tensor([[2]]), random_memory(1, slots=4))  # offsets -2, -1, 0, 1
    weights = attention_weights(torch.randn(1, 2, 1, 8), torch.zeros(1, 2, 4, 8), None, bias(distances))
    assert_close(weights[0, 0, 0], torch.tensor([2.0, 2.0, 4.0, 1.0]) / 9)
    assert_close(weights[0, 1, 0], torch.full((4,), 0.25))


def test_an_empty_memory_has_no_distances():
    distances = relative_distances(torch.zeros(2, 3, dtype=torch.long), Memory.empty(1, 2, 1, 4))
    assert distances.offset.shape == (2, 3, 0)
    assert distances.ordered.shape == (0,)
    assert RelativePositionBias(2, 1)(distances).shape == (2, 2, 3, 0)


layouts = st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(layouts, st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_bias_and_wait_k_mask_equal_a_loop(layout, batch, streams, max_distance, k, seed):
    torch.manual_seed(seed)
    memories = []
    for count, has_grid in layout:
        memories.append(random_memory(batch, slots=count, grid=(1, count) if has_grid else None))
    module = randomize_parameters(RelativePositionBias(2, max_distance))
    positions = torch.randint(8, (batch * streams, 3))
    distances = relative_distances(positions, cat(*memories))
    bias = module(distances)
    mask = wait_k_mask(distances, k)
    slot = 0
    for count, has_grid in layout:
        for index in range(count):
            for b, query in torch.cartesian_prod(torch.arange(batch), torch.arange(streams * 3)).tolist():
                offset = index - int(positions[b * streams + query // 3, query % 3])
                clipped = max(-max_distance, min(max_distance, offset)) + max_distance
                expected = torch.zeros(2) if has_grid else module.weight[:, clipped]
                assert torch.equal(bias[b, :, query, slot], expected)
                assert mask[b, 0, query, slot] == (has_grid or offset < k)
            slot += 1


def test_distances_are_clipped():
    module = randomize_parameters(RelativePositionBias(2, 2))
    offset = torch.tensor([[[-100, -3, -2, -1, 0, 1, 2, 3, 100]]])
    bias = module(RelativeDistances(offset, torch.ones(9, dtype=torch.bool)))[0, :, 0]
    assert torch.equal(bias, module.weight[:, [0, 0, 0, 1, 2, 3, 4, 4, 4]])


# ---- in a decoder ----------------------------------------------------------------------------------------------------


@every_config
def test_attention_maps_are_the_weights_of_the_values(config):
    """Maps equal a loop over the recorded queries, and maps @ values is the input of the output projection."""
    decoder = random_decoder(**config)
    memory = text_and_grid()
    recorder = QueryRecorder()
    outputs = []
    handle = decoder.layers[1].cross_attention.out.register_forward_hook(lambda _, args, __: outputs.append(args[0]))
    decoder(random_tokens(2, 3, 4), memory, recorder=recorder)
    handle.remove()
    maps = attention_maps(recorder, memory, 3, 1)
    queries = recorder.queries(1, 3)
    for b, head, stream, t in torch.cartesian_prod(*map(torch.arange, (2, 2, 3, 4))).tolist():
        query = queries[b, head, stream, t]
        expected = expected_scores(decoder, memory, (b, head, t), query).softmax(0)
        assert_close(maps[b, stream, t, head], expected)
    expected = torch.einsum("bkths,bhsd->bkthd", maps, memory.values[1]).flatten(3).flatten(0, 1)
    assert_close(outputs[0], expected)


def expected_scores(decoder, memory, index, query):
    """Scores [10] of one query over `text_and_grid`, minus infinity for slots that it may not attend."""
    b, head, t = index
    wait_k = decoder.config.wait_k
    max_distance = decoder.config.max_relative_distance
    scores = torch.full((10,), -math.inf)
    for slot in range(10):
        offset = slot - t
        ordered = slot < 5
        waits = wait_k is not None and ordered and offset >= wait_k
        if not memory.mask[b, slot] or waits:
            continue
        scores[slot] = memory.keys[1, b, head, slot] @ query / math.sqrt(8)
        if ordered and decoder.relative_position_bias is not None:
            clipped = max(-max_distance, min(max_distance, offset)) + max_distance
            scores[slot] += decoder.relative_position_bias.weight[head, clipped]
    return scores


@every_config
@torch.no_grad()
def test_maps_of_a_full_pass_equal_those_of_decoding(config):
    decoder = random_decoder(**config)
    memory = text_and_grid()
    tokens = random_tokens(2, 2, 5)
    recorder = QueryRecorder()
    step = CachedDecodeStep(decoder, memory, 4, recorder)
    step.prefill(tokens[:, :, :2], torch.ones(2, 2, 2, dtype=torch.bool))
    for position in range(2, 5):
        step(tokens[:, :, position].flatten())
    maps = torch.stack([attention_maps(recorder, memory, 2, layer) for layer in (0, 1)], 3)
    assert_close(maps, attention_for_tokens(decoder, memory, tokens), atol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 3], [3, 1], [3, 3, 3, 3], [3, 1, 2, 3]], ids=str)
@every_config
@torch.inference_mode()
def test_fast_cached_and_uncached_steps_agree(config, lengths):
    """Streams of one memory are at different positions, and are reordered in between."""
    decoder = random_decoder(**config)
    memory = text_and_grid()
    streams = len(lengths) // 2
    tokens = random_tokens(2, streams, 3)
    mask = (torch.arange(3) < torch.tensor(lengths)[:, None]).view(2, streams, 3)
    fast = CachedDecodeStep(decoder, memory, 8)
    slow = CachedDecodeStep(decoder, memory, 8, fast=False)
    uncached = UncachedDecodeStep(decoder, memory)
    assert fast.fast and not slow.fast
    steps = (fast, slow, uncached)
    expected = uncached.prefill(tokens, mask)
    assert_close(fast.prefill(tokens, mask), expected)
    assert_close(slow.prefill(tokens, mask), expected)
    for position in range(6):
        generated = torch.randint(VOCAB_SIZE, (2 * streams,))
        expected = uncached(generated)
        assert_close(fast(generated), expected, 1e-5)
        assert_close(slow(generated), expected, 1e-5)
        for step in steps:
            if position == 2 and streams == 2:
                step.reorder(torch.tensor([1, 1, 3, 2]))
            if position == 4:
                step.select(torch.tensor([1, 0]))


@every_config
@torch.inference_mode()
def test_beam_search_with_fast_cached_and_uncached_steps(config):
    decoder = random_decoder(**config)
    memory = text_and_grid()
    prompts = PromptBatch(random_tokens(2, 2, 3), torch.tensor([[[True] * 3, [True, True, False]]] * 2))
    options = GenerationConfig(max_new_tokens=6, num_beams=3)
    texts = []
    for step in (
        CachedDecodeStep(decoder, memory, 6),
        CachedDecodeStep(decoder, memory, 6, fast=False),
        UncachedDecodeStep(decoder, memory),
    ):
        rows = generate(step, prompts, options, eos=2)
        texts.append([candidates[0].tokens for row in rows for candidates in row])
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 1


@pytest.mark.parametrize("side", ["left", "right"])
@every_config
def test_padding_and_other_streams_change_no_distance(config, side):
    """The logits of a text of 3 tokens next to one of 5 are those of the text alone."""
    decoder = random_decoder(**config)
    memory = text_and_grid(1)
    tokens = random_tokens(1, 2, 5)
    mask = torch.tensor([[[True] * 5, [True] * 3 + [False] * 2]])
    mask = mask if side == "right" else mask.flip(-1)
    logits = decoder(tokens, memory, mask)
    short = tokens[:, 1:][mask[:, 1:]].view(1, 1, 3)
    assert_close(logits[:, 1][mask[:, 1]], decoder(short, memory)[0, 0])
    assert_close(logits[:, :1], decoder(tokens[:, :1], memory))


@every_config
def test_the_order_of_concatenated_sources_changes_no_logits(config):
    """Slot positions are counted from zero in each source."""
    decoder = random_decoder(**config)
    tokens = random_tokens(2, 2, 4)
    first = random_memory(slots=3, masked=1, source="first")
    second = random_memory(slots=5, masked=1, source="second")
    grid = random_memory(slots=4, grid=(2, 2))
    expected = decoder(tokens, cat(first, second, grid))
    assert_close(decoder(tokens, cat(grid, second, first)), expected)
    assert_close(decoder(tokens, cat(second, grid, first)), expected)


@every_config
def test_a_grid_has_no_bias_and_is_always_visible(config):
    torch.manual_seed(3)
    decoder = random_decoder(**config)
    grid = random_memory(slots=5, grid=(2, 2))
    tokens = random_tokens(2, 2, 4)
    plain = random_decoder(positions=config.get("positions", "learned"))
    state = decoder.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    assert torch.allclose(decoder(tokens, grid), plain(tokens, grid), atol=1e-6)
    sequence = Memory(grid.keys, grid.values, grid.mask, (Segment("text", 0, 5),))
    assert (decoder(tokens, sequence) - plain(tokens, sequence)).abs().max() > 1e-2
    assert (attention_for_tokens(decoder, grid, tokens) > 0).all()


def relative_decoder(**config):
    return random_decoder(cross_attention_positions="relative", **config)


def test_gradients_reach_the_distances_that_occur():
    decoder = relative_decoder(max_relative_distance=4).requires_grad_(True)
    decoder(random_tokens(1, 1, 3), random_memory(1, slots=2)).square().sum().backward()
    gradient = decoder.relative_position_bias.weight.grad
    occurring = torch.tensor([-2, -1, 0, 1]) + 4
    assert (gradient[:, occurring].abs() > 1e-4).all()
    gradient[:, occurring] = 0
    assert (gradient == 0).all()


def test_gradients_of_the_bias_equal_central_differences():
    decoder = relative_decoder(max_relative_distance=2, wait_k=1).double()
    memory = random_memory(dtype=torch.float64)
    tokens = random_tokens(2, 2, 3)
    weight = decoder.relative_position_bias.weight.requires_grad_(True)

    def score(data):
        weight.data = data
        return decoder(tokens, memory).log_softmax(-1)[..., 0].sum()

    original = weight.detach().clone()
    (gradient,) = torch.autograd.grad(score(original.clone()), weight)
    with torch.no_grad():
        for head, index in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
            step = torch.zeros_like(original)
            step[head, index] = 1e-5
            slope = (score(original + step) - score(original - step)) / 2e-5
            assert float(slope) == pytest.approx(float(gradient[head, index]), abs=1e-7)


def test_a_bias_of_zero_changes_nothing():
    decoder = relative_decoder(max_relative_distance=3)
    plain = random_decoder()
    decoder.load_state_dict({**plain.state_dict(), "relative_position_bias.weight": torch.zeros(2, 7)})
    memory = random_memory()
    tokens = random_tokens(2, 2, 4)
    assert_close(decoder(tokens, memory), plain(tokens, memory))


# ---- sources without positions ---------------------------------------------------------------------------------------

SOURCE = "xyxz"  # the first and the third token are equal


def text_model(key_positions="none", encoder_positions="none", causal=False, **decoder):
    """A random model with one text source; `key_positions` are those of its projection."""
    options = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "positions": encoder_positions, "causal": causal}
    projection = ProjectionConfig(positions=key_positions)
    source = SourceConfig(encoder="text", options=options, projection=projection)
    return randomize_parameters(tiny_model({"text": source}, **decoder)).requires_grad_(False)


def encode_source(model):
    return model.encode({"text": model.collate("text", [SOURCE])}, 1)


def equal_slots(model):
    """The slots of the two equal tokens."""
    tokens = model.encoder("text").prepare(SOURCE)["tokens"].tolist()
    first, second = (slot for slot, token in enumerate(tokens) if token == model.tokenizer.encode("x")[-1])
    return first, second


def largest_difference(model):
    """Largest difference, over tokens, layers and heads, between the attention weights of the two equal tokens."""
    maps = attention_for_tokens(model.decoder, encode_source(model), torch.randint(6, 262, (1, 2, 5)))
    first, second = equal_slots(model)
    return float((maps[..., first] - maps[..., second]).abs().max())


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "none"])
def test_positions_of_the_decoder_alone_cannot_tell_equal_tokens_apart(positions):
    """Equal tokens have equal keys, whatever the positions of the queries."""
    model = text_model(positions=positions)
    memory = encode_source(model)
    first, second = equal_slots(model)
    assert_close(memory.keys[..., first, :], memory.keys[..., second, :])
    assert largest_difference(model) < 1e-7


@pytest.mark.parametrize(
    "options",
    [
        {"key_positions": "learned"},
        {"key_positions": "sinusoidal"},
        {"cross_attention_positions": "relative", "max_relative_distance": 4},
        {"encoder_positions": "learned"},
        {"encoder_positions": "sinusoidal"},
        {"encoder_positions": "rope"},
        {"causal": True},  # a causal encoder needs no positions: the tokens before a token identify its position
    ],
    ids=lambda options: "-".join(map(str, options)) + "-" + str(next(iter(options.values()))),
)
def test_positions_of_keys_encoder_or_scores_tell_equal_tokens_apart(options):
    assert largest_difference(text_model(**options)) > 1e-3


@pytest.mark.parametrize(
    ("options", "order_matters"),
    [({}, False), ({"key_positions": "learned"}, True), ({"cross_attention_positions": "relative"}, True)],
    ids=["none", "learned keys", "relative bias"],
)
def test_a_source_without_positions_is_a_bag_of_tokens(options, order_matters):
    model = text_model(**options)
    tokens = torch.tensor([[[7, 8, 9, 10]]])
    logits = []
    num_slots = len(model.encoder("text").prepare(SOURCE)["tokens"])
    for order in (list(range(num_slots)), [1, 0, *range(num_slots - 1, 1, -1)]):
        batch = model.collate("text", [SOURCE])
        batch.inputs["tokens"] = batch.inputs["tokens"][:, order]
        logits.append(model.decoder(tokens, model.encode({"text": batch}, 1)))
    difference = (logits[0] - logits[1]).abs().max()
    assert difference > 1e-2 if order_matters else difference < 1e-5
