"""From inputs to rows: which of them are still to be spoken of, and what came of each, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mmx.cli.inputs import InputItem, Inputs
from mmx.errors import MmxError
from mmx.io.console import Row, result_row, skip_one
from mmx.io.results_file import ResultsFile, number_of

if TYPE_CHECKING:
    from mmx.inference.pipeline import Pipeline


class HasFields(Protocol):
    """What a row begins with: by it, it is known in a journal."""

    @property
    def fields(self) -> dict[str, Any]: ...


Item = TypeVar("Item", bound=HasFields)


def remaining(
    items: Iterable[Item], shard: tuple[int, int], key: Callable[[Item], str], journal: ResultsFile | None, bar: Any
) -> Iterator[Item]:
    """Those whose key falls into the shard, by its hash, and whose facts the journal does not hold yet."""
    index, count = shard
    for item in items:
        if count > 1 and number_of(key(item)) % count != index:
            continue
        if journal is None or journal.takes(item.fields):
            yield item
        else:
            skip_one(bar)


def caption_rows(
    todo: Iterable[InputItem], pipeline: Pipeline, batch_size: int, options: dict[str, Any]
) -> Iterator[Row]:
    """The row of each input, in order; what comes as an error is one."""
    waiting: deque[InputItem] = deque()

    def taken() -> Iterator[Any]:
        for item in todo:
            waiting.append(item)
            yield item.inputs

    for _, said in pipeline.captions(taken(), batch_size, **options):
        item = waiting.popleft()
        if isinstance(said, MmxError) and _are_bytes(item.inputs):  # which have no name of their own
            said = MmxError(f"{item.name!r}: {said}")
        yield result_row(item.fields, item.name, "caption", said)


def _are_bytes(inputs: Inputs | MmxError) -> bool:
    return not isinstance(inputs, MmxError) and any(isinstance(raw, bytes) for raw in inputs.values())
