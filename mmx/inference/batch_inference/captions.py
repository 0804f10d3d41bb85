"""Captions of many pictures: in batches, in order, each content encoded and said once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mmx.config.schema import GenerationConfig
from mmx.errors import MmxError
from mmx.inference.batch_inference.dedup import ResultCache, content_key
from mmx.inference.batch_inference.out_of_memory import AdaptiveBatchSize
from mmx.inference.batch_inference.prefetch import batched, prefetcher
from mmx.inference.outputs import GeneratedText, PreparedOrError, TextGenerator, prepare_or_error

CROWD = 16  # times as many pictures as are spoken of, most of them known already, before their captions are given


class Piece(NamedTuple):
    """A picture, what its twins share with it, and whether it is the first of them."""

    image: Any
    key: Hashable | None
    first: bool


def captions(
    speaker: TextGenerator, images: Iterable[Any], batch_size: int, options: GenerationConfig
) -> Iterator[tuple[Any, GeneratedText | MmxError]]:
    """See Pipeline.captions. Pictures are taken as they are needed; one that comes as an error stays that."""
    twins, halving = ResultCache(), AdaptiveBatchSize()

    def key(image: Any) -> Hashable | None:
        return content_key(speaker, image)

    def prepare(piece: Piece) -> PreparedOrError | None:
        return prepare_or_error(speaker, piece.image) if piece.first else None

    with prefetcher(speaker.model.device) as ahead:
        keyed = (pair for batch, keys in ahead(key, batched(images, batch_size)) for pair in zip(batch, keys))
        for pieces, prepared in ahead(prepare, _batches(keyed, twins, batch_size)):
            fresh = _said(speaker, [item for item in prepared if item is not None], options, halving)
            for piece, said in zip((piece for piece in pieces if piece.first), fresh, strict=True):
                twins.remember(piece.key, said)
            due = iter(fresh)
            for piece in pieces:
                known = next(due) if piece.first else twins.output(piece.key)
                # A twin of what could not be read, or of what was forgotten, speaks for itself.
                yield (
                    piece.image,
                    known or _said(speaker, [prepare_or_error(speaker, piece.image)], options, halving)[0],
                )


def _batches(keyed: Iterable[tuple[Any, Hashable | None]], twins: ResultCache, size: int) -> Iterator[list[Piece]]:
    """Stretches with up to `size` pictures that are the first of their twins."""
    batch: list[Piece] = []
    first = 0
    for image, key in keyed:
        batch.append(Piece(image, key, twins.meet(key)))
        first += batch[-1].first
        if first >= max(1, size) or len(batch) >= CROWD * max(1, size):
            yield batch
            batch, first = [], 0
    if batch:
        yield batch


def _said(
    speaker: TextGenerator, prepared: Sequence[PreparedOrError], options: GenerationConfig, halving: AdaptiveBatchSize
) -> list[GeneratedText | MmxError]:
    """The captions of a batch, with the errors in their places."""

    def say(rows: Sequence[Any]) -> list[GeneratedText]:
        return [row[0][0] for row in speaker.generate(speaker.encode_prepared(rows), [[None]] * len(rows), options)]

    said = iter(halving.run([item for item in prepared if not isinstance(item, MmxError)], say))
    return [item if isinstance(item, MmxError) else next(said) for item in prepared]
