"""Guided decoding: what looking adds to the score of each token, taken more than once (or less).

Alphabet: B memories, K streams, N = B*K, T text positions, V vocabulary.

Source: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", section 3, whose w is scale - 1 here; for text:
Sanchez et al. 2023, "Stay on topic with Classifier-Free Guidance". The scale is `guidance_scale` of transformers.
"""

from __future__ import annotations

from torch import Tensor

from mmx.generation.decode_step import DecodeStep


def apply_guidance(seeing: Tensor, blind: Tensor, scale: float) -> Tensor:
    """log p_blind + scale * (log p_seeing - log p_blind), [..., V] in float32, of two logits [..., V].

    Scale 0 is blind, 1 is seeing, above 1 goes further the same way. The sum is not normalised; its softmax is.
    """
    sees, guesses = seeing.float().log_softmax(-1), blind.float().log_softmax(-1)
    return guesses + scale * (sees - guesses)


class GuidedStep:
    """Two steps over the same texts as one: `seeing` looks at a memory, `blind` at one with nothing to see but the
    question. Twice the work, and two caches.

    Choosers and beams normalise what they are given, so log-probabilities and scores of the texts are those of the
    guided distribution, p proportional to p_blind * (p_seeing / p_blind) ** scale at every token. It is no longer the
    model's: the scores of different scales do not compare, and above 1 they tend to be larger, for it is more sharply
    peaked. `rank` and the loss of an evaluation are not guided.
    """

    def __init__(self, seeing: DecodeStep, blind: DecodeStep, scale: float) -> None:
        self.seeing, self.blind, self.scale = seeing, blind, scale

    def prefill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See Step.prefill."""
        return apply_guidance(self.seeing.prefill(tokens, mask), self.blind.prefill(tokens, mask), self.scale)

    def __call__(self, tokens: Tensor) -> Tensor:
        """See Step."""
        return apply_guidance(self.seeing(tokens), self.blind(tokens), self.scale)

    def reorder(self, index: Tensor) -> None:
        """See Step. Both have said the same, and go on from the same."""
        self.seeing.reorder(index)
        self.blind.reorder(index)

    def select(self, rows: Tensor) -> None:
        """See Step."""
        self.seeing.select(rows)
        self.blind.select(rows)
