"""Scaled dot-product attention as pure functions: the attention weights, and the output of a fused kernel.

Axes: B memories, H heads, Q queries, S source slots, D head dimension, K streams, T text positions, N = B*K.
Masks are bool, True = may be attended, with at least two axes, broadcastable to [B, H, Q, S].

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1: softmax(Q K^T / sqrt(D)) V.
A query that may attend no slot gets zeros, never NaN.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_weights(queries: Tensor, keys: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return the attention weights [B, H, Q, S]. A row sums to one, or is all zeros where its query may attend no slot.

    Args:
        queries: [B, H, Q, D].
        keys: [B, H, S, D].
        mask: bool, broadcastable to [B, H, Q, S].
        bias: added to the scores, broadcastable to [B, H, Q, S].
    """
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if mask is None:
        return scores.softmax(-1)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Return the attention output [B, H, Q, D]: `attention_weights(...) @ values`, computed by a fused kernel.

    Keys and values may have fewer heads, H / G. Each is then shared by G consecutive query heads without a copy
    (Ainslie et al. 2023, "GQA"); mask and bias must then be the same for all heads.

    Args:
        queries: [B, H, Q, D].
        keys: [B, H or H / G, S, D].
        values: [B, H or H / G, S, D].
        mask: bool, broadcastable to [B, H, Q, S].
        bias: added to the scores, broadcastable to [B, H, Q, S].
    """
    if keys.shape[1] != queries.shape[1]:
        return _grouped_query_attention(queries, keys, values, mask, bias)
    if keys.shape[-2] == 0:
        return torch.zeros_like(queries)
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
        # The fused CPU kernel is written for float32. In bfloat16, forward and backward of two plain products take a
        # quarter of its time at caption sizes (25 positions, 64 slots).
        return attention_weights(queries, keys, mask, bias) @ values
    bias = None if bias is None else bias.to(queries.dtype)
    if mask is None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    # The kernel's output for a fully masked row depends on its version: unmask such rows, then zero their output.
    has_slots = mask.any(-1, keepdim=True)
    kernel_mask = mask | ~has_slots
    if bias is not None:
        kernel_mask = torch.where(kernel_mask, bias, torch.finfo(queries.dtype).min)
    output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=kernel_mask)
    return output.masked_fill(~has_slots, 0.0)


def fold_streams(queries: Tensor, batch_size: int) -> Tensor:
    """[B*K, H, T, D] -> [B, H, K*T, D]: fold the streams into the query axis, so keys and values are not copied."""
    rows, heads, length, head_dim = queries.shape
    by_memory = queries.view(batch_size, rows // batch_size, heads, length, head_dim)
    return by_memory.transpose(1, 2).flatten(2, 3)


def unfold_streams(x: Tensor, streams: int) -> Tensor:
    """[B, H, K*T, D] -> [B*K, H, T, D]: the inverse of `fold_streams`."""
    batch_size, heads, folded, head_dim = x.shape
    per_stream = x.view(batch_size, heads, streams, folded // streams, head_dim)
    return per_stream.transpose(1, 2).flatten(0, 1)


def _grouped_query_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Fold the G query heads of a group into the query axis of one head."""
    length = queries.shape[2]
    group = queries.shape[1] // keys.shape[1]
    folded = queries.unflatten(1, (-1, group)).flatten(2, 3)
    output = attention(folded, keys, values, _repeat_queries(mask, group), _repeat_queries(bias, group))
    return output.unflatten(2, (group, length)).flatten(1, 2)


def _repeat_queries(x: Tensor | None, group: int) -> Tensor | None:
    """Repeat the query axis of a mask or bias [..., Q, S] once for each head of a group; one of Q = 1 broadcasts."""
    if x is None or x.shape[-2] == 1:
        return x
    return x.repeat(*[1] * (x.ndim - 2), group, 1)
