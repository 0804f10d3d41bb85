"""Layers against their formulas and against those of PyTorch."""

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
    SelfAttention,
    TanhGate,
    TiedLinear,
    TokenEmbedding,
    build_feed_forward,
    build_norm,
    build_residual,
    init_weights,
    merge_heads,
    split_heads,
)


def small_config(**options):
    return BaseTransformerConfig(**{"hidden_size": 8, "num_heads": 2, "num_layers": 1, "dropout": 0.0, **options})


# ---- norms, feed-forward, gate, residual connection, embedding -------------------------------------------------------


def test_norms_against_their_formulas():
    x = torch.randn(3, 8, dtype=torch.float64) * 3 + 1
    standardized = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-3).sqrt()
    torch.testing.assert_close(build_norm("layer", 8, 1e-3).double()(x), standardized)
    root_mean_square = (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(build_norm("rms", 8, 1e-3).double()(x), x / root_mean_square)
    assert build_norm("none", 8)(x) is x


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_feed_forward_against_its_formula(name, glu):
    layer = build_feed_forward(small_config(activation=name, glu=glu, intermediate_size=12)).double()
    activation = ACTIVATIONS[name]
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    inner = activation(layer.gate(x)) * layer.up(x) if glu else activation(layer.up(x))
    torch.testing.assert_close(layer(x), F.linear(inner, layer.out.weight, layer.out.bias), atol=1e-12, rtol=0)
    expected_size = (3 * 8 * 12 + 2 * 12 + 8) if glu else (2 * 8 * 12 + 12 + 8)
    assert sum(parameter.numel() for parameter in layer.parameters()) == expected_size


def test_bias_false_leaves_out_every_bias():
    for module in (SelfAttention(small_config(bias=False)), build_feed_forward(small_config(bias=False, glu=True))):
        assert not [name for name, _ in module.named_parameters() if name.endswith("bias")]


def test_tanh_gate_starts_at_zero():
    gate = TanhGate()
    x = torch.randn(2, 3)
    assert (gate(x) == 0).all()
    (gradient,) = torch.autograd.grad(gate(x).sum(), gate.parameters())
    torch.testing.assert_close(gradient[0], x.sum())
    nn.init.constant_(gate.alpha, 0.5)
    torch.testing.assert_close(gate(x), math.tanh(0.5) * x)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_residual_connection(placement):
    residual = build_residual(small_config(norm_placement=placement))
    nn.init.normal_(residual.norm.weight)
    x = torch.randn(2, 3, 8)
    weight = torch.randn(8, 8)
    expected = x + residual.norm(x) @ weight if placement == "pre" else residual.norm(x + x @ weight)
    torch.testing.assert_close(residual(x, torch.matmul, weight), expected)


def test_token_embedding_against_its_formula():
    layer = TokenEmbedding(small_config(embedding_scale=3.0, embedding_norm=True), 11)
    nn.init.normal_(layer.norm.bias)
    tokens = torch.tensor([[4, 4, 0]])
    positions = torch.tensor([[0, 1, 2]])
    expected = layer.norm(3.0 * layer.weight[tokens] + layer.positions.weight[positions])
    torch.testing.assert_close(layer(tokens, positions), expected)


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.004, 0.1, 0.5, 0.9])
def test_dropout_rate_and_mean(probability):
    rounded = round(probability * 256) / 256
    count = 1_000_003
    assert abs(rounded - probability) <= 1 / 512
    output = Dropout(probability).train()(torch.ones(count))
    rate = int((output == 0).sum()) / count
    assert abs(rate - rounded) < 5 * math.sqrt(rounded * (1 - rounded) / count), "five standard deviations"
    assert torch.equal(output[output != 0].unique(), torch.tensor([1 / (1 - rounded)]))
    assert float(output.mean()) == pytest.approx(1, abs=5 * math.sqrt(rounded / (1 - rounded) / count))


def test_dropout_is_the_identity_in_eval_mode_or_at_zero():
    x = torch.randn(3, 5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


@pytest.mark.parametrize("probability", [0.998, 0.999999])
def test_dropout_near_one_keeps_some_elements(probability):
    output = Dropout(probability).train()(torch.ones(100_000))
    assert torch.equal(output.unique(), torch.tensor([0.0, 256.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_is_reproducible_and_its_gradient_is_its_mask(dtype):
    layer = Dropout(0.3).train()
    x = torch.randn(7, 11, 3).to(dtype).transpose(0, 1).requires_grad_()
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    again = layer(x)
    other = layer(x)
    assert first.dtype == dtype
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient == 0, first == 0)
    assert torch.equal(gradient * x, first)


def test_dropout_elements_are_independent():
    """Neighbors, and elements eight apart (the bytes of one random word)."""
    centered = (Dropout(0.5).train()(torch.ones(800_000)) == 0).float() - 0.5
    for distance in (1, 2, 4, 7, 8):
        correlation = float((centered[distance:] * centered[:-distance]).mean()) * 4
        assert abs(correlation) < 5 / math.sqrt(800_000)


# ---- self-attention and shapes ---------------------------------------------------------------------------------------


def test_self_attention_against_pytorch():
    layer = SelfAttention(small_config()).double()
    reference = nn.MultiheadAttention(8, 2, batch_first=True).double()
    reference.load_state_dict(
        {
            "in_proj_weight": layer.qkv.weight,
            "in_proj_bias": layer.qkv.bias,
            "out_proj.weight": layer.out.weight,
            "out_proj.bias": layer.out.bias,
        }
    )
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected, _ = reference(x, x, x, attn_mask=~mask)
    positions = torch.arange(5).expand(3, 5)
    torch.testing.assert_close(layer(x, mask[None, None], positions), expected, atol=1e-12, rtol=0)


def test_tied_linear_uses_the_weights_of_its_owner_without_registering_them():
    owner = nn.Linear(4, 6)
    tied = TiedLinear(owner)
    x = torch.randn(2, 4)
    assert torch.equal(tied(x), owner(x))
    assert tied.weight is owner.weight
    assert not list(tied.parameters()) and not tied.state_dict()
    assert tied(x.to(torch.bfloat16)).dtype == torch.bfloat16


@settings(max_examples=50, deadline=None)
@given(*[st.integers(1, 5)] * 4)
def test_merge_heads_is_the_inverse_of_split_heads(rows, length, heads, head_dim):
    x = torch.randn(rows, length, heads * head_dim)
    split = split_heads(x, heads)
    assert split.shape == (rows, heads, length, head_dim)
    assert torch.equal(split[:, heads - 1], x[..., (heads - 1) * head_dim :])
    assert torch.equal(merge_heads(split), x)


def test_initial_output_weights_shrink_with_depth():
    layer = SelfAttention(small_config(hidden_size=256, num_heads=4)).requires_grad_(False)
    init_weights(nn.ModuleDict({"self_attention": layer}), 8)
    assert float(layer.qkv.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(layer.out.weight.std()) == pytest.approx(0.02 / 4, rel=0.02)
    assert not layer.qkv.bias.any()
