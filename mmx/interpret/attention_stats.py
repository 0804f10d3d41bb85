"""Statistics of attention weights: entropy, uniform attention, attention sinks, and the values of gates.

Axes: S slots, T text positions, H heads. Weights [..., S] sum to one over S, or are all zero where no slot is visible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmx.nn.layers import TanhGate
from mmx.nn.transformer import DecoderLayer, Transformer

UNIFORM_THRESHOLD = 0.99  # normalized entropy from which attention counts as uniform
SINK_THRESHOLD = 0.3  # mean weight over the text from which a slot counts as an attention sink


def entropy(weights: Tensor) -> Tensor:
    """Shannon entropy in bits of attention weights, [..., S] -> [...]: 0 for one slot, log2 S for uniform weights."""
    safe = torch.where(weights > 0, weights, 1.0)
    return -(weights * safe.log2()).sum(-1)


def normalized_entropy(weights: Tensor, visible: Tensor | None = None) -> Tensor:
    """Entropy divided by log2 of the number of visible slots, [..., S] -> [...]: 0 for one slot, 1 for uniform weights.

    Args:
        weights: [..., S].
        visible: bool, broadcastable to [..., S]; None means that every slot is visible. Where fewer than two slots are
            visible the result is 0.
    """
    if visible is None:
        visible = torch.ones_like(weights, dtype=torch.bool)
    count = visible.expand_as(weights).sum(-1)
    return torch.where(count > 1, entropy(weights) / count.clamp(min=2).log2(), 0.0)


def is_uniform(weights: Tensor, visible: Tensor | None = None) -> Tensor:
    """bool [...]: whether attention is uniform over the visible slots, as for a query that matches no key."""
    return normalized_entropy(weights, visible) >= UNIFORM_THRESHOLD


def attention_sink_mass(weights: Tensor) -> Tensor:
    """Attention mass on sinks, the slots whose mean weight over the text exceeds SINK_THRESHOLD: [T, ..., S] -> [...].

    Source: Gu et al. 2024, "When Attention Sink Emerges in Language Models", section 2.2.
    """
    average = weights.mean(0)
    return (average * (average > SINK_THRESHOLD)).sum(-1)


def gate_values(transformer: Transformer) -> list[float | None]:
    """tanh(alpha) of the gate of each cross-attention layer, in -1..1; None where a layer has no gate."""
    values: list[float | None] = []
    for layer in cross_attention_layers(transformer):
        gate = layer.cross_residual.gate
        values.append(float(gate.alpha.detach().tanh()) if isinstance(gate, TanhGate) else None)
    return values


def cross_attention_layers(transformer: Transformer) -> list[DecoderLayer]:
    """The layers that have cross-attention, in order."""
    layers: list[DecoderLayer] = list(transformer.layers)  # type: ignore[arg-type]
    return [layer for layer in layers if layer.cross_attention is not None]
