"""Metrics of generated texts, each as the sums of numbers that single texts add to it.

A metric of a corpus, such as BLEU or a word error rate, is not the mean of its values for single texts. Sums of what
each text adds are enough for all of them, and let `mmx.evaluation.bootstrap` compute a metric of thousands of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmx.errors import MmxError, suggest
from mmx.evaluation.joining import ScoredText
from mmx.evaluation.metrics.answers import exact_match, vqa_accuracy
from mmx.evaluation.metrics.captions import Cider, bleu_counts, bleu_of_counts, rouge_l_of_image
from mmx.evaluation.metrics.edit_distance import anls, character_errors, word_errors
from mmx.evaluation.metrics.ptb_tokenizer import ptb_tokens

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
ROUGE_L = "ROUGE-L"
CIDER = "CIDEr"
WER = "WER"
CER = "CER"
EXACT_MATCH = "exact match"
VQA_ACCURACY = "VQA accuracy"
ANLS = "ANLS"
METRICS = (*BLEU, ROUGE_L, CIDER, WER, CER, EXACT_MATCH, VQA_ACCURACY, ANLS)
ERROR_RATES = {WER: word_errors, CER: character_errors}

Combine = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class MetricStatistics:
    """What single texts add to a metric.

    Args:
        name: of the metric.
        examples: index of the example of each text, [texts].
        statistics: numbers whose sums over texts determine the metric, [texts, statistics].
        combine: returns the metric from the sums.
    """

    name: str
    examples: NDArray[np.int64]
    statistics: NDArray[np.float64]
    combine: Combine

    @property
    def value(self) -> float:
        """The metric of all texts."""
        return self.combine(self.statistics.sum(axis=0).tolist())


def score_texts(texts: Sequence[ScoredText], names: Collection[str] = ()) -> list[MetricStatistics]:
    """Return the metrics of captions, then those of answers.

    Captions: BLEU, ROUGE-L, CIDEr, and WER and CER if each has one reference. Answers: exact match, VQA accuracy if
    some question has the answers of several annotators, ANLS.

    Args:
        names: the metrics to compute; all that the texts allow by default.

    Raises:
        MmxError: a name is unknown, or the texts do not allow it.
    """
    captions = [text for text in texts if text.question is None]
    answers = [text for text in texts if text.question is not None]
    possible = [*_caption_metrics(captions), *_answer_metrics(answers)]
    for name in names:
        _check_name(name, possible)
    selected = [name for name in possible if not names or name in names]
    return [*_score_captions(captions, selected), *_score_answers(answers, selected)]


def mean_of(name: str, texts: Sequence[ScoredText], values: Sequence[float]) -> MetricStatistics:
    """Return a metric that is the mean of its values for single texts."""
    return ratio_of(name, texts, [(value, 1) for value in values])


def ratio_of(name: str, texts: Sequence[ScoredText], counts: Sequence[tuple[float, float]]) -> MetricStatistics:
    """Return a metric that is one sum over another; texts add a pair of numbers to them."""
    return _statistics(name, texts, counts, _ratio)


def _ratio(sums: Sequence[float]) -> float:
    return sums[0] / sums[1] if sums[1] else math.nan


def _statistics(
    name: str, texts: Sequence[ScoredText], rows: Sequence[Sequence[float]], combine: Combine
) -> MetricStatistics:
    examples = np.array([text.example for text in texts], dtype=np.int64)
    return MetricStatistics(name, examples, np.array(rows, dtype=np.float64), combine)


# ---- which metrics ---------------------------------------------------------------------------------------------


def _caption_metrics(captions: Sequence[ScoredText]) -> list[str]:
    """Return the metrics that captions allow. CIDEr weighs n-grams by how many images have them: it needs two."""
    names: list[str] = []
    if captions:
        names += [*BLEU, ROUGE_L]
    if len(captions) > 1:
        names.append(CIDER)
    if captions and all(len(text.targets) == 1 for text in captions):
        names += ERROR_RATES
    return names


def _answer_metrics(answers: Sequence[ScoredText]) -> list[str]:
    if not answers:
        return []
    several = any(len(text.targets) > 1 for text in answers)
    return [EXACT_MATCH, VQA_ACCURACY, ANLS] if several else [EXACT_MATCH, ANLS]


def _check_name(name: str, possible: Collection[str]) -> None:
    if name not in METRICS:
        message = f"there is no metric {name!r}; {suggest(name, METRICS)}"
        raise MmxError(message, code="score.unknown_metric", given=name, known=METRICS)
    if name not in possible:
        message = f"{name} is not defined for these texts; expected one of {', '.join(possible)}."
        raise MmxError(message, code="score.metric", given=name, known=tuple(possible))


# ---- captions --------------------------------------------------------------------------------------------------


def _score_captions(captions: Sequence[ScoredText], names: Collection[str]) -> list[MetricStatistics]:
    metrics: list[MetricStatistics] = []
    if {*BLEU, ROUGE_L, CIDER} & set(names):
        candidates = [ptb_tokens(text.prediction) for text in captions]
        targets = [[ptb_tokens(target) for target in text.targets] for text in captions]
        pairs = list(zip(candidates, targets, strict=True))
        counts = [bleu_counts(candidate, references) for candidate, references in pairs]
        for n, name in enumerate(BLEU):
            if name in names:
                metrics.append(_statistics(name, captions, counts, _bleu(n)))
        if ROUGE_L in names:
            metrics.append(mean_of(ROUGE_L, captions, [rouge_l_of_image(*pair) for pair in pairs]))
        if CIDER in names:
            cider = Cider(targets)
            metrics.append(mean_of(CIDER, captions, [cider.score(*pair) for pair in pairs]))
    for name, count_errors in ERROR_RATES.items():
        if name in names:
            errors = [count_errors(text.prediction, text.targets[0]) for text in captions]
            metrics.append(ratio_of(name, captions, errors))
    return metrics


def _bleu(index: int) -> Combine:
    return lambda sums: bleu_of_counts(sums)[index]


# ---- answers ---------------------------------------------------------------------------------------------------


def _score_answers(answers: Sequence[ScoredText], names: Collection[str]) -> list[MetricStatistics]:
    metrics = []
    for name, score in ((EXACT_MATCH, exact_match), (VQA_ACCURACY, vqa_accuracy), (ANLS, anls)):
        if name in names:
            values = [score(text.prediction, text.targets) for text in answers]
            metrics.append(mean_of(name, answers, values))
    return metrics
