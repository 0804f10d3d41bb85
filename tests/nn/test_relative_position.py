"""Distances between words and slots: bias and view by hand and by loops, one pass as step by step, grids left alone;
and what a text without them cannot tell apart.

Alphabet: B memories, K streams, T text positions, S slots, L looking layers, H heads, V vocabulary.
"""

import math

import pytest
import torch
from decoder_cases import VOCAB_SIZE, randomize_parameters, random_decoder, random_memory, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.config.schema import GenerationConfig, ProjectionConfig, SourceConfig
from mmx.generation import CachedDecodeStep, generate
from mmx.generation.decode_step import UncachedDecodeStep
from mmx.interpret import QueryRecorder, attention_for_tokens, attention_maps
from mmx.memory import Memory, Segment, cat
from mmx.nn.attention import attention_weights
from mmx.nn.relative_position import RelativeDistances, RelativePositionBias, relative_distances
from mmx.nn.wait_k import wait_k_mask, wait_k_visibility
from mmx.testing import tiny_model

properties = settings(max_examples=50, deadline=None)
KINDS = {
    "relative": {"cross_attention_positions": "relative", "max_relative_distance": 3},
    "wait": {"wait_k": 2},
    "both": {"cross_attention_positions": "relative", "max_relative_distance": 2, "wait_k": 1, "positions": "rope"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def text_and_grid(batch=2):
    """A sequence of 5 slots, of which the last is hidden, and a grid of 2 by 2 behind a slot of the whole picture."""
    return cat(random_memory(batch, masked=1, source="text"), random_memory(batch, slots=5, source="image", grid=(2, 2)))


def assert_alike(found, expected, atol=2e-6):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)


# ---- by hand and by loops --------------------------------------------------------------------------------------------


def bias_of(table):
    bias = RelativePositionBias(len(table), len(table[0]) // 2)
    bias.weight.data = torch.tensor(table)
    return bias


def test_the_bias_by_hand():
    """Slot less position; a reach of 1 and three numbers: before, here, after."""
    apart = relative_distances(torch.tensor([[0, 1, 2]]), random_memory(1, slots=4))
    assert apart.offset[0].tolist() == [[0, 1, 2, 3], [-1, 0, 1, 2], [-2, -1, 0, 1]]
    assert apart.ordered.tolist() == [True] * 4
    assert bias_of([[1.0, 2.0, 4.0]])(apart)[0, 0].tolist() == [[2, 4, 4, 4], [1, 2, 4, 4], [1, 1, 2, 4]]


def test_weights_with_a_known_bias_by_hand():
    """Keys that say nothing: the weights are the softmax of the bias alone, 2 : 2 : 4 : 1."""
    bias = bias_of([[math.log(2.0), math.log(4.0), 0.0], [0.0, 0.0, 0.0]])
    apart = relative_distances(torch.tensor([[2]]), random_memory(1, slots=4))  # offsets -2, -1, 0, 1
    weights = attention_weights(torch.randn(1, 2, 1, 8), torch.zeros(1, 2, 4, 8), None, bias(apart))
    assert_alike(weights[0, 0, 0], torch.tensor([2.0, 2.0, 4.0, 1.0]) / 9)
    assert_alike(weights[0, 1, 0], torch.full((4,), 0.25))


def test_the_view_by_hand():
    apart = relative_distances(torch.tensor([[0, 1, 2]]), random_memory(1, slots=4))
    rows = {1: ["x...", "xx..", "xxx."], 2: ["xx..", "xxx.", "xxxx"], 9: ["xxxx"] * 3}
    for k, expected in rows.items():
        seen = [["x" if may else "." for may in row] for row in wait_k_mask(apart, k)[0, 0].tolist()]
        assert ["".join(row) for row in seen] == expected
        assert torch.equal(wait_k_mask(apart, k)[0, 0], wait_k_visibility(3, 4, k)), "as a visibility says it"


def test_nothing_to_see_has_no_distances():
    apart = relative_distances(torch.zeros(2, 3, dtype=torch.long), Memory.empty(1, 2, 1, 4))
    assert apart.offset.shape == (2, 3, 0) and apart.ordered.shape == (0,)
    assert RelativePositionBias(2, 1)(apart).shape == (2, 2, 3, 0)
    assert wait_k_mask(apart, 1).shape == (2, 1, 3, 0)


layouts = st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4)


@properties
@given(layouts, st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_bias_and_view_are_those_of_a_loop(parts, batch, streams, reach, k, seed):
    torch.manual_seed(seed)
    memories = [random_memory(batch, slots=n, source=str(i), grid=(1, n) if grid else None)
                for i, (n, grid) in enumerate(parts)]  # fmt: skip
    memory, bias = cat(*memories), randomize_parameters(RelativePositionBias(2, reach))
    positions = torch.randint(8, (batch * streams, 3))
    apart = relative_distances(positions, memory)
    found, seen = bias(apart), wait_k_mask(apart, k)
    for b in range(batch):
        for query in range(streams * 3):
            position = int(positions[b * streams + query // 3, query % 3])
            slot = 0
            for count, grid in parts:
                for place in range(count):
                    index = max(-reach, min(reach, place - position)) + reach
                    for head in range(2):
                        assert found[b, head, query, slot] == (0.0 if grid else bias.weight[head, index])
                    assert seen[b, 0, query, slot] == (grid or place < position + k)
                    slot += 1


@properties
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 9))
def test_a_view_opens_by_one_slot_a_step(length, slots, k):
    view = wait_k_visibility(length, slots, k)
    assert view.sum(-1).tolist() == [min(t + k, slots) for t in range(length)]
    assert (view.long().diff(dim=-1) <= 0).all(), "the first slots, without a gap"


def test_beyond_its_reach_all_is_equally_far():
    bias = randomize_parameters(RelativePositionBias(2, 2))
    far = bias(
        RelativeDistances(torch.tensor([[[-100, -3, -2, -1, 0, 1, 2, 3, 100]]]), torch.ones(9, dtype=torch.bool))
    )[0, :, 0]
    assert torch.equal(far[:, 2:7], bias.weight.data)
    for place, edge in ((0, 0), (1, 0), (7, -1), (8, -1)):
        assert torch.equal(far[:, place], bias.weight.data[:, edge])


# ---- within the decoder ----------------------------------------------------------------------------------------------


@every_kind
def test_the_maps_are_the_weights_that_the_values_were_read_with(kind):
    """By loops from the recorded queries, and by what came out: maps @ values enters the layer's last linear map."""
    decoder, memory, tokens, recorder = (
        random_decoder(**KINDS[kind]),
        text_and_grid(),
        random_tokens(2, 3, 4),
        QueryRecorder(),
    )
    read = []
    handle = decoder.layers[1].cross_attention.out.register_forward_hook(lambda _, given, __: read.append(given[0]))
    decoder(tokens, memory, recorder=recorder)
    handle.remove()
    maps, queries = attention_maps(recorder, memory, 3, 1), recorder.queries(1, 3)
    k, table, reach = decoder.config.wait_k, getattr(decoder.distance_bias, "table", None), decoder.config.cross_reach
    for b, head, stream, t in torch.cartesian_prod(*map(torch.arange, (2, 2, 3, 4))).tolist():
        scores = torch.full((10,), -math.inf)
        for slot in range(10):
            place, ordered = slot % 5, slot < 5
            if not memory.mask[b, slot] or (k and ordered and place >= t + k):
                continue
            bias = table[head, max(-reach, min(reach, place - t)) + reach] if ordered and table is not None else 0.0
            scores[slot] = memory.keys[1, b, head, slot] @ queries[b, head, stream, t] / math.sqrt(8) + bias
        assert_alike(maps[b, stream, t, head], scores.softmax(0))
    expected = torch.einsum("bkths,bhsd->bkthd", maps, memory.values[1]).flatten(3).flatten(0, 1)
    assert_alike(read[0], expected)


@every_kind
def test_a_text_that_is_there_is_looked_over_as_it_was_said(kind):
    decoder, memory, tokens, recorder = (
        random_decoder(**KINDS[kind]),
        text_and_grid(),
        random_tokens(2, 2, 5),
        QueryRecorder(),
    )
    with torch.no_grad():
        step = CachedDecodeStep(decoder, memory, 4, recorder)
        step.prefill(tokens[:, :, :2], torch.ones(2, 2, 2, dtype=torch.bool))
        [step(tokens[:, :, place].flatten()) for place in range(2, 5)]
    stepwise = torch.stack([attention_maps(recorder, memory, 2, layer) for layer in (0, 1)], 3)
    assert_alike(stepwise, attention_for_tokens(decoder, memory, tokens), atol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 3], [3, 1], [3, 3, 3, 3], [3, 1, 2, 3]], ids=str)
@every_kind
@torch.inference_mode()
def test_one_pass_is_step_by_step_unrolled_or_not(kind, lengths):
    """Streams of one memory stand at different positions, and change places in between."""
    decoder, memory = random_decoder(**KINDS[kind]), text_and_grid()
    streams = len(lengths) // 2
    tokens = random_tokens(2, streams, 3)
    mask = (torch.arange(3) < torch.tensor(lengths)[:, None]).view(2, streams, 3)
    steps = [CachedDecodeStep(decoder, memory, 8, unrolled=unrolled) for unrolled in (True, False)]
    steps.append(UncachedDecodeStep(decoder, memory))
    assert steps[0].unrolled and not steps[1].unrolled
    fast, slow, slowest = (step.prefill(tokens, mask) for step in steps)
    assert_alike(fast, slowest), assert_alike(slow, slowest)
    for turn in range(6):
        said = torch.randint(VOCAB_SIZE, (2 * streams,))
        fast, slow, slowest = (step(said) for step in steps)
        assert_alike(fast, slowest, 1e-5), assert_alike(slow, slowest, 1e-5)
        if turn == 2 and streams == 2:
            [step.reorder(torch.tensor([1, 1, 3, 2])) for step in steps]
        if turn == 4:
            [step.select(torch.tensor([1, 0])) for step in steps]


@every_kind
@torch.inference_mode()
def test_beams_say_the_same_unrolled_or_not_and_without_a_cache(kind):
    decoder, memory = random_decoder(**KINDS[kind]), text_and_grid()
    tokens, mask = random_tokens(2, 2, 3), torch.tensor([[[True] * 3, [True, True, False]]] * 2)
    config = GenerationConfig(max_new_tokens=6, num_beams=3)
    steps = [CachedDecodeStep(decoder, memory, 6), CachedDecodeStep(decoder, memory, 6, unrolled=False)]
    found = [generate(step, tokens, mask, config, eos=2) for step in (*steps, UncachedDecodeStep(decoder, memory))]
    said = [[[list(texts[0].tokens) for texts in row] for row in one] for one in found]
    assert said[0] == said[1] == said[2]
    assert len({tuple(text) for row in said[0] for text in row}) > 1


@pytest.mark.parametrize("side", ["left", "right"])
@every_kind
def test_padding_and_neighbours_change_no_distance(kind, side):
    """A text of 3 tokens beside one of 5 says what it says alone."""
    decoder, memory, tokens = random_decoder(**KINDS[kind]), text_and_grid(1), random_tokens(1, 2, 5)
    mask = torch.tensor([[[True] * 5, [True] * 3 + [False] * 2]])
    mask = mask if side == "right" else mask.flip(-1)
    together = decoder(tokens, memory, mask)
    short = tokens[:, 1:][mask[:, 1:]].view(1, 1, 3)
    assert_alike(together[:, 1][mask[:, 1]], decoder(short, memory)[0, 0])
    assert_alike(together[:, :1], decoder(tokens[:, :1], memory))


@every_kind
def test_the_order_of_joined_sources_changes_no_output(kind):
    """Each source counts its own slots from nought, wherever it stands in the memory."""
    decoder, tokens = random_decoder(**KINDS[kind]), random_tokens(2, 2, 4)
    parts = [random_memory(slots=n, masked=1, source=str(n)) for n in (3, 5)] + [random_memory(slots=4, grid=(2, 2))]
    first = decoder(tokens, cat(*parts))
    assert_alike(decoder(tokens, cat(*parts[::-1])), first)
    assert_alike(decoder(tokens, cat(parts[1], parts[2], parts[0])), first)


@every_kind
def test_a_grid_has_no_distance_and_is_in_view_from_the_start(kind):
    torch.manual_seed(3)
    decoder, grid, tokens = random_decoder(**KINDS[kind]), random_memory(slots=5, grid=(2, 2)), random_tokens(2, 2, 4)
    plain = random_decoder(**{name: fact for name, fact in KINDS[kind].items() if name == "positions"})
    plain.load_state_dict({n: t for n, t in decoder.state_dict().items() if not n.startswith("distance_bias")})
    assert torch.allclose(decoder(tokens, grid), plain(tokens, grid), atol=1e-6)
    sequence = Memory(grid.keys, grid.values, grid.mask, (Segment("text", 0, 5),))
    assert (decoder(tokens, sequence) - plain(tokens, sequence)).abs().max() > 1e-2
    assert (attention_for_tokens(decoder, grid, tokens) > 0).all()


def test_a_visibility_and_what_is_hidden_narrow_the_view_further():
    decoder, memory, tokens = random_decoder(wait_k=2), random_memory(slots=5), random_tokens(2, 1, 4)
    recorder, hidden = QueryRecorder(), torch.tensor([True, False, False, False, False])
    visibility = torch.rand(4, 5) < 0.7
    decoder(tokens, memory.mask_out(hidden), recorder=recorder, visibility=visibility)
    maps = attention_maps(recorder, memory, 1, 0)[:, 0]
    seen = visibility & wait_k_visibility(4, 5, 2) & ~hidden
    assert torch.equal(maps > 0, seen[None, :, None].expand_as(maps))


def test_wait_k_in_the_decoder_is_the_visibility_given_to_a_plain_one():
    waits, plain, memory, tokens = random_decoder(wait_k=2), random_decoder(), random_memory(), random_tokens(2, 2, 4)
    plain.load_state_dict(waits.state_dict())
    assert torch.equal(waits(tokens, memory), plain(tokens, memory, visibility=wait_k_visibility(4, 5, 2)))


def test_gradients_reach_the_table_where_a_distance_occurs():
    decoder = random_decoder(cross_positions="relative", cross_reach=4).requires_grad_(True)
    decoder(random_tokens(1, 1, 3), random_memory(1, slots=2)).square().sum().backward()
    gradient = decoder.relative_position_bias.weight.grad
    occurring = torch.tensor([-2, -1, 0, 1]) + 4
    assert (gradient[:, occurring].abs() > 1e-4).all()
    gradient[:, occurring] = 0
    assert (gradient == 0).all(), "distances of 2 to 4, and of -3 and -4, do not occur"


def test_gradients_of_a_bias_are_those_of_small_differences():
    """The table in float64, by central differences."""
    decoder = random_decoder(cross_positions="relative", cross_reach=2, wait_k=1).double()
    memory, tokens = random_memory(dtype=torch.float64), random_tokens(2, 2, 3)
    table = decoder.relative_position_bias.weight.requires_grad_(True)

    def score(changed):
        decoder.relative_position_bias.weight.data = changed
        return decoder(tokens, memory).log_softmax(-1)[..., 0].sum()

    at = table.detach().clone()
    (found,) = torch.autograd.grad(score(at.clone()), table)
    with torch.no_grad():
        for head, place in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
            step = torch.zeros_like(at).index_put(
                (torch.tensor(head), torch.tensor(place)), torch.tensor(1e-5).double()
            )
            slope = (score(at + step) - score(at - step)) / 2e-5
            assert float(slope) == pytest.approx(float(found[head, place]), abs=1e-7)


def test_an_untrained_bias_changes_nothing():
    decoder, plain, memory, tokens = (
        random_decoder(**KINDS["relative"]),
        random_decoder(),
        random_memory(),
        random_tokens(2, 2, 4),
    )
    decoder.load_state_dict({**plain.state_dict(), "relative_position_bias.weight": torch.zeros(2, 7)})
    assert_alike(decoder(tokens, memory), plain(tokens, memory))


# ---- what cannot be told apart without -------------------------------------------------------------------------------

SOURCE, EQUAL = "xyxz", (0, 2)  # two equal words, with another between them


def reads(position="none", encoder="none", causal=False, **decoder):
    """A lively model of one text source, whose encoder sees all and whose positions are where they are asked for."""
    options = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "positions": encoder, "causal": causal}
    source = SourceConfig(encoder="text", options=options, projection=ProjectionConfig(positions=position))
    return randomize_parameters(tiny_model({"text": source}, **decoder)).requires_grad_(False)


def places_of(model):
    """Where the two equal words stand among the slots."""
    tokens = model.encoder("text").prepare(SOURCE)["tokens"].tolist()
    found = [place for place, token in enumerate(tokens) if token == model.tokenizer.encode("x")[-1]]
    assert len(found) == 2
    return found


def apart(model):
    """The largest difference, over words, layers and heads, of the weights on two equal words of the source."""
    memory, tokens = model.encode({"text": model.collate("text", [SOURCE])}, 1), torch.randint(6, 262, (1, 2, 5))
    maps = attention_for_tokens(model.decoder, memory, tokens)
    first, second = places_of(model)
    return float((maps[..., first] - maps[..., second]).abs().max())


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "none"])
def test_positions_on_queries_alone_cannot_tell_two_equal_words_apart(positions):
    """The decoder knows where it is, and no slot does: equal words have equal keys, and equal weights."""
    model = reads(positions=positions)
    memory = model.encode({"text": model.collate("text", [SOURCE])}, 1)
    first, second = places_of(model)
    assert_alike(memory.keys[..., first, :], memory.keys[..., second, :])
    assert apart(model) < 1e-7


@pytest.mark.parametrize(
    "facts",
    [
        {"positions": "learned"},
        {"positions": "sinusoidal"},
        {"cross_attention_positions": "relative", "max_relative_distance": 4},
        {"encoder": "learned"},
        {"encoder": "sinusoidal"},
        {"encoder": "rope"},
        {"causal": True},
    ],
    ids=["learned keys", "sinusoidal keys", "relative bias", "learned words", "sinusoidal words", "rope", "causal"],
)
def test_with_a_place_in_keys_words_or_scores_they_can(facts):
    """A causal encoder needs no positions: what came before a word says where it stands."""
    assert apart(reads(**facts)) > 1e-3


def test_without_places_a_source_is_a_bag_of_words():
    """Its words in another order give the same text; any one of the places makes an order of it."""

    def said(model, order):
        tokens = torch.tensor([[[7, 8, 9, 10]]])
        inputs = model.collate("text", [SOURCE])
        inputs.inputs["tokens"] = inputs.inputs["tokens"][:, order]
        return model.decoder(tokens, model.encode({"text": inputs}, 1))

    for facts, same in (
        ({}, True),
        ({"positions": "learned"}, False),
        ({"cross_attention_positions": "relative"}, False),
    ):
        model = reads(**facts)
        slots = len(model.encoder("text").prepare(SOURCE)["tokens"])
        gap = (said(model, list(range(slots))) - said(model, [1, 0, *range(slots - 1, 1, -1)])).abs().max()
        assert (gap < 1e-5) == same, (facts, float(gap))
        assert same or gap > 1e-2
