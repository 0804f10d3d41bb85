"""Attention as two pure functions: who is looked at (`attention_weights`), and what comes back (`attend`).

Alphabet: B memories, H heads, Q queries, S source slots, D head width, K streams, T text positions, N = B*K.
Masks are bool and True = may be attended, broadcastable to [B, H, Q, S], with two axes at least.

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1: softmax(Q K^T / sqrt(D)) V.
A query that may look at nothing gets zeros, never NaN: "there was nothing to see" is an answer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_weights(queries: Tensor, keys: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return the spotlight [B, H, Q, S]: each row sums to one over the slots its query may attend, or is all zeros.

    queries: [B, H, Q, D]; keys: [B, H, S, D]; mask: bool, bias: added to the scores; both broadcast to [B, H, Q, S].
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
    """Return what the queries read, [B, H, Q, D]; equals `attention_weights(...) @ values`, by a fused kernel.

    values: [B, H, S, D]; the other arguments as in `attention_weights`. Keys and values of fewer heads, H / G, are
    shared by G query heads in a row each (Ainslie et al. 2023, "GQA"), and not copied for it; mask and bias are then
    the same for all heads.
    """
    if keys.shape[1] != queries.shape[1]:
        return _attend_grouped(queries, keys, values, mask, bias)
    if keys.shape[-2] == 0:
        return torch.zeros_like(queries)
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
        # The CPU's fused kernel is written for float32; forward and backward in bfloat16, two plain products take a
        # fourth of its time at the sizes of captions (25 positions, 64 slots).
        return attention_weights(queries, keys, mask, bias) @ values
    bias = None if bias is None else bias.to(queries.dtype)
    if mask is None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    # A row with no slot is opened for the kernel (whose answer would depend on its version) and zeroed afterwards.
    sees = mask.any(-1, keepdim=True)
    allowed = mask | ~sees
    if bias is not None:
        allowed = torch.where(allowed, bias, torch.finfo(queries.dtype).min)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed).masked_fill(~sees, 0.0)


def _attend_grouped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """The query heads of a group stand in one head, as further queries."""
    length, group = queries.shape[2], queries.shape[1] // keys.shape[1]
    together = queries.unflatten(1, (-1, group)).flatten(2, 3)
    mask, bias = (t if t is None or t.shape[-2] == 1 else t.repeat(*[1] * (t.ndim - 2), group, 1) for t in (mask, bias))
    return attention(together, keys, values, mask, bias).unflatten(2, (group, length)).flatten(1, 2)


def fold_streams(queries: Tensor, memories: int) -> Tensor:
    """[B*K, H, T, D] -> [B, H, K*T, D]: streams become queries, so that keys and values are never copied for them."""
    n, heads, length, width = queries.shape
    return queries.view(memories, n // memories, heads, length, width).transpose(1, 2).flatten(2, 3)


def unfold_streams(read: Tensor, streams: int) -> Tensor:
    """[B, H, K*T, D] -> [B*K, H, T, D]: the inverse of `fold_streams`."""
    b, heads, folded, width = read.shape
    return read.view(b, heads, streams, folded // streams, width).transpose(1, 2).flatten(0, 1)
