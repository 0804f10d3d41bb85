"""Classifier-free guidance: logits with the memory, extrapolated away from logits without it.

Axes: N streams, V vocabulary.

Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", section 3, whose w is scale - 1 here; for text:
Sanchez et al. 2023, "Stay on topic with Classifier-Free Guidance". The scale is `guidance_scale` of transformers.
"""

from __future__ import annotations

from torch import Tensor

from mmx.generation.decode_step import DecodeStep


def apply_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return log q + scale * (log p - log q), float32 [..., V], where p and q are the distributions of two logits.

    Scale 0 gives q, 1 gives p, and above 1 the difference is amplified. The result is not normalized.

    Args:
        conditional: logits with the memory, [..., V].
        unconditional: logits without it, [..., V].
        scale: guidance scale.
    """
    conditional_logprobs = conditional.float().log_softmax(-1)
    unconditional_logprobs = unconditional.float().log_softmax(-1)
    return unconditional_logprobs + scale * (conditional_logprobs - unconditional_logprobs)


class GuidedDecodeStep:
    """Two decoding steps over the same texts combined to one: one with the memory, one without.

    It takes twice the computation and two KV caches. Scores and log-probabilities are those of the guided distribution,
    proportional to q * (p / q) ** scale at every token. They cannot be compared between scales. Ranking and the
    evaluation loss are not guided.
    """

    def __init__(self, conditional: DecodeStep, unconditional: DecodeStep, scale: float) -> None:
        self.conditional = conditional
        self.unconditional = unconditional
        self.scale = scale

    def prefill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See DecodeStep.prefill."""
        conditional = self.conditional.prefill(tokens, mask)
        return apply_guidance(conditional, self.unconditional.prefill(tokens, mask), self.scale)

    def __call__(self, tokens: Tensor) -> Tensor:
        """See DecodeStep."""
        return apply_guidance(self.conditional(tokens), self.unconditional(tokens), self.scale)

    def reorder(self, index: Tensor) -> None:
        """See DecodeStep. Both steps hold the same texts."""
        self.conditional.reorder(index)
        self.unconditional.reorder(index)

    def select(self, rows: Tensor) -> None:
        """See DecodeStep."""
        self.conditional.select(rows)
        self.unconditional.select(rows)
