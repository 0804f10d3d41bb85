"""KeyValueProjection: features to keys and values; positions stand on the keys, values stay content."""

import pytest
import torch
from decoder_cases import randomize_parameters, random_decoder, random_tokens

from mmx.config.schema import DecoderConfig, ProjectionConfig
from mmx.errors import EncoderError
from mmx.memory import Memory, Segment, cat
from mmx.models.projection import KeyValueProjection
from mmx.nn.features import Features

WIDTH = 12
DECODER = DecoderConfig(hidden_size=16, num_heads=2, num_layers=3)


def some_projection(dimensions=1, decoder=DECODER, **facts):
    projection = KeyValueProjection(ProjectionConfig(**facts), decoder, WIDTH, dimensions, "image")
    return randomize_parameters(projection).eval().requires_grad_(False)


def some_features(batch=2, slots=6, grid=None):
    return Features(torch.randn(batch, slots, WIDTH), torch.rand(batch, slots) < 0.8, grid)


def test_keys_and_values_by_hand():
    """keys[l, b, h, s] is one linear map of norm(state) + position, cut in layers and heads; values of norm(state)."""
    projection, features = some_projection(), some_features()
    memory = projection(features)
    content = projection.norm(features.states)
    placed = content + projection.positions.along[0].weight[:6]
    for layer in range(3):
        for head in range(2):
            rows = slice((layer * 2 + head) * 8, (layer * 2 + head + 1) * 8)
            keys = placed @ projection.key.weight[rows].T + projection.key.bias[rows]
            values = content @ projection.value.weight[rows].T + projection.value.bias[rows]
            torch.testing.assert_close(memory.keys[layer, :, head], keys, atol=1e-5, rtol=0)
            torch.testing.assert_close(memory.values[layer, :, head], values, atol=1e-5, rtol=0)
    assert torch.equal(memory.mask, features.mask)
    assert memory.layout == (Segment("image", 0, 6),)


@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize(("dimensions", "grid"), [(1, None), (2, (2, 3))])
def test_positions_go_on_the_keys_and_values_stay_content(position, dimensions, grid):
    projection = some_projection(dimensions, position=position)
    same = Features(torch.randn(1, 1, WIDTH).expand(1, 6, WIDTH), torch.ones(1, 6, dtype=torch.bool), grid)
    memory = projection(same)
    torch.testing.assert_close(memory.values, memory.values[:, :, :, :1].expand_as(memory.values))
    for slot in range(1, 6):
        apart = float((memory.keys[:, :, :, slot] - memory.keys[:, :, :, 0]).abs().max())
        assert apart < 1e-5 if position == "none" else apart > 1e-2
    assert memory.layout == (Segment("image", 0, 6, grid),)


def test_a_grid_has_rows_and_columns_and_the_slots_before_it_none():
    projection = some_projection(2)
    positions = projection.positions(some_features(slots=8, grid=(2, 3)), "image")
    by_row, by_column = (scheme.weight for scheme in projection.positions.along)
    assert (positions[:2] == 0).all()
    for row in range(2):
        for column in range(3):
            assert torch.equal(positions[2 + row * 3 + column], by_row[row] + by_column[column])


def test_features_without_a_grid_have_no_place_on_it():
    assert (some_projection(2).positions(some_features(), "image") == 0).all()


@pytest.mark.parametrize(("dimensions", "grid", "slots"), [(1, None, 5), (2, (1, 5), 5), (2, (5, 1), 7)])
def test_more_positions_than_learned_are_refused(dimensions, grid, slots):
    projection = some_projection(dimensions, max_positions=4)
    needed = r"gave 5 positions, its projection has 4 learned ones; set model\.sources\.image\.projection\."
    with pytest.raises(EncoderError, match=needed):
        projection(some_features(slots=slots, grid=grid))
    some_projection(dimensions, max_positions=4, position="sinusoidal")(some_features(slots=slots, grid=grid))


def test_padding_of_the_features_changes_no_key_that_exists():
    projection, features = some_projection(), some_features()
    memory = projection(features)
    padded = projection(
        Features(
            torch.cat([features.states, 1e4 * torch.randn(2, 9, WIDTH)], 1),
            torch.cat([features.mask, torch.zeros(2, 9, dtype=torch.bool)], 1),
        )
    )
    torch.testing.assert_close(padded.keys[:, :, :, :6], memory.keys, atol=1e-6, rtol=0)
    torch.testing.assert_close(padded.values[:, :, :, :6], memory.values, atol=1e-6, rtol=0)


def test_shared_layers_give_one_layer_that_says_what_equal_layers_would():
    decoder, tokens, features = random_decoder(layers=3), random_tokens(), some_features()
    shared, apart = some_projection(share_layers=True), some_projection()
    for one, three in ((shared.key, apart.key), (shared.value, apart.value)):
        three.weight.copy_(one.weight.repeat(3, 1))
        three.bias.copy_(one.bias.repeat(3))
    apart.norm.load_state_dict(shared.norm.state_dict())
    apart.positions.load_state_dict(shared.positions.state_dict())
    small, large = shared(features), apart(features)
    assert small.keys.shape == (1, 2, 2, 6, 8)
    assert large.nbytes == 3 * small.nbytes
    torch.testing.assert_close(small.keys.expand_as(large.keys), large.keys, atol=1e-6, rtol=0)
    torch.testing.assert_close(decoder(tokens, small), decoder(tokens, large), atol=1e-5, rtol=0)


def test_one_layer_is_projected_for_each_block_that_looks():
    decoder = DecoderConfig(hidden_size=16, num_heads=2, num_layers=5, cross_attention_every_n_layers=2)
    assert decoder.cross_attention_layers == (1, 3)
    assert some_projection(decoder=decoder)(some_features()).keys.shape[0] == 2


def test_the_bias_of_the_keys_alone_is_a_tag_without_effect():
    """Every score of a lone source moves alike, so nothing changes; beside another source it does."""
    projection, features, decoder, tokens = some_projection(), some_features(), random_decoder(layers=3), random_tokens()
    before = projection(features)
    projection.key.bias.add_(torch.randn_like(projection.key.bias))
    after = projection(features)
    torch.testing.assert_close(decoder(tokens, before), decoder(tokens, after), atol=1e-5, rtol=0)
    other = some_projection()(some_features())
    apart = decoder(tokens, cat(before, other)) - decoder(tokens, cat(after, other))
    assert apart.abs().max() > 1e-2


@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_works_in_every_floating_type(dtype, position):
    projection, features = some_projection(position=position), some_features()
    exact = projection(features)
    other = projection.to(dtype)(features._replace(states=features.states.to(dtype)))
    assert isinstance(other, Memory)
    assert other.keys.dtype == other.values.dtype == dtype
    torch.testing.assert_close(other.keys.float(), exact.keys, atol=0.1, rtol=0.02)


def test_gradients_reach_every_parameter():
    projection = some_projection(norm="rms").requires_grad_(True)
    memory = projection(some_features())
    (memory.keys.square().sum() + memory.values.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projection.parameters())
