"""Captions of many inputs, in batches and in order. Inputs with the same bytes are captioned once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Generic, TypeVar

from mmx.config.schema import GenerationConfig
from mmx.errors import MmxError
from mmx.inference.arguments import with_starts
from mmx.inference.batch_inference.dedup import ResultCache, content_key
from mmx.inference.batch_inference.out_of_memory import AdaptiveBatchSize
from mmx.inference.batch_inference.prefetch import Prefetcher, batched
from mmx.inference.generator import TextGenerator
from mmx.inference.inputs import InputWindow
from mmx.inference.outputs import GeneratedText, ModelInput
from mmx.inference.windows import caption_rows, join_texts

MAX_DUPLICATES = 16  # a batch holds at most this many times its size, duplicates included

InputT = TypeVar("InputT", bound="ModelInput | MmxError")


@dataclass(frozen=True)
class QueuedInput(Generic[InputT]):
    """An input with the key that its duplicates share. Only the first of several duplicates is encoded.

    start: with what its caption begins; None for the option `start`.
    """

    image: InputT
    start: str | None
    key: Hashable | None
    is_first: bool


def caption_images(
    generator: TextGenerator,
    images: Iterable[InputT],
    batch_size: int,
    options: GenerationConfig,
    starts: Iterable[str] | None = None,
) -> Iterator[tuple[InputT, GeneratedText | MmxError]]:
    """See `Pipeline.captions`. Inputs are taken from the iterables as they are needed."""
    cache = ResultCache()

    def key_of(started: _Started[InputT]) -> Hashable | None:
        key = content_key(generator, started.image)
        return None if key is None else (key, started.start)

    def prepare(item: QueuedInput[InputT]) -> list[InputWindow] | MmxError:
        windows = generator.prepare_windows_or_error(item.image)
        if item.start is None or isinstance(windows, MmxError):
            return windows
        return [replace(window, text_start=item.start) for window in windows]

    def prepare_first(item: QueuedInput[InputT]) -> list[InputWindow] | MmxError | None:
        return prepare(item) if item.is_first else None

    captioner = _BatchCaptioner(generator, options, batch_size)

    with Prefetcher(generator.model.device) as prefetcher:
        started = (_Started(image, start) for image, start in with_starts(images, starts))
        keyed = _with_keys(prefetcher.map(key_of, batched(started, batch_size)))
        for items, prepared in prefetcher.map(prepare_first, _batches(keyed, cache, batch_size)):
            results = captioner.run([item for item in prepared if item is not None])
            first_items = [item for item in items if item.is_first]
            for item, result in zip(first_items, results, strict=True):
                cache.store(item.key, result)
            remaining = iter(results)
            for item in items:
                result_or_none = next(remaining) if item.is_first else cache.get(item.key)
                if result_or_none is None:  # a duplicate of an unreadable input, or of one that left the cache
                    result_or_none = captioner.run([prepare(item)])[0]
                yield item.image, result_or_none


@dataclass(frozen=True)
class _Started(Generic[InputT]):
    """An input with the start of its caption."""

    image: InputT
    start: str | None


def _with_keys(
    batches: Iterable[tuple[Sequence[_Started[InputT]], list[Hashable | None]]],
) -> Iterator[tuple[_Started[InputT], Hashable | None]]:
    for images, keys in batches:
        yield from zip(images, keys, strict=True)


def _batches(
    keyed: Iterable[tuple[_Started[InputT], Hashable | None]], cache: ResultCache, size: int
) -> Iterator[list[QueuedInput[InputT]]]:
    """Yield batches with up to `size` inputs that are the first of their duplicates."""
    size = max(1, size)
    batch: list[QueuedInput[InputT]] = []
    num_first = 0
    for started, key in keyed:
        item = QueuedInput(started.image, started.start, key, cache.add(key))
        batch.append(item)
        num_first += item.is_first
        if num_first >= size or len(batch) >= MAX_DUPLICATES * size:
            yield batch
            batch = []
            num_first = 0
    if batch:
        yield batch


class _BatchCaptioner:
    """Captions prepared inputs. Rows are decoded `batch_size` at a time, however many windows the inputs have."""

    def __init__(self, generator: TextGenerator, options: GenerationConfig, batch_size: int) -> None:
        self.generator = generator
        self.options = options
        self.batch_size = batch_size
        self.batches = AdaptiveBatchSize()

    def run(self, prepared: Sequence[list[InputWindow] | MmxError]) -> list[GeneratedText | MmxError]:
        """Return the caption of each input; errors keep their positions."""
        readable = [windows for windows in prepared if not isinstance(windows, MmxError)]
        texts: list[GeneratedText | MmxError] = []
        for rows in batched([window for windows in readable for window in windows], self.batch_size):
            texts += self.batches.run(rows, self._caption)
        remaining = iter(texts)
        results: list[GeneratedText | MmxError] = []
        for item in prepared:
            if isinstance(item, MmxError):
                results.append(item)
            else:
                results.append(_result(item, list(islice(remaining, len(item)))))
        return results

    def _caption(self, windows: Sequence[InputWindow]) -> list[GeneratedText]:
        return caption_rows(self.generator, windows, self.options)


def _result(windows: Sequence[InputWindow], texts: Sequence[GeneratedText | MmxError]) -> GeneratedText | MmxError:
    """The text of an input, or the first error of its windows."""
    generated: list[GeneratedText] = []
    for text in texts:
        if isinstance(text, MmxError):
            return text
        generated.append(text)
    return join_texts(windows, generated)
