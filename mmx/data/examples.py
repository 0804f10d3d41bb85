"""The common form of all data sets: an example is one set of inputs and all texts that belong to it.

All captions of an image, and all questions about it, are tasks of one example, so the image is encoded once for them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mmx.boxes import Box
from mmx.errors import MmxError


@dataclass(frozen=True)
class TextTask:
    """One text to generate, with its reference texts.

    Args:
        targets: reference captions, or the answers that annotators gave.
        question: None for a caption.
        question_type: groups questions in reports.
        box: region (0..1) that the question is about; it is part of the prompt, and only this region is attended.
        evidence: region where the answer can be seen. It is used by evaluation only.
    """

    targets: tuple[str, ...]
    question: str | None = None
    question_type: str | None = None
    box: Box | None = None
    evidence: Box | None = None


@dataclass(frozen=True)
class Example:
    """Raw inputs by source name (a path, a PIL image, a text, ...), their tasks, and where the example was read."""

    id: str
    sources: Mapping[str, object]
    tasks: tuple[TextTask, ...]
    origin: str = ""


def captions_of(examples: Sequence[Example]) -> Iterator[tuple[str, ...]]:
    """Yield the reference captions of each example; unreadable examples and those without captions are skipped."""
    for index in range(len(examples)):
        try:
            tasks = examples[index].tasks
        except MmxError:
            continue
        captions = [target for task in tasks if task.question is None for target in task.targets]
        if captions:
            yield tuple(captions)
