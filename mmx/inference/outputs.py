"""What is asked, what is said, and whoever prepares, encodes and speaks.

Alphabet: B rows (pictures), K streams (questions about each), n texts for each stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from mmx.config.schema import GenerationConfig
from mmx.encoders.contract import PreparedInput
from mmx.errors import MmxError
from mmx.memory import Box, Memory
from mmx.models.model import Model


@dataclass(frozen=True)
class GeneratedText:
    """A text the model gave. score: mean log-probability a token in nats; tokens: (text, log-probability) of each."""

    text: str
    score: float
    tokens: tuple[tuple[str, float], ...]


class Question(NamedTuple):
    """A question about an input (or inputs by source name), and the part that it points at, if any."""

    image: Any
    question: str
    box: Box | None = None


class TextGenerator(Protocol):
    """What prepares, encodes and speaks: see `mmx.inference.pipeline.Pipeline`."""

    model: Model

    def prepare(self, image: Any) -> dict[str, PreparedInput]: ...

    def encode_prepared(self, rows: Sequence[Mapping[str, PreparedInput]]) -> Memory: ...

    def prompt_tokens(self, question: str | None) -> list[int]: ...

    def generate(
        self,
        memory: Memory,
        questions: Sequence[Sequence[str | None]],
        options: GenerationConfig,
        boxes: Sequence[Sequence[Box | None]] = (),
    ) -> list[list[list[GeneratedText]]]: ...


PreparedOrError = dict[str, PreparedInput] | MmxError  # what an input was prepared to, or why not


def prepare_or_error(speaker: TextGenerator, image: Any) -> PreparedOrError:
    """An input prepared, or why it cannot be; what comes as an error already stays that."""
    if isinstance(image, MmxError):
        return image
    try:
        return speaker.prepare(image)
    except MmxError as error:
        return error
