"""BLEU, ROUGE-L and CIDEr of captions, equal to the results of coco-caption.

`caption_metrics` takes sentences; `bleu`, `rouge_l` and `cider` take tokens: one candidate for each image (`list[str]`)
and the references of that image (`list[list[str]]`). CIDEr is CIDEr-D as in coco-caption, in units such as 0.60, not
60.

The n-gram weights of CIDEr come from the references of the evaluated images. CIDEr of a subset is therefore not
comparable with that of the whole, and needs at least two images.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import exp, log, sqrt
from typing import NamedTuple, TypeVar

from mmx.evaluation.metrics.ptb_tokenizer import ptb_tokens

Key = TypeVar("Key", bound=Hashable)
Tokens = Sequence[str]
Ngram = tuple[str, ...]
NgramCounts = Counter[Ngram]
TfIdf = list[dict[Ngram, float]]  # weights by n-gram, for each n-gram length

MAX_N = 4
CIDER_SCALE = 10
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2


def caption_metrics(
    predictions: Mapping[Key, str],
    references: Mapping[Key, Sequence[str]],
    training_captions: Iterable[str] = (),
) -> dict[str, float]:
    """All caption metrics of sentences by image id, tokenized as in coco-caption.

    In addition to BLEU-1 to -4, ROUGE-L and CIDEr: `distinct`, the number of captions with distinct tokens (1 for a
    model that gives every image the same caption), and `length`, the mean number of tokens. With training captions also
    `novel`, the number of captions whose tokens equal those of none of them.

    CIDEr weighs n-grams by how many images have them, so that it is left out for a single image.

    Raises ValueError for different ids, an image without references, or no image.
    """
    _check_ids(predictions, references)
    candidates = [ptb_tokens(predictions[key]) for key in references]
    targets = [[ptb_tokens(sentence) for sentence in sentences] for sentences in references.values()]
    metrics = {f"BLEU-{n}": score for n, score in enumerate(bleu(candidates, targets), start=1)}
    metrics["ROUGE-L"] = rouge_l(candidates, targets)
    if len(candidates) > 1:
        metrics["CIDEr"] = cider(candidates, targets)
    metrics["distinct"] = float(len(set(map(tuple, candidates))))
    known = {tuple(ptb_tokens(sentence)) for sentence in training_captions}
    if known:
        metrics["novel"] = float(sum(tuple(candidate) not in known for candidate in candidates))
    metrics["length"] = sum(map(len, candidates)) / len(candidates)
    return metrics


class BleuScores(NamedTuple):
    """BLEU-1 to BLEU-4."""

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> BleuScores:
    """Corpus BLEU (Papineni et al., "BLEU", 2002, section 2).

    The brevity penalty uses, for each image, the reference length closest to that of the candidate, the shorter one of
    two that are equally close. As in coco-caption's BleuScorer a missing n-gram length gives nearly zero, not zero.
    """
    _check_tokens(candidates, references)
    counts = [bleu_counts(candidate, targets) for candidate, targets in zip(candidates, references, strict=True)]
    return bleu_of_counts([sum(column) for column in zip(*counts, strict=True)])


def bleu_counts(candidate: Tokens, references: Sequence[Tokens]) -> list[int]:
    """What one image adds to corpus BLEU: matches of n-grams of length 1 to 4, their totals, and the two lengths."""
    matches = []
    totals = []
    for n in range(1, MAX_N + 1):
        counts = _ngrams(candidate, n)
        matches.append(_clipped_matches(counts, [_ngrams(reference, n) for reference in references]))
        totals.append(counts.total())
    reference_length = _closest_length(len(candidate), [len(target) for target in references])
    return [*matches, *totals, len(candidate), reference_length]


def bleu_of_counts(counts: Sequence[float]) -> BleuScores:
    """BLEU of a corpus from the sums of `bleu_counts` over its images."""
    *ngrams, candidate_length, reference_length = counts
    penalty = _brevity_penalty(candidate_length, reference_length)
    product = 1.0
    scores = []
    for n in range(MAX_N):
        product *= (ngrams[n] + 1e-15) / (ngrams[MAX_N + n] + 1e-9)
        scores.append(penalty * product ** (1 / (n + 1)))
    return BleuScores(*scores)


def _clipped_matches(counts: NgramCounts, references: Sequence[NgramCounts]) -> int:
    """How many n-grams of the candidate are in a reference, each at most as often as in the reference that has most."""
    matches = 0
    for ngram, count in counts.items():
        largest = max(reference.get(ngram, 0) for reference in references)
        matches += min(count, largest)
    return matches


def _closest_length(length: int, lengths: Sequence[int]) -> int:
    return min(lengths, key=lambda other: (abs(other - length), other))


def _brevity_penalty(candidate_length: float, reference_length: float) -> float:
    ratio = (candidate_length + 1e-15) / (reference_length + 1e-9)
    return exp(min(0.0, 1 - 1 / ratio))


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Mean ROUGE-L F-score with beta 1.2 (Lin, "ROUGE", 2004, section 3).

    As in coco-caption, precision and recall are the maxima over the references, not necessarily of the same one.
    """
    _check_tokens(candidates, references)
    scores = [rouge_l_of_image(c, targets) for c, targets in zip(candidates, references, strict=True)]
    return sum(scores) / len(scores)


def rouge_l_of_image(candidate: Tokens, references: Sequence[Tokens]) -> float:
    """ROUGE-L F-score of one candidate."""
    candidate = candidate or [""]  # coco-caption treats an empty sentence as one empty word
    precision = 0.0
    recall = 0.0
    for reference in references:
        target = reference or [""]
        common = _common_subsequence_length(candidate, target)
        precision = max(precision, common / len(candidate))
        recall = max(recall, common / len(target))
    if precision == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_subsequence_length(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence: the zero bits that a column of the table is left with.

    A column is the bits of an integer (Hyyrö, "Bit-parallel LCS-length computation revisited", 2004, section 4).
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    mask = (1 << len(first)) - 1
    column = mask
    for word in second:
        matched = column & positions.get(word, 0)
        column = (column + matched | column - matched) & mask
    return len(first) - column.bit_count()


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """CIDEr-D as coco-caption reports it, on a scale of 10 (Vedantam et al., "CIDEr", 2015, sections 4 and 7).

    Raises ValueError for fewer than two images: with one image, all n-grams are in every image and have weight zero.
    """
    _check_tokens(candidates, references)
    if len(candidates) < 2:
        raise ValueError("CIDEr weighs n-grams by how few images have them and needs at least two images; got 1.")
    corpus = Cider(references)
    return sum(corpus.score(c, targets) for c, targets in zip(candidates, references, strict=True)) / len(candidates)


class Cider:
    """CIDEr-D of single candidates, with n-gram weights from the references of all images of a corpus.

    The weights of references are cached, for many candidates of the same image.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        self._idf = _InverseDocumentFrequency(references)
        self._reference_weights: dict[tuple[Ngram, ...], list[TfIdf]] = {}

    def score(self, candidate: Tokens, references: Sequence[Tokens]) -> float:
        """CIDEr-D on a scale of 10; 0 for nothing in common with the references."""
        key = tuple(map(tuple, references))
        if key not in self._reference_weights:
            self._reference_weights[key] = [_tf_idf(target, self._idf) for target in key]
        candidate_weights = _tf_idf(candidate, self._idf)
        total = 0.0
        for target, weights in zip(key, self._reference_weights[key], strict=True):
            total += _similarity(candidate_weights, weights) * _length_penalty(candidate, target)
        return CIDER_SCALE * total / len(key)


class _InverseDocumentFrequency(dict[Ngram, float]):
    """Log of the number of images over the number whose references have an n-gram, at least one."""

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        counts: NgramCounts = Counter()
        for targets in references:
            counts.update(_distinct_ngrams(targets))
        images = len(references)
        super().__init__((ngram, log(images) - log(count)) for ngram, count in counts.items())
        self._default = log(images)

    def __missing__(self, ngram: Ngram) -> float:
        return self._default


def _distinct_ngrams(references: Sequence[Tokens]) -> set[Ngram]:
    """The n-grams of all lengths in any of the references."""
    distinct: set[Ngram] = set()
    for reference in references:
        for n in range(1, MAX_N + 1):
            distinct.update(_ngrams(reference, n))
    return distinct


def _tf_idf(tokens: Tokens, idf: _InverseDocumentFrequency) -> TfIdf:
    counts = (_ngrams(tokens, n) for n in range(1, MAX_N + 1))
    return [{ngram: count * idf[ngram] for ngram, count in table.items()} for table in counts]


def _similarity(candidate: TfIdf, reference: TfIdf) -> float:
    """Mean cosine over n-gram lengths, with the candidate's weights clipped at the reference's (the D of CIDEr-D)."""
    total = 0.0
    for ours, theirs in zip(candidate, reference, strict=True):
        overlap = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs)
        if overlap:
            total += overlap / (_norm(ours) * _norm(theirs))
    return total / MAX_N


def _norm(weights: dict[Ngram, float]) -> float:
    return sqrt(sum(weight * weight for weight in weights.values()))


def _length_penalty(candidate: Tokens, target: Tokens) -> float:
    difference = len(candidate) - len(target)  # coco-caption counts bigrams: equal except for sentences that score 0
    return exp(-(difference**2) / (2 * CIDER_SIGMA**2))


def _ngrams(tokens: Tokens, n: int) -> NgramCounts:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def _check_ids(predictions: Mapping[Key, str], references: Mapping[Key, Sequence[str]]) -> None:
    unmatched = predictions.keys() ^ references.keys()
    if unmatched:
        raise ValueError(
            f"Predictions and references need the same ids: {len(predictions.keys() - references.keys())} have no "
            f"references and {len(references.keys() - predictions.keys())} no prediction, such as "
            f"{min(unmatched, key=str)!r}."
        )
    for key, sentences in references.items():
        if isinstance(sentences, str) or not sentences:
            raise ValueError(f"References of {key!r} need to be a list of at least one sentence; got {sentences!r}.")


def _check_tokens(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> None:
    if not candidates or len(candidates) != len(references):
        raise ValueError(
            f"Caption metrics need as many candidates as lists of references, and at least one; "
            f"got {len(candidates)} and {len(references)}."
        )
    for index, targets in enumerate(references):
        if not targets:
            raise ValueError(f"An image needs at least one reference; the one at index {index} has none.")
