"""Inputs and results of inference as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import nan
from typing import TYPE_CHECKING, TypeAlias

from mmx.boxes import Box

if TYPE_CHECKING:
    from mmx.io.audio import AudioInput
    from mmx.io.images import ImageInput

# What a source reads. A mapping names the sources: {"image": "a.jpg", "audio": "a.wav"}; any of them may be left out.
ModelInput: TypeAlias = "ImageInput | AudioInput | Mapping[str, object]"


@dataclass(frozen=True)
class GeneratedText:
    """One generated text.

    Attributes:
        text: the decoded text.
        score: mean log-probability per token in nats (with length_penalty 1).
        tokens: the text of each token with its log-probability in nats.
        logprob: log p(text | memory, question) in nats, including the end of the text.
        probability: exp(logprob / answer_temperature), which says how often such an answer is right if the option
            `answer_temperature` was fitted (`mmx eval` does that).
    """

    text: str
    score: float
    tokens: tuple[tuple[str, float], ...] = field(repr=False)
    logprob: float = nan
    probability: float = nan


@dataclass(frozen=True)
class RankedAnswer:
    """A candidate answer.

    Attributes:
        answer: the text.
        probability: its share among the candidates, in 0..1.
        logprob: log p(answer | memory, question) in nats, including the end of the text.
    """

    answer: str
    probability: float
    logprob: float


@dataclass(frozen=True)
class Question:
    """A question about an input. `box` (x0, y0, x1, y1, each 0..1 from the top left) restricts it to a region."""

    image: ModelInput
    question: str
    box: Box | None = None
