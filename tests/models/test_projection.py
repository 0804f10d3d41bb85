"""KeyValueProjection: features to keys and values; positions are added to the keys only."""

import pytest
import torch
from decoder_cases import random_decoder, random_tokens, randomize_parameters

from mmx.config.schema import DecoderConfig, ProjectionConfig
from mmx.errors import EncoderError
from mmx.memory import Memory, Segment, cat
from mmx.models.projection import KeyValueProjection
from mmx.nn.features import Features

FEATURE_SIZE = 12
DECODER = DecoderConfig(hidden_size=16, num_heads=2, num_layers=3)


def random_projection(dimensions=1, decoder=DECODER, tie_layers=False, **config):
    config = ProjectionConfig(**config)
    projection = KeyValueProjection(config, decoder, FEATURE_SIZE, dimensions, "image", tie_layers)
    return randomize_parameters(projection).eval().requires_grad_(False)


def random_features(batch=2, slots=6, grid=None):
    return Features(torch.randn(batch, slots, FEATURE_SIZE), torch.rand(batch, slots) < 0.8, grid)


def test_keys_and_values_equal_the_linear_layers_of_each_head():
    """keys[l, b, h, s] are rows of one linear layer of norm(state) + position; values of norm(state)."""
    projection, features = random_projection(), random_features()
    memory = projection(features)
    content = projection.norm(features.states)
    with_positions = content + projection.positions.along[0].weight[:6]
    for layer in range(3):
        for head in range(2):
            rows = slice((layer * 2 + head) * 8, (layer * 2 + head + 1) * 8)
            keys = with_positions @ projection.key.weight[rows].T + projection.key.bias[rows]
            values = content @ projection.value.weight[rows].T + projection.value.bias[rows]
            torch.testing.assert_close(memory.keys[layer, :, head], keys, atol=1e-5, rtol=0)
            torch.testing.assert_close(memory.values[layer, :, head], values, atol=1e-5, rtol=0)
    assert torch.equal(memory.mask, features.mask)
    assert memory.layout == (Segment("image", 0, 6),)


@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize(("dimensions", "grid"), [(1, None), (2, (2, 3))])
def test_positions_change_the_keys_and_not_the_values(positions, dimensions, grid):
    projection = random_projection(dimensions, positions=positions)
    same = Features(
        torch.randn(1, 1, FEATURE_SIZE).expand(1, 6, FEATURE_SIZE), torch.ones(1, 6, dtype=torch.bool), grid
    )
    memory = projection(same)
    torch.testing.assert_close(memory.values, memory.values[:, :, :, :1].expand_as(memory.values))
    for slot in range(1, 6):
        apart = float((memory.keys[:, :, :, slot] - memory.keys[:, :, :, 0]).abs().max())
        assert apart < 1e-5 if positions == "none" else apart > 1e-2
    assert memory.layout == (Segment("image", 0, 6, grid),)


def test_positions_of_a_grid_are_the_sum_of_row_and_column():
    projection = random_projection(2)
    positions = projection.positions(random_features(slots=8, grid=(2, 3)), "image")
    by_row, by_column = (embedding.weight for embedding in projection.positions.along)
    assert (positions[:2] == 0).all()
    for row in range(2):
        for column in range(3):
            assert torch.equal(positions[2 + row * 3 + column], by_row[row] + by_column[column])


def test_features_without_a_grid_have_no_grid_positions():
    assert (random_projection(2).positions(random_features(), "image") == 0).all()


@pytest.mark.parametrize(("dimensions", "grid", "slots"), [(1, None, 5), (2, (1, 5), 5), (2, (5, 1), 7)])
def test_more_positions_than_learned_are_refused(dimensions, grid, slots):
    projection = random_projection(dimensions, max_position_embeddings=4)
    with pytest.raises(EncoderError) as error:
        projection(random_features(slots=slots, grid=grid))
    assert error.value.code == "projection.too_long"
    assert error.value.details == {"source": "image", "length": 5, "maximum": 4}
    assert "model.sources.image.projection.max_position_embeddings=5" in str(error.value)
    random_projection(dimensions, max_position_embeddings=4, positions="sinusoidal")(
        random_features(slots=slots, grid=grid)
    )


def test_padding_of_features_changes_no_other_key():
    projection, features = random_projection(), random_features()
    memory = projection(features)
    padded = projection(
        Features(
            torch.cat([features.states, 1e4 * torch.randn(2, 9, FEATURE_SIZE)], 1),
            torch.cat([features.mask, torch.zeros(2, 9, dtype=torch.bool)], 1),
        )
    )
    torch.testing.assert_close(padded.keys[:, :, :, :6], memory.keys, atol=1e-6, rtol=0)
    torch.testing.assert_close(padded.values[:, :, :, :6], memory.values, atol=1e-6, rtol=0)


def test_one_tied_layer_equals_three_equal_layers():
    decoder, tokens, features = random_decoder(num_layers=3), random_tokens(), random_features()
    tied, untied = random_projection(tie_layers=True), random_projection()
    for one, three in ((tied.key, untied.key), (tied.value, untied.value)):
        three.weight.copy_(one.weight.repeat(3, 1))
        three.bias.copy_(one.bias.repeat(3))
    untied.norm.load_state_dict(tied.norm.state_dict())
    untied.positions.load_state_dict(tied.positions.state_dict())
    small, large = tied(features), untied(features)
    assert small.keys.shape == (1, 2, 2, 6, 8)
    assert large.nbytes == 3 * small.nbytes
    torch.testing.assert_close(small.keys.expand_as(large.keys), large.keys, atol=1e-6, rtol=0)
    torch.testing.assert_close(decoder(tokens, small), decoder(tokens, large), atol=1e-5, rtol=0)


def test_one_layer_is_projected_for_each_layer_with_cross_attention():
    decoder = DecoderConfig(hidden_size=16, num_heads=2, num_layers=5, cross_attention_every_n_layers=2)
    assert decoder.cross_attention_layers == (1, 3)
    assert random_projection(decoder=decoder)(random_features()).keys.shape[0] == 2


def test_the_bias_of_the_keys_matters_with_two_sources_only():
    """It shifts all scores of one source equally."""
    projection, features, decoder, tokens = (
        random_projection(),
        random_features(),
        random_decoder(num_layers=3),
        random_tokens(),
    )
    before = projection(features)
    projection.key.bias.add_(torch.randn_like(projection.key.bias))
    after = projection(features)
    torch.testing.assert_close(decoder(tokens, before), decoder(tokens, after), atol=1e-5, rtol=0)
    other = random_projection()(random_features())
    apart = decoder(tokens, cat(before, other)) - decoder(tokens, cat(after, other))
    assert apart.abs().max() > 1e-2


@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_works_in_every_dtype(dtype, positions):
    projection, features = random_projection(positions=positions), random_features()
    exact = projection(features)
    other = projection.to(dtype)(features._replace(states=features.states.to(dtype)))
    assert isinstance(other, Memory)
    assert other.keys.dtype == other.values.dtype == dtype
    torch.testing.assert_close(other.keys.float(), exact.keys, atol=0.1, rtol=0.02)


def test_gradients_reach_every_parameter():
    projection = random_projection(norm="rms").requires_grad_(True)
    memory = projection(random_features())
    (memory.keys.square().sum() + memory.values.square().sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in projection.parameters())
