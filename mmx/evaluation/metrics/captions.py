"""BLEU, ROUGE-L and CIDEr of captions, equal to coco-caption's numbers down to its habits.

`caption_metrics` takes sentences; `bleu`, `rouge_l` and `cider` take tokens: one candidate per picture (`list[str]`)
beside that picture's references (`list[list[str]]`). CIDEr is what coco-caption calls so, CIDEr-D: 0.60, not 60.

Its n-gram weights come from the references of the scored pictures, so CIDEr of a subset is not comparable with that of
the whole, and needs at least two pictures.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import exp, log, sqrt

from mmx.evaluation.metrics.ptb_tokenizer import ptb_tokens

Tokens = Sequence[str]
Ngrams = Counter[tuple[str, ...]]
Vector = list[dict[tuple[str, ...], float]]  # one table of weights for each n-gram length

MAX_N = 4


def caption_metrics(
    predictions: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    training_captions: Iterable[str] = (),
) -> dict[str, float]:
    """All caption metrics of predicted sentences, by picture id; tokenized as coco-caption tokenizes.

    Beside BLEU-1 to -4, ROUGE-L and CIDEr: `distinct`, the number of captions that differ in their tokens, and
    `length`, the mean number of tokens. A model that says the same of every picture has a `distinct` of 1. With known
    sentences, such as those trained on, also `novel`: the number of captions whose tokens are those of none of them.
    """
    _check_ids(predictions, references)
    candidates = [ptb_tokens(predictions[key]) for key in references]
    targets = [[ptb_tokens(sentence) for sentence in sentences] for sentences in references.values()]
    heard = {tuple(ptb_tokens(sentence)) for sentence in training_captions}
    return {
        **{f"BLEU-{n}": score for n, score in enumerate(bleu(candidates, targets), start=1)},
        "ROUGE-L": rouge_l(candidates, targets),
        "CIDEr": cider(candidates, targets),
        "distinct": float(len(set(map(tuple, candidates)))),
        **({"novel": float(sum(tuple(candidate) not in heard for candidate in candidates))} if heard else {}),
        "length": sum(map(len, candidates)) / len(candidates),
    }


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of the corpus (Papineni et al., "BLEU", 2002, section 2).

    The brevity penalty counts, for each picture, the reference length closest to the candidate's, the shorter of two
    that are equally close. A missing n-gram length is nearly zero instead of zero, as in coco-caption's BleuScorer.
    """
    _check_tokens(candidates, references)
    found, possible = [0] * MAX_N, [0] * MAX_N
    for candidate, targets in zip(candidates, references, strict=True):
        for n in range(MAX_N):
            counts = _ngrams(candidate, n + 1)
            found[n] += (counts & _most(targets, n + 1)).total()  # & keeps the smaller count: clipped precision
            possible[n] += counts.total()
    said = sum(map(len, candidates))
    asked = sum(
        _closest(len(c), [len(target) for target in targets]) for c, targets in zip(candidates, references, strict=True)
    )
    return _geometric_means(found, possible, _brevity(said, asked))


def _most(references: Sequence[Tokens], n: int) -> Ngrams:
    """The highest count of each n-gram in any one reference."""
    most: Ngrams = Counter()
    for reference in references:
        most |= _ngrams(reference, n)
    return most


def _closest(length: int, lengths: Sequence[int]) -> int:
    return min(lengths, key=lambda other: (abs(other - length), other))


def _brevity(said: int, asked: int) -> float:
    ratio = (said + 1e-15) / (asked + 1e-9)
    return exp(min(0.0, 1 - 1 / ratio))


def _geometric_means(found: list[int], possible: list[int], brevity: float) -> tuple[float, float, float, float]:
    product, scores = 1.0, []
    for n in range(MAX_N):
        product *= (found[n] + 1e-15) / (possible[n] + 1e-9)
        scores.append(brevity * product ** (1 / (n + 1)))
    return tuple(scores)


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Mean ROUGE-L F-score, recall weighing more: beta 1.2 (Lin, "ROUGE", 2004, section 3).

    Precision and recall are each the best over the references, not necessarily of the same one (coco-caption).
    """
    _check_tokens(candidates, references)
    scores = [_rouge_l_of_one(c, targets) for c, targets in zip(candidates, references, strict=True)]
    return sum(scores) / len(scores)


def _rouge_l_of_one(candidate: Tokens, references: Sequence[Tokens], beta: float = 1.2) -> float:
    candidate = candidate or [""]  # coco-caption reads an empty sentence as one empty word
    common = [(_common_length(candidate, target or [""]), len(target or [""])) for target in references]
    precision = max(length for length, _ in common) / len(candidate)
    recall = max(length / size for length, size in common)
    if precision == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _common_length(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence, one row of the table at a time."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """CIDEr-D as coco-caption reports it, on a scale of 10 (Vedantam et al., "CIDEr", 2015, sections 4 and 7).

    Raises ValueError for fewer than two pictures: with one, every n-gram is in every picture and weighs nothing.
    """
    _check_tokens(candidates, references)
    if len(candidates) < 2:
        raise ValueError("CIDEr weighs n-grams by how few pictures have them and needs at least two pictures; got 1.")
    corpus = Cider(references)
    return sum(corpus.score(c, targets) for c, targets in zip(candidates, references, strict=True)) / len(candidates)


class Cider:
    """CIDEr-D of one candidate at a time, its n-gram weights from the references of all pictures of a corpus.

    What references weigh is kept, for a candidate that is one of many for the same picture.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        self._rarity = _rarity(references)
        self._weighed: dict[tuple[tuple[str, ...], ...], list[Vector]] = {}

    def score(self, candidate: Tokens, references: Sequence[Tokens]) -> float:
        """On a scale of 10: 0 has nothing in common with the references."""
        key = tuple(map(tuple, references))
        if key not in self._weighed:
            self._weighed[key] = [_vector(target, self._rarity) for target in key]
        ours = _vector(candidate, self._rarity)
        scores = [
            _similarity(ours, theirs) * _length_penalty(candidate, target)
            for target, theirs in zip(key, self._weighed[key], strict=True)
        ]
        return 10 * sum(scores) / len(scores)


class _Rarity(dict[tuple[str, ...], float]):
    """Log of all pictures over those whose references have an n-gram; one that none has counts as in one."""

    def __init__(self, seen: Ngrams, pictures: int) -> None:
        super().__init__((gram, log(pictures) - log(count)) for gram, count in seen.items())
        self._unseen = log(pictures)

    def __missing__(self, gram: tuple[str, ...]) -> float:
        return self._unseen


def _rarity(references: Sequence[Sequence[Tokens]]) -> _Rarity:
    seen: Ngrams = Counter()
    for targets in references:
        seen.update({gram for target in targets for n in range(1, MAX_N + 1) for gram in _ngrams(target, n)})
    return _Rarity(seen, len(references))


def _vector(tokens: Tokens, rarity: _Rarity) -> Vector:
    counts = (_ngrams(tokens, n) for n in range(1, MAX_N + 1))
    return [{gram: count * rarity[gram] for gram, count in table.items()} for table in counts]


def _similarity(ours: Vector, theirs: Vector) -> float:
    """Mean cosine over n-gram lengths; saying a word more often than the reference gains nothing (the D's clipping)."""
    total = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        overlap = sum(min(weight, other[gram]) * other[gram] for gram, weight in mine.items() if gram in other)
        if overlap:
            total += overlap / (_norm(mine) * _norm(other))
    return total / MAX_N


def _norm(weights: dict[tuple[str, ...], float]) -> float:
    return sqrt(sum(weight * weight for weight in weights.values()))


def _length_penalty(candidate: Tokens, target: Tokens, sigma: float = 6.0) -> float:
    apart = len(candidate) - len(target)  # coco-caption counts word pairs: the same, but for sentences that score 0
    return exp(-(apart**2) / (2 * sigma**2))


def _ngrams(tokens: Tokens, n: int) -> Ngrams:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _check_ids(predictions: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]) -> None:
    if unmatched := predictions.keys() ^ references.keys():
        raise ValueError(
            f"Predictions and references need the same ids: {len(predictions.keys() - references.keys())} have no "
            f"references and {len(references.keys() - predictions.keys())} no prediction, {min(unmatched, key=str)!r} "
            "for one."
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
    for place, targets in enumerate(references):
        if not targets:
            raise ValueError(f"A picture needs at least one reference; the one at place {place} has none.")
