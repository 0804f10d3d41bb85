"""Attention: the fused kernel, the plain formula and an explicit loop agree; masked slots have no effect."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.nn.attention import attention, attention_weights, fold_streams, unfold_streams

MASK_SHAPES = {
    "none": None,
    "slots": (2, 1, 1, 7),
    "shared slots": (1, 1, 1, 7),
    "queries": (5, 7),
    "heads": (1, 3, 5, 7),
    "all axes": (2, 3, 5, 7),
}
properties = settings(max_examples=50, deadline=None)


def random_qkv(dtype=torch.float32, slots=7, queries=5, seed=0):
    """queries [2, 3, Q, 4], keys and values [2, 3, S, 4]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, count, 4) for count in (queries, slots, slots)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def random_mask(shape, seed=1):
    return None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def attention_by_loop(queries, keys, values, mask=None, bias=None):
    """The definition, one query at a time, in float64; a query that may attend no slot gets zeros."""
    batch, heads, num_queries, head_dim = queries.shape
    shape = (batch, heads, num_queries, keys.shape[-2])
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    bias = torch.zeros(shape, dtype=torch.float64) if bias is None else bias.double().expand(shape)
    output = torch.zeros(queries.shape, dtype=torch.float64)
    for row, head, query in torch.cartesian_prod(*map(torch.arange, (batch, heads, num_queries))).tolist():
        vector = queries[row, head, query].double()
        exponentials = {}
        for slot in mask[row, head, query].nonzero()[:, 0].tolist():
            score = vector @ keys[row, head, slot].double() / math.sqrt(head_dim) + bias[row, head, query, slot]
            exponentials[slot] = math.exp(score)
        total = sum(exponentials.values())
        for slot, exponential in exponentials.items():
            output[row, head, query] += exponential / total * values[row, head, slot].double()
    return output


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mask_kind", MASK_SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, None)]
)
def test_fused_kernel_formula_and_loop_agree(dtype, tolerance, mask_kind, biased):
    queries, keys, values = random_qkv(dtype)
    mask = random_mask(MASK_SHAPES[mask_kind])
    bias = torch.randn(3, 5, 7).to(dtype) if biased else None
    if tolerance is None:
        # bfloat16 has 8 bits: a score is rounded three times (product, scale, bias), weight and sum once each.
        scores = (queries.double() @ keys.double().mT).abs().max() / 2 + 4
        tolerance = float((3 * scores + 2) * 2**-9 * values.abs().max())
        assert tolerance < 0.25
    weights = attention_weights(queries, keys, mask, bias)
    fused = attention(queries, keys, values, mask, bias)
    expected = attention_by_loop(queries, keys, values, mask, bias)
    assert fused.dtype == weights.dtype == dtype
    torch.testing.assert_close((weights @ values).double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(fused.double(), expected, atol=tolerance, rtol=0)


def test_attention_by_hand():
    """Scores ln 1 and ln 3 give weights 1/4 and 3/4."""
    queries = torch.tensor([[[[2.0, 0, 0, 0]]]])
    keys = torch.tensor([[[[0.0, 0, 0, 0], [math.log(3), 0, 0, 0]]]])
    values = torch.tensor([[[[4.0, 0, 0, 0], [0, 8.0, 0, 0]]]])
    expected = torch.tensor([[[[1.0, 6.0, 0, 0]]]])
    torch.testing.assert_close(attention_weights(queries, keys), torch.tensor([[[[0.25, 0.75]]]]))
    torch.testing.assert_close(attention(queries, keys, values), expected)
    torch.testing.assert_close(attention_by_loop(queries, keys, values), expected.double())


@properties
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from(list(MASK_SHAPES.values())[1:]), st.booleans())
def test_fused_kernel_and_formula_agree_for_any_length(seed, length, mask_shape, biased):
    queries, keys, values = random_qkv(torch.float64, queries=length, seed=seed)
    mask = random_mask(tuple(length if size == 5 else size for size in mask_shape), seed)
    bias = torch.randn(2, 1, 1, 7, dtype=torch.float64) if biased else None
    weights = attention_weights(queries, keys, mask, bias)
    torch.testing.assert_close(attention(queries, keys, values, mask, bias), weights @ values, atol=1e-12, rtol=0)
    allowed = mask.expand(weights.shape)
    assert (weights[~allowed] == 0).all()
    torch.testing.assert_close(weights.sum(-1), allowed.any(-1).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", [None, torch.ones(1, 1, 1, 7)], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fully_masked_query_gives_zeros_and_finite_gradients(dtype, bias):
    inputs = [tensor.requires_grad_() for tensor in random_qkv(dtype)]
    queries, keys, values = inputs
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 2] = False
    output = attention(queries, keys, values, mask, bias)
    weights = attention_weights(queries, keys, mask, bias)
    assert (output[0, :, 2] == 0).all()
    assert (weights[0, :, 2] == 0).all()
    assert (output[1] != 0).all()
    for result in (output, weights @ values):
        gradients = torch.autograd.grad(result.float().square().sum(), inputs, retain_graph=True)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert (gradients[0][0, :, 2] == 0).all()
        assert (gradients[0][1].float().abs().sum(-1) > 0).all()


def test_no_gradient_flows_where_every_query_is_fully_masked():
    inputs = [tensor.requires_grad_() for tensor in random_qkv()]
    output = attention(*inputs, torch.zeros(2, 1, 1, 7, dtype=torch.bool))
    assert (output == 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 1, 0, dtype=torch.bool)], ids=["no mask", "mask"])
def test_zero_slots_give_zeros(mask, dtype):
    queries, keys, values = random_qkv(dtype, slots=0)
    output = attention(queries, keys, values, mask)
    assert output.shape == queries.shape
    assert output.dtype == dtype
    assert (output == 0).all()
    assert attention_weights(queries, keys, mask).shape == (2, 3, 5, 0)


@pytest.mark.parametrize("case", ["identical keys", "zero queries"])
@pytest.mark.parametrize("masked", [False, True])
def test_equal_scores_give_the_mean(case, masked):
    """Of eight slots all or four may be attended: weights 1/8 and 1/4 and means of integers are exact in binary."""
    queries, keys, _ = random_qkv(slots=8)
    values = torch.arange(2 * 3 * 8 * 4).float().view(2, 3, 8, 4)
    if case == "identical keys":
        keys = keys[:, :, :1].expand_as(keys)
    else:
        queries = queries * 0
    mask = torch.arange(8).remainder(2).bool()[None] if masked else None
    allowed = values[:, :, mask[0]] if masked else values
    weights = attention_weights(queries, keys, mask)
    assert set(weights.unique().tolist()) == ({0.0, 1 / 4} if masked else {1 / 8})
    mean = allowed.mean(2, keepdim=True).expand_as(queries)
    assert torch.equal(weights @ values, mean)
    torch.testing.assert_close(attention(queries, keys, values, mask), mean, atol=0, rtol=2e-7)


@properties
@given(st.integers(0, 2**31), st.sampled_from([1e3, 1e15, -1e15]), st.booleans())
def test_the_contents_of_masked_slots_have_no_effect(seed, scale, biased):
    queries, keys, values = random_qkv(seed=seed)
    mask = random_mask((2, 1, 1, 7), seed)
    bias = torch.randn(2, 3, 5, 7) if biased else None
    masked = ~mask.reshape(2, 1, 7, 1)
    other_keys = torch.where(masked, scale * torch.randn_like(keys), keys)
    other_values = torch.where(masked, scale * torch.randn_like(values), values)
    weights = attention_weights(queries, keys, mask, bias)
    assert torch.equal(weights, attention_weights(queries, other_keys, mask, bias))
    output = attention(queries, keys, values, mask, bias)
    torch.testing.assert_close(attention(queries, other_keys, other_values, mask, bias), output, atol=1e-6, rtol=0)


def test_masking_one_more_slot_changes_the_output():
    queries, keys, values = random_qkv()
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    fewer = mask.clone()
    fewer[..., 3] = False
    assert (attention(queries, keys, values, mask) - attention(queries, keys, values, fewer)).abs().max() > 0.05


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_bias_with_half_precision_queries(dtype, masked):
    queries, keys, values = random_qkv(dtype)
    bias = torch.randn(3, 5, 7)
    mask = random_mask((2, 1, 1, 7)) if masked else None
    expected = attention(queries.float(), keys.float(), values.float(), mask, bias)
    output = attention(queries, keys, values, mask, bias)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=0.15, rtol=0)  # seven values of up to 3, eight bits


def test_gradients_of_the_fused_kernel_equal_those_of_the_formula():
    inputs = [tensor.requires_grad_() for tensor in random_qkv(torch.float64)]
    queries, keys, values = inputs
    mask = random_mask((2, 1, 5, 7))
    factor = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    fused = torch.autograd.grad((attention(queries, keys, values, mask) * factor).sum(), inputs)
    plain = torch.autograd.grad((attention_weights(queries, keys, mask) @ values * factor).sum(), inputs)
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads_equal_repeated_keys_and_values(masked):
    queries = torch.randn(2, 6, 5, 4)
    keys, values = torch.randn(2, 2, 2, 7, 4)
    mask = random_mask((2, 1, 5, 7)) if masked else None
    repeated = [tensor.repeat_interleave(3, 1) for tensor in (keys, values)]
    expected = attention(queries, *repeated, mask)
    torch.testing.assert_close(attention(queries, keys, values, mask), expected, atol=1e-6, rtol=0)


@properties
@given(*[st.integers(1, 4)] * 5)
def test_unfold_streams_is_the_inverse_of_fold_streams(memories, streams, heads, length, head_dim):
    x = torch.randn(memories * streams, heads, length, head_dim)
    folded = fold_streams(x, memories)
    assert folded.shape == (memories, heads, streams * length, head_dim)
    assert torch.equal(unfold_streams(folded, streams), x)
    for b in range(memories):
        for k in range(streams):
            assert torch.equal(folded[b, :, k * length : (k + 1) * length], x[b * streams + k])


def test_folded_streams_attend_as_if_alone():
    queries = torch.randn(2 * 4, 3, 5, 4)
    _, keys, values = random_qkv()
    mask = random_mask((2, 1, 1, 7))
    folded = unfold_streams(attention(fold_streams(queries, 2), keys, values, mask), 4)
    repeated = [tensor.repeat_interleave(4, 0) for tensor in (keys, values, mask)]
    torch.testing.assert_close(folded, attention(queries, *repeated), atol=1e-6, rtol=0)
