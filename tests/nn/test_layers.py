"""Layers against their formulas, against PyTorch's own, and for what they promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmx.config.schema import BaseTransformerConfig
from mmx.nn.layers import (
    Dropout,
    LearnedPositionEmbedding,
    RotaryEmbedding,
    SelfAttention,
    SinusoidalPositionEmbedding,
    TanhGate,
    TokenEmbedding,
    build_feed_forward,
    build_norm,
    build_position_embedding,
    build_residual,
    init_weights,
    merge_heads,
    position_ids_from_mask,
    split_heads,
)

properties = settings(max_examples=50, deadline=None)


def config(**facts):
    return BaseTransformerConfig(**{"hidden_size": 8, "num_heads": 2, "num_layers": 1, "dropout": 0.0, **facts})


# ---- positions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 8, 9])
def test_sinusoidal_positions_against_the_formula(width):
    half = width // 2
    made = SinusoidalPositionEmbedding(width)(torch.tensor([[0, 1, 50], [7, 3, 1000]]))
    for row, places in enumerate(([0, 1, 50], [7, 3, 1000])):
        for column, place in enumerate(places):
            for wave in range(half):
                angle = place * 10000.0 ** (-wave / max(half - 1, 1))
                # A float32 angle of 1000 radians is known to 6e-5.
                assert float(made[row, column, wave]) == pytest.approx(math.sin(angle), abs=2e-4)
                assert float(made[row, column, half + wave]) == pytest.approx(math.cos(angle), abs=2e-4)
    assert (made[..., 2 * half :] == 0).all()


def test_learned_positions_are_rows_of_a_table():
    positions = LearnedPositionEmbedding(10, 4)
    assert torch.equal(positions(torch.tensor([[3, 0]])), positions.weight[[3, 0]][None])


@pytest.mark.parametrize("kind", ["rope", "none"])
def test_some_schemes_add_nothing(kind):
    assert build_position_embedding(config(positions=kind))(torch.tensor([[1, 2]])) == 0.0


@properties
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 200), st.sampled_from([2, 4, 16]))
def test_rotary_scores_depend_on_the_distance_alone(place, other, shift, width):
    rotary, (query, key) = RotaryEmbedding(width), torch.randn(2, 1, 1, 1, width)

    def score(p, q):
        return (rotary(query, torch.tensor([[p]])) * rotary(key, torch.tensor([[q]]))).sum()

    # Angles of up to 230 radians in float32, known to 1.5e-5, times numbers of up to about 4.
    torch.testing.assert_close(score(place, other), score(place + shift, other + shift), atol=5e-4, rtol=0)


def test_rotary_turns_and_keeps_lengths():
    rotary, x = RotaryEmbedding(4, theta=100.0), torch.randn(2, 3, 5, 4)
    positions = torch.arange(5).expand(2, 5)
    turned = rotary(x, positions)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert (turned[:, :, 1:] - x[:, :, 1:]).abs().max() > 0.1
    # Pairs (0, 2) and (1, 3), at 1 and 1/10 radian a position.
    first = x[0, 0, 3, 0] * math.cos(3) - x[0, 0, 3, 2] * math.sin(3)
    last = x[0, 0, 3, 3] * math.cos(0.3) + x[0, 0, 3, 1] * math.sin(0.3)
    torch.testing.assert_close(turned[0, 0, 3, [0, 3]], torch.stack([first, last]))


def test_padding_counts_no_position():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()
    assert position_ids_from_mask(mask).tolist() == [[0, 1, 2, 2], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


# ---- norms, feed-forwards, gates, residuals --------------------------------------------------------------------


def test_norms_against_their_formulas():
    x = torch.randn(3, 8, dtype=torch.float64) * 3 + 1
    layer, rms = (build_norm(kind, 8, 1e-3).double() for kind in ("layer", "rms"))
    deviation = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-3).sqrt()
    torch.testing.assert_close(layer(x), deviation)
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())
    assert build_norm("none", 8)(x) is x


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_feed_forward_against_its_formula(kind, gated):
    layer = build_feed_forward(config(feed_forward=kind, gated=gated, feed_forward_width=12)).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    inside = ACTIVATIONS[kind](layer.gate(x)) * layer.up(x) if gated else ACTIVATIONS[kind](layer.up(x))
    torch.testing.assert_close(layer(x), F.linear(inside, layer.out.weight, layer.out.bias), atol=1e-12, rtol=0)
    assert sum(p.numel() for p in layer.parameters()) == (3 if gated else 2) * 8 * 12 + (2 if gated else 1) * 12 + 8


def test_without_biases_there_is_none():
    parts = [SelfAttention(config(biases=False)), build_feed_forward(config(biases=False, gated=True))]
    assert not [name for part in parts for name, _ in part.named_parameters() if name.endswith("bias")]


def test_a_gate_starts_shut_and_can_open():
    gate, x = TanhGate(), torch.randn(2, 3)
    assert (gate(x) == 0).all()
    (opening,) = torch.autograd.grad(gate(x).sum(), gate.parameters())
    torch.testing.assert_close(opening[0], x.sum())
    nn.init.constant_(gate.alpha, 0.5)
    torch.testing.assert_close(gate(x), math.tanh(0.5) * x)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_residual_paths(placement):
    residual = build_residual(config(norm_placement=placement))
    nn.init.normal_(residual.norm.weight)
    x, weight = torch.randn(2, 3, 8), torch.randn(8, 8)
    expected = x + residual.norm(x) @ weight if placement == "pre" else residual.norm(x + x @ weight)
    torch.testing.assert_close(residual(x, lambda y: y @ weight), expected)


def test_token_embedding_against_its_formula():
    layer = TokenEmbedding(config(embedding_scale=3.0, embedding_norm=True), 11)
    nn.init.normal_(layer.norm.bias)
    tokens, positions = torch.tensor([[4, 4, 0]]), torch.tensor([[0, 1, 2]])
    expected = layer.norm(3.0 * layer.weight[tokens] + layer.positions.weight[positions])
    torch.testing.assert_close(layer(tokens, positions), expected)


# ---- dropout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.004, 0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(probability):
    rounded, count = round(probability * 256) / 256, 1_000_003
    assert abs(rounded - probability) <= 1 / 512
    out = Dropout(probability).train()(torch.ones(count))
    zeros = int((out == 0).sum())
    assert abs(zeros / count - rounded) < 5 * math.sqrt(rounded * (1 - rounded) / count), "five standard deviations"
    assert torch.equal(out[out != 0].unique(), torch.tensor([1 / (1 - rounded)]))
    assert float(out.mean()) == pytest.approx(1, abs=5 * math.sqrt(rounded / (1 - rounded) / count))


def test_dropout_does_nothing_in_eval_or_at_zero():
    x = torch.randn(3, 5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


@pytest.mark.parametrize("probability", [0.998, 0.999999])
def test_dropout_near_one_still_keeps_something(probability):
    out = Dropout(probability).train()(torch.ones(100_000))
    assert torch.equal(out.unique(), torch.tensor([0.0, 256.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_repeats_itself_and_its_gradient_is_its_mask(dtype):
    layer, x = Dropout(0.3).train(), torch.randn(7, 11, 3).to(dtype).transpose(0, 1).requires_grad_()
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    again, other = layer(x), layer(x)
    assert first.dtype == dtype
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient == 0, first == 0)
    assert torch.equal(gradient * x, first)


def test_dropout_draws_each_number_by_itself():
    """Neighbours, and numbers eight apart (the bytes of one random word), fall out independently."""
    fell = (Dropout(0.5).train()(torch.ones(800_000)) == 0).float() - 0.5
    for apart in (1, 2, 4, 7, 8):
        agreement = float((fell[apart:] * fell[:-apart]).mean()) * 4
        assert abs(agreement) < 5 / math.sqrt(800_000)


# ---- self-attention and shapes ---------------------------------------------------------------------------------


def test_self_attention_against_torch():
    ours, theirs = SelfAttention(config()).double(), nn.MultiheadAttention(8, 2, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    x, mask = torch.randn(3, 5, 8, dtype=torch.float64), torch.ones(5, 5, dtype=torch.bool).tril()
    expected, _ = theirs(x, x, x, attn_mask=~mask)
    positions = torch.arange(5).expand(3, 5)
    torch.testing.assert_close(ours(x, mask[None, None], positions), expected, atol=1e-12, rtol=0)


@properties
@given(*[st.integers(1, 5)] * 4)
def test_merging_heads_undoes_splitting(n, length, heads, width):
    x = torch.randn(n, length, heads * width)
    apart = split_heads(x, heads)
    assert apart.shape == (n, heads, length, width)
    assert torch.equal(apart[:, heads - 1], x[..., (heads - 1) * width :])
    assert torch.equal(merge_heads(apart), x)


def test_initial_weights_shrink_with_depth_on_the_way_back():
    layer = SelfAttention(config(width=256, heads=4)).requires_grad_(False)
    init_weights(nn.ModuleDict({"self_attention": layer}), 8)
    assert float(layer.qkv.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(layer.out.weight.std()) == pytest.approx(0.02 / 4, rel=0.02)
    assert not layer.qkv.bias.any()
