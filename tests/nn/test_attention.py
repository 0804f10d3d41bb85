"""Attention: the fused kernel, the plain formula and three loops say the same; what may not be seen does not count."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.nn.attention import attention, attention_weights, fold_streams, unfold_streams

MASKS = {
    "none": None,
    "slots": (2, 1, 1, 7),
    "shared slots": (1, 1, 1, 7),
    "queries": (5, 7),
    "num_heads": (1, 3, 5, 7),
    "everything": (2, 3, 5, 7),
}
properties = settings(max_examples=50, deadline=None)


def drawn(dtype=torch.float32, slots=7, queries=5, seed=0):
    """queries [2, 3, Q, 4], keys and values [2, 3, S, 4]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, n, 4) for n in (queries, slots, slots)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def mask_of(shape, seed=1):
    return None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def attend_slowly(queries, keys, values, mask=None, bias=None):
    """The definition, one query at a time; nothing to see is zeros."""
    b, h, q, d = queries.shape
    shape = (b, h, q, keys.shape[-2])
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    bias = torch.zeros(shape, dtype=torch.float64) if bias is None else bias.double().expand(shape)
    read = torch.zeros(queries.shape, dtype=torch.float64)
    for row in range(b):
        for head in range(h):
            for query in range(q):
                seen = mask[row, head, query].nonzero()[:, 0].tolist()
                asked = queries[row, head, query].double()
                scores = {
                    s: float(asked @ keys[row, head, s].double() / math.sqrt(d) + bias[row, head, query, s])
                    for s in seen
                }
                total = sum(math.exp(score) for score in scores.values())
                for s, score in scores.items():
                    read[row, head, query] += math.exp(score) / total * values[row, head, s].double()
    return read


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", MASKS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, None)]
)
def test_fused_plain_and_slow_agree(dtype, tolerance, form, biased):
    queries, keys, values = drawn(dtype)
    mask, bias = mask_of(MASKS[form]), torch.randn(3, 5, 7).to(dtype) if biased else None
    if tolerance is None:
        # bfloat16 keeps 8 bits: a score is rounded three times (product, scale, bias), weight and sum once each.
        scores = (queries.double() @ keys.double().mT).abs().max() / 2 + 4
        tolerance = float((3 * scores + 2) * 2**-9 * values.abs().max())
        assert tolerance < 0.25
    weights = attention_weights(queries, keys, mask, bias)
    fused, slow = attention(queries, keys, values, mask, bias), attend_slowly(queries, keys, values, mask, bias)
    assert fused.dtype == weights.dtype == dtype
    torch.testing.assert_close((weights @ values).double(), slow, atol=tolerance, rtol=0)
    torch.testing.assert_close(fused.double(), slow, atol=tolerance, rtol=0)


def test_the_slow_twin_by_hand():
    """Scores ln 1 and ln 3 give weights 1/4 and 3/4."""
    queries = torch.tensor([[[[2.0, 0, 0, 0]]]])
    keys = torch.tensor([[[[0.0, 0, 0, 0], [math.log(3), 0, 0, 0]]]])
    values = torch.tensor([[[[4.0, 0, 0, 0], [0, 8.0, 0, 0]]]])
    expected = torch.tensor([[[[1.0, 6.0, 0, 0]]]])
    torch.testing.assert_close(attention_weights(queries, keys), torch.tensor([[[[0.25, 0.75]]]]))
    torch.testing.assert_close(attention(queries, keys, values), expected)
    torch.testing.assert_close(attend_slowly(queries, keys, values), expected.double())


@properties
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from(list(MASKS.values())[1:]), st.booleans())
def test_the_three_agree_for_any_sizes(seed, length, form, biased):
    queries, keys, values = drawn(torch.float64, queries=length, seed=seed)
    shape = tuple(length if size == 5 else size for size in form)
    mask = mask_of(shape, seed)
    bias = torch.randn(2, 1, 1, 7, dtype=torch.float64) if biased else None
    weights, fused = attention_weights(queries, keys, mask, bias), attention(queries, keys, values, mask, bias)
    torch.testing.assert_close(fused, weights @ values, atol=1e-12, rtol=0)
    seen = mask.expand(weights.shape)
    assert (weights[~seen] == 0).all()
    torch.testing.assert_close(weights.sum(-1), seen.any(-1).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", [None, torch.ones(1, 1, 1, 7)], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_sees_nothing_gives_zeros_also_backwards(dtype, bias):
    inputs = [t.requires_grad_() for t in drawn(dtype)]
    queries, keys, values = inputs
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 2] = False
    read = attention(queries, keys, values, mask, bias)
    weights = attention_weights(queries, keys, mask, bias)
    assert (read[0, :, 2] == 0).all()
    assert (weights[0, :, 2] == 0).all()
    assert (read[1] != 0).all()
    for out in (read, weights @ values):
        gradients = torch.autograd.grad(out.float().square().sum(), inputs, retain_graph=True)
        assert all(torch.isfinite(g).all() for g in gradients)
        assert (gradients[0][0, :, 2] == 0).all()
        assert (gradients[0][1].float().abs().sum(-1) > 0).all()


def test_when_all_rows_see_nothing_no_gradient_flows():
    inputs = [t.requires_grad_() for t in drawn()]
    read = attention(*inputs, torch.zeros(2, 1, 1, 7, dtype=torch.bool))
    assert (read == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(read.sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 1, 0, dtype=torch.bool)], ids=["no mask", "mask"])
def test_no_slots_at_all_give_zeros(mask, dtype):
    queries, keys, values = drawn(dtype, slots=0)
    read = attention(queries, keys, values, mask)
    assert read.shape == queries.shape
    assert read.dtype == dtype
    assert (read == 0).all()
    assert attention_weights(queries, keys, mask).shape == (2, 3, 5, 0)


@pytest.mark.parametrize("case", ["identical keys", "zero queries"])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_to_choose_by_gives_the_plain_average(case, masked):
    """Eight slots, four of them seen: the weights 1/8 and 1/4 are exact in binary, as is an average of integers."""
    queries, keys, _ = drawn(slots=8)
    values = torch.arange(2 * 3 * 8 * 4).float().view(2, 3, 8, 4)
    queries, keys = (queries, keys[:, :, :1].expand_as(keys)) if case == "identical keys" else (queries * 0, keys)
    mask = torch.arange(8).remainder(2).bool()[None] if masked else None
    seen = values[:, :, mask[0]] if masked else values
    weights = attention_weights(queries, keys, mask)
    assert set(weights.unique().tolist()) == ({0.0, 1 / 4} if masked else {1 / 8})
    average = seen.mean(2, keepdim=True).expand_as(queries)
    assert torch.equal(weights @ values, average)
    torch.testing.assert_close(attention(queries, keys, values, mask), average, atol=0, rtol=2e-7)


@properties
@given(st.integers(0, 2**31), st.sampled_from([1e3, 1e15, -1e15]), st.booleans())
def test_junk_in_masked_slots_changes_nothing(seed, size, biased):
    queries, keys, values = drawn(seed=seed)
    mask = mask_of((2, 1, 1, 7), seed)
    bias = torch.randn(2, 3, 5, 7) if biased else None
    hidden = ~mask.reshape(2, 1, 7, 1)
    junk = [torch.where(hidden, size * torch.randn_like(t), t) for t in (keys, values)]
    assert torch.equal(attention_weights(queries, keys, mask, bias), attention_weights(queries, junk[0], mask, bias))
    torch.testing.assert_close(
        attention(queries, *junk, mask, bias), attention(queries, keys, values, mask, bias), atol=1e-6, rtol=0
    )


def test_what_is_seen_does_change_something():
    queries, keys, values = drawn()
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    fewer = mask.clone()
    fewer[..., 3] = False
    assert (attention(queries, keys, values, mask) - attention(queries, keys, values, fewer)).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_bias_beside_narrower_queries(dtype):
    queries, keys, values = drawn(dtype)
    bias, mask = torch.randn(3, 5, 7), mask_of((2, 1, 1, 7))
    for given_mask in (None, mask):
        wide = attention(queries.float(), keys.float(), values.float(), given_mask, bias)
        narrow = attention(queries, keys, values, given_mask, bias)
        assert narrow.dtype == dtype
        torch.testing.assert_close(narrow.float(), wide, atol=0.15, rtol=0)  # seven values of up to 3, eight bits


def test_gradients_of_the_fused_kernel_are_those_of_the_formula():
    inputs = [t.requires_grad_() for t in drawn(torch.float64)]
    queries, keys, values = inputs
    mask, aim = mask_of((2, 1, 5, 7)), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    fused = torch.autograd.grad((attention(queries, keys, values, mask) * aim).sum(), inputs)
    plain = torch.autograd.grad((attention_weights(queries, keys, mask) @ values * aim).sum(), inputs)
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@properties
@given(*[st.integers(1, 4)] * 5)
def test_unfold_is_the_inverse_of_fold(memories, streams, heads, length, width):
    x = torch.randn(memories * streams, heads, length, width)
    folded = fold_streams(x, memories)
    assert folded.shape == (memories, heads, streams * length, width)
    assert torch.equal(unfold_streams(folded, streams), x)
    for b in range(memories):
        for k in range(streams):
            assert torch.equal(folded[b, :, k * length : (k + 1) * length], x[b * streams + k])


def test_folded_streams_read_what_they_would_read_alone():
    queries, (_, keys, values) = torch.randn(2 * 4, 3, 5, 4), drawn()
    mask = mask_of((2, 1, 1, 7))
    folded = unfold_streams(attention(fold_streams(queries, 2), keys, values, mask), 4)
    copied = [t.repeat_interleave(4, 0) for t in (keys, values, mask)]
    torch.testing.assert_close(folded, attention(queries, *copied), atol=1e-6, rtol=0)
