"""What decoding hands back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationOutput:
    """One text. tokens: without the end; logprobs: of each token and of the end, in nats, before any rule;
    score: what texts are ranked by; finished: whether it ended by itself."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float
    finished: bool

    @staticmethod
    def of(tokens: Sequence[int], logprobs: Sequence[float], eos: int, length_penalty: float) -> GenerationOutput:
        """From tokens that may close with the end; scored by their mean log-probability at length_penalty 1."""
        finished = bool(tokens) and tokens[-1] == eos
        score = sum(logprobs) / max(1, len(tokens)) ** length_penalty
        return GenerationOutput(tuple(tokens[:-1] if finished else tokens), tuple(logprobs), score, finished)
