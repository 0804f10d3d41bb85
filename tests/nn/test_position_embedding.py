"""Position embeddings against their formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.config.schema import BaseTransformerConfig
from mmx.nn.position_embedding import (
    LearnedPositionEmbedding,
    RotaryEmbedding,
    SinusoidalPositionEmbedding,
    build_position_embedding,
    position_ids_from_mask,
)


@pytest.mark.parametrize("hidden_size", [2, 8, 9])
def test_sinusoidal_positions_against_the_formula(hidden_size):
    half = hidden_size // 2
    rows = [[0, 1, 50], [7, 3, 1000]]
    embedded = SinusoidalPositionEmbedding(hidden_size)(torch.tensor(rows))
    for row, positions in enumerate(rows):
        for column, position in enumerate(positions):
            for index in range(half):
                angle = position * 10000.0 ** (-index / max(half - 1, 1))
                # A float32 angle of 1000 radians has an error of up to 6e-5.
                assert float(embedded[row, column, index]) == pytest.approx(math.sin(angle), abs=2e-4)
                assert float(embedded[row, column, half + index]) == pytest.approx(math.cos(angle), abs=2e-4)
    assert (embedded[..., 2 * half :] == 0).all()


def test_learned_positions_are_rows_of_the_weight():
    embedding = LearnedPositionEmbedding(10, 4)
    assert torch.equal(embedding(torch.tensor([[3, 0]])), embedding.weight[[3, 0]][None])


@pytest.mark.parametrize("kind", ["rope", "none"])
def test_rotary_and_no_positions_add_nothing_to_the_embedding(kind):
    config = BaseTransformerConfig(hidden_size=8, num_heads=2, positions=kind)
    assert build_position_embedding(config)(torch.tensor([[1, 2]])) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 200), st.sampled_from([2, 4, 16]))
def test_rotary_scores_depend_only_on_the_distance(first, second, shift, head_dim):
    rotary = RotaryEmbedding(head_dim)
    query, key = torch.randn(2, 1, 1, 1, head_dim)

    def score(query_position, key_position):
        rotated_query = rotary(query, torch.tensor([[query_position]]))
        return (rotated_query * rotary(key, torch.tensor([[key_position]]))).sum()

    # Float32 angles of up to 230 radians have an error of 1.5e-5, times values of up to about 4.
    torch.testing.assert_close(score(first, second), score(first + shift, second + shift), atol=5e-4, rtol=0)


def test_rotary_embedding_by_hand():
    rotary = RotaryEmbedding(4, theta=100.0)
    x = torch.randn(2, 3, 5, 4)
    rotated = rotary(x, torch.arange(5).expand(2, 5))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])
    assert (rotated[:, :, 1:] - x[:, :, 1:]).abs().max() > 0.1
    # Pairs (0, 2) and (1, 3) rotate by 1 and 1/10 radian per position.
    first = x[0, 0, 3, 0] * math.cos(3) - x[0, 0, 3, 2] * math.sin(3)
    last = x[0, 0, 3, 3] * math.cos(0.3) + x[0, 0, 3, 1] * math.sin(0.3)
    torch.testing.assert_close(rotated[0, 0, 3, [0, 3]], torch.stack([first, last]))


def test_padding_has_no_position():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()
    assert position_ids_from_mask(mask).tolist() == [[0, 1, 2, 2], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
