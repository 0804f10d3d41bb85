"""Captions of many inputs, in batches and in order. Inputs with the same bytes are captioned once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mmx.config.schema import GenerationConfig
from mmx.encoders.contract import PreparedInput
from mmx.errors import MmxError
from mmx.inference.batch_inference.dedup import ResultCache, content_key
from mmx.inference.batch_inference.out_of_memory import AdaptiveBatchSize
from mmx.inference.batch_inference.prefetch import Prefetcher, batched
from mmx.inference.generator import PreparedOrError, TextGenerator
from mmx.inference.outputs import GeneratedText, ModelInput

MAX_DUPLICATES = 16  # a batch holds at most this many times its size, duplicates included

InputT = TypeVar("InputT", bound="ModelInput | MmxError")


@dataclass(frozen=True)
class QueuedInput(Generic[InputT]):
    """An input with the key that its duplicates share. Only the first of several duplicates is encoded."""

    image: InputT
    key: Hashable | None
    is_first: bool


def caption_images(
    generator: TextGenerator, images: Iterable[InputT], batch_size: int, options: GenerationConfig
) -> Iterator[tuple[InputT, GeneratedText | MmxError]]:
    """See `Pipeline.captions`. Inputs are taken from the iterable as they are needed."""
    cache = ResultCache()
    batches = AdaptiveBatchSize()

    def key_of(image: InputT) -> Hashable | None:
        return content_key(generator, image)

    def prepare_first(item: QueuedInput[InputT]) -> PreparedOrError | None:
        return generator.prepare_or_error(item.image) if item.is_first else None

    with Prefetcher(generator.model.device) as prefetcher:
        keyed = _with_keys(prefetcher.map(key_of, batched(images, batch_size)))
        for items, prepared in prefetcher.map(prepare_first, _batches(keyed, cache, batch_size)):
            results = _caption_batch(generator, [item for item in prepared if item is not None], options, batches)
            first_items = [item for item in items if item.is_first]
            for item, result in zip(first_items, results, strict=True):
                cache.store(item.key, result)
            remaining = iter(results)
            for item in items:
                result_or_none = next(remaining) if item.is_first else cache.get(item.key)
                if result_or_none is None:  # a duplicate of an unreadable input, or of one that left the cache
                    prepared_alone = generator.prepare_or_error(item.image)
                    result_or_none = _caption_batch(generator, [prepared_alone], options, batches)[0]
                yield item.image, result_or_none


def _with_keys(
    batches: Iterable[tuple[Sequence[InputT], list[Hashable | None]]],
) -> Iterator[tuple[InputT, Hashable | None]]:
    for images, keys in batches:
        yield from zip(images, keys, strict=True)


def _batches(
    keyed: Iterable[tuple[InputT, Hashable | None]], cache: ResultCache, size: int
) -> Iterator[list[QueuedInput[InputT]]]:
    """Yield batches with up to `size` inputs that are the first of their duplicates."""
    size = max(1, size)
    batch: list[QueuedInput[InputT]] = []
    num_first = 0
    for image, key in keyed:
        item = QueuedInput(image, key, cache.add(key))
        batch.append(item)
        num_first += item.is_first
        if num_first >= size or len(batch) >= MAX_DUPLICATES * size:
            yield batch
            batch = []
            num_first = 0
    if batch:
        yield batch


def _caption_batch(
    generator: TextGenerator, prepared: Sequence[PreparedOrError], options: GenerationConfig, batches: AdaptiveBatchSize
) -> list[GeneratedText | MmxError]:
    """Caption the prepared inputs; errors keep their positions."""

    def caption(rows: Sequence[dict[str, PreparedInput]]) -> list[GeneratedText]:
        memory = generator.encode_prepared(rows)
        texts = generator.generate_batch(memory, [[None]] * len(rows), options)
        return [streams[0][0] for streams in texts]

    readable = [item for item in prepared if not isinstance(item, MmxError)]
    captions = iter(batches.run(readable, caption))
    return [item if isinstance(item, MmxError) else next(captions) for item in prepared]
