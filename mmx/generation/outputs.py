"""Output of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationOutput:
    """One generated text.

    Attributes:
        tokens: token ids, without the end-of-sequence token.
        logprobs: log-probability of each token, and of the end-of-sequence token if generated, in nats, before any
            logits processor.
        score: sum of the log-probabilities divided by length ** length_penalty; texts are ranked by it.
        finished: whether the text ended with the end-of-sequence token.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float
    finished: bool

    @staticmethod
    def from_tokens(
        tokens: Sequence[int], logprobs: Sequence[float], eos: int, length_penalty: float
    ) -> GenerationOutput:
        """Return the output for tokens that may end with the end-of-sequence token `eos`."""
        finished = bool(tokens) and tokens[-1] == eos
        score = sum(logprobs) / max(1, len(tokens)) ** length_penalty
        text = tokens[:-1] if finished else tokens
        return GenerationOutput(tuple(text), tuple(logprobs), score, finished)
