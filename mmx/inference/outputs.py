"""What is asked, what is said, and whoever prepares, encodes and speaks.

Alphabet: B rows (pictures), K streams (questions about each), n texts for each stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from mmx.config.schema import GenerationConfig
from mmx.encoders.contract import Prepared
from mmx.errors import MmxError
from mmx.memory import Box, Memory
from mmx.models.model import Model


@dataclass(frozen=True)
class Said:
    """A text the model gave. score: mean log-probability a token in nats; tokens: (text, log-probability) of each."""

    text: str
    score: float
    tokens: tuple[tuple[str, float], ...]


class Asked(NamedTuple):
    """A question about an input (or inputs by source name), and the part that it points at, if any."""

    image: Any
    question: str
    box: Box | None = None


class Speaker(Protocol):
    """What prepares, encodes and speaks: see `mmx.inference.pipeline.Pipeline`."""

    model: Model

    def prepare(self, image: Any) -> dict[str, Prepared]: ...

    def encode_prepared(self, rows: Sequence[Mapping[str, Prepared]]) -> Memory: ...

    def prompt_tokens(self, question: str | None) -> list[int]: ...

    def say(
        self,
        memory: Memory,
        questions: Sequence[Sequence[str | None]],
        options: GenerationConfig,
        boxes: Sequence[Sequence[Box | None]] = (),
    ) -> list[list[list[Said]]]: ...


Read = dict[str, Prepared] | MmxError  # what an input was prepared to, or why not


def read(speaker: Speaker, image: Any) -> Read:
    """An input prepared, or why it cannot be; what comes as an error already stays that."""
    if isinstance(image, MmxError):
        return image
    try:
        return speaker.prepare(image)
    except MmxError as error:
        return error
