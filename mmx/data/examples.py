"""The one shape of data: an example is one set of inputs (a picture, ...) and everything that is said about it.

All captions of a picture, or all questions about it, are turns of one example: the picture is encoded once for them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmx.errors import MmxError
from mmx.memory import Box


@dataclass(frozen=True)
class TextTask:
    """One thing to say. Without a question it is a caption, with all reference captions as targets; with one, the
    targets are the answers people gave. `kind` sorts questions in reports. `box` (0..1) is the pointing finger, a part
    of the prompt: only that region may be looked at. `evidence` is where the answer can be seen, which nobody tells."""

    targets: tuple[str, ...]
    question: str | None = None
    question_type: str | None = None
    box: Box | None = None
    evidence: Box | None = None


@dataclass(frozen=True)
class Example:
    """Raw inputs by source name (a path, a PIL picture, a text, ...), what is said about them, and where it stands."""

    id: str
    sources: Mapping[str, Any]
    tasks: tuple[TextTask, ...]
    origin: str = ""


def captions_of(examples: Sequence[Example]) -> Iterator[tuple[str, ...]]:
    """What people said of each example: those that cannot be read, and those without a caption, are passed over."""
    for index in range(len(examples)):
        try:
            turns = examples[index].tasks
        except MmxError:
            continue
        if captions := tuple(target for turn in turns if turn.question is None for target in turn.targets):
            yield captions
