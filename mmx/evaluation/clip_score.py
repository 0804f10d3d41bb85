"""CLIPScore and RefCLIPScore of captions (Hessel et al., "CLIPScore", 2021, section 3).

CLIPScore is 2.5 times the cosine of image and caption, at least 0. RefCLIPScore is the harmonic mean of that and of the
largest cosine of the caption and a reference, at least 0. All texts follow the words "A photo depicts", as in the
published script, which computes in float16 on a GPU; here it is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from mmx.errors import DataError, ImageError
from mmx.evaluation.joining import ScoredText
from mmx.evaluation.scores import MetricStatistics, mean_of
from mmx.hub.clip import Clip

CLIP_SCORE = "CLIPScore"
REF_CLIP_SCORE = "RefCLIPScore"
WEIGHT = 2.5
PREFIX = "A photo depicts "


@dataclass(frozen=True)
class ClipScores:
    """CLIPScore, and RefCLIPScore if there are references; and a sentence for each image that cannot be read."""

    metrics: list[MetricStatistics]
    problems: list[str]


def clip_score(
    texts: Sequence[ScoredText], clip: Clip, batch_size: int = 32, progress: Callable[[int], object] | None = None
) -> ClipScores:
    """Score the captions among texts. Raises DataError if there is none with an image that can be read.

    Args:
        progress: called with the number of captions of each batch.
    """
    captions = [text for text in texts if text.question is None]
    scored: list[ScoredText] = []
    scores: list[float] = []
    with_references: list[float] = []
    problems: list[str] = []
    for start in range(0, len(captions), batch_size):
        batch = captions[start : start + batch_size]
        readable, pixels = _read_images(batch, clip, problems)
        if readable:
            vectors = clip.encode_texts([PREFIX + text.prediction for text in readable])
            cosines = (clip.encode_images(pixels) * vectors).sum(dim=1)
            image_scores = (WEIGHT * cosines.clamp(min=0)).tolist()
            scores += image_scores
            if all(text.targets for text in readable):
                similarities = _reference_similarities(readable, vectors, clip, batch_size)
                with_references += map(_harmonic_mean, image_scores, similarities)
            scored += readable
        if progress is not None:
            progress(len(batch))
    if not scored:
        message = "no caption has an image that can be read; expected images for --clip, check their paths."
        raise DataError(message, code="clip_score.no_image", problems=problems)
    metrics = [mean_of(CLIP_SCORE, scored, scores)]
    if len(with_references) == len(scored):
        metrics.append(mean_of(REF_CLIP_SCORE, scored, with_references))
    return ClipScores(metrics, problems)


def _read_images(texts: Sequence[ScoredText], clip: Clip, problems: list[str]) -> tuple[list[ScoredText], list[Tensor]]:
    """Return the texts whose images can be read, and their pixels. Errors are appended to `problems`."""
    readable = []
    pixels = []
    for text in texts:
        image = text.sources.get("image")
        try:
            if not isinstance(image, str):
                raise ImageError(f"{text.id!r} has no path of an image; expected one for --clip.", code="image.missing")
            prepared = clip.prepare(image)
        except ImageError as error:
            problems.append(str(error))
            continue
        readable.append(text)
        pixels.append(prepared)
    return readable, pixels


def _reference_similarities(
    texts: Sequence[ScoredText], vectors: Tensor, clip: Clip, batch_size: int
) -> Iterator[float]:
    """Yield the largest cosine of each caption and one of its references, at least 0."""
    references = [PREFIX + target for text in texts for target in text.targets]
    encoded = []
    for start in range(0, len(references), batch_size):
        encoded.append(clip.encode_texts(references[start : start + batch_size]))
    counts = [len(text.targets) for text in texts]
    targets = torch.cat(encoded)
    for end, count, vector in zip(accumulate(counts), counts, vectors, strict=True):
        cosines = targets[end - count : end] @ vector
        yield max(0.0, cosines.max().item())


def _harmonic_mean(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second else 0.0
