"""The spotlight in numbers: how sharp it is, whether it fell back to the plain average, and what stays lit whatever is
said.

Alphabet: S slots, T words, H heads. Weights [..., S] are rows that sum to one, or all zeros where nothing was seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmx.nn.layers import TanhGate
from mmx.nn.transformer import DecoderLayer, Transformer

UNIFORM = 0.99  # of the largest entropy there can be: from here on a query is lost, and reads the plain average
SINK = 0.3  # of a head's weight, on average over the words: from here on a slot is a sink


def entropy(weights: Tensor) -> Tensor:
    """Shannon entropy in bits of each spotlight [..., S] -> [...]; 0 on one slot, log2 S for the plain average."""
    return -(weights * torch.where(weights > 0, weights, 1.0).log2()).sum(-1)


def relative_entropy(weights: Tensor, seen: Tensor | None = None) -> Tensor:
    """Entropy as a share of the largest there can be, log2 of the slots in view: 0 on one slot, 1 for the average.

    seen: bool, broadcastable to weights [..., S] (None: all slots). Where fewer than two are in view it is 0.
    """
    seen = torch.ones_like(weights, dtype=torch.bool) if seen is None else seen.expand_as(weights)
    count = seen.sum(-1)
    return torch.where(count > 1, entropy(weights) / count.clamp(min=2).log2(), 0.0)


def is_uniform(weights: Tensor, seen: Tensor | None = None) -> Tensor:
    """bool [...]: which spotlights fell back to the plain average of all they see (a query that finds nothing)."""
    return relative_entropy(weights, seen) >= UNIFORM


def attention_sink_mass(weights: Tensor) -> Tensor:
    """How much of each head's weight lies on sinks: slots that hold more than SINK of it on average over all words.

    weights [T, ..., S], words first -> [...]. After Gu et al. 2024, "When Attention Sink Emerges in Language Models",
    section 2.2: a slot that is lit whatever is said tells of the head, not of the word.
    """
    average = weights.mean(0)
    return (average * (average > SINK)).sum(-1)


def gate_values(stack: Transformer) -> list[float | None]:
    """The opening of each looking layer's gate, in -1..1; None where the layer has none (as good as 1)."""
    found: list[nn.Module] = [block.cross_residual.gate for block in cross_attention_layers(stack)]
    return [float(gate.alpha.detach().tanh()) if isinstance(gate, TanhGate) else None for gate in found]


def cross_attention_layers(stack: Transformer) -> list[DecoderLayer]:
    """The blocks with cross-attention, in order: looking layer 0, 1, ..."""
    blocks: list[DecoderLayer] = list(stack.layers)  # type: ignore[arg-type]
    return [block for block in blocks if block.cross_attention is not None]
