"""The common form of all data sets: an example is one set of inputs and all texts that belong to it.

All captions of an image, and all questions about it, are tasks of one example, so the image is encoded once for them.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mmx.boxes import Box
from mmx.errors import DataError, MmxError


@dataclass(frozen=True)
class TextTask:
    """One text to generate, with its reference texts.

    Args:
        targets: reference captions, or the answers that annotators gave.
        question: None for a caption.
        question_type: groups questions in reports.
        box: region (0..1) that the question is about; it is part of the prompt, and only this region is attended.
        evidence: region where the answer can be seen. It is used by evaluation only.
        id: the id that the data gives to the text, such as a question_id, or to its image; of joined tasks the first.
            Tasks that differ in nothing else are equal.
    """

    targets: tuple[str, ...]
    question: str | None = None
    question_type: str | None = None
    box: Box | None = None
    evidence: Box | None = None
    id: int | str | None = field(default=None, compare=False)


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


def join_tasks(tasks: Iterable[TextTask]) -> tuple[TextTask, ...]:
    """Join the tasks that differ in nothing but their targets, in the order in which they first appear.

    The captions of an image are references of one another, also if each has a line of its own; and so are answers.
    """
    targets: dict[TextTask, list[str]] = {}
    for task in tasks:
        targets.setdefault(replace(task, targets=()), []).extend(task.targets)
    return tuple(replace(task, targets=tuple(texts)) for task, texts in targets.items())


def check_sources(example: Example, known: Collection[str]) -> None:
    """Raise DataError if an example has inputs, and none of them is for a source of the model.

    Its texts would be learned or generated without any input. Only an example that is built without inputs, whose
    `sources` are empty, asks for this.

    Args:
        known: names of the model's sources.
    """
    if example.sources and not any(example.sources.get(name) is not None for name in known):
        raise unknown_sources(example.origin or example.id, example.sources, known)


def unknown_sources(where: str, names: Iterable[str], known: Collection[str], **details: object) -> DataError:
    """Return the error for a record whose fields are for none of the known sources."""
    unknown = sorted(names)
    fields = f"the unknown field {', '.join(map(repr, unknown))}" if unknown else "no input"
    sources = " or ".join(map(repr, sorted(known)))
    return DataError(
        f"{where} has {fields}, and nothing for a source of the model; expected a field of the name {sources}.",
        code="data.unknown_source",
        origin=where,
        unknown=unknown,
        known=sorted(known),
        **details,
    )
