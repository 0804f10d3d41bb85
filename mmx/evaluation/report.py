"""The report of an evaluation: metrics and predictions, and the files that hold them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from mmx.boxes import Box
from mmx.errors import DataError
from mmx.io.atomic import atomic_write_text

METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.jsonl"
CUT_TARGETS = "cut targets"


def cut_sentence(num_cut: int, num_texts: int, first: str, limit: str) -> str:
    """Return a sentence about target texts that were cut.

    Args:
        first: origin of the first of them.
        limit: what they exceed.
    """
    share = num_cut / num_texts
    return f"{num_cut} of {num_texts} target texts ({share:.2%}) exceed {limit} and were cut; the first: {first}"


@dataclass(frozen=True)
class EvaluatedText:
    """A generated text and its references.

    Args:
        key: (index of the example, index of the task in it).
        id: of the example.
        question: None for a caption.
        question_type: None if the data has no types.
        prediction: the generated text.
        score: of the prediction, see `GeneratedText.score`.
        targets: reference captions or answers.
        logprob: of the prediction, see `GeneratedText.logprob`.
        probability: of the prediction, see `GeneratedText.probability`.
        box: region that the question is about.
    """

    key: tuple[int, int]
    id: str
    question: str | None
    question_type: str | None
    prediction: str
    score: float
    targets: tuple[str, ...]
    logprob: float = math.nan
    probability: float = math.nan
    box: Box | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """The result of an evaluation.

    Args:
        metrics: values by name.
        predictions: all texts in the order of the examples.
        skipped: one sentence for each example that cannot be read.
        cut: the origin of the example for each of its targets that is longer than the positions of the model. Its loss
            is that of the first tokens.
    """

    metrics: dict[str, float]
    predictions: list[EvaluatedText]
    skipped: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        names = ", ".join(f"{name}: {value:.4g}" for name, value in self.metrics.items())
        return f"EvaluationReport({names}; predictions: {len(self.predictions)}, skipped: {len(self.skipped)})"

    def cut_sentence(self) -> str:
        """Return a sentence about targets that were cut, empty if there are none."""
        if not self.cut:
            return ""
        num_targets = sum(len(text.targets) for text in self.predictions)
        return cut_sentence(len(self.cut), num_targets, self.cut[0], "the positions of the decoder")

    def save(self, folder: Path) -> None:
        """Write metrics.json and predictions.jsonl, each atomically. Raises DataError if that is not possible."""
        rows = []
        for text in self.predictions:
            row: dict[str, object] = {
                "id": text.id,
                "question": text.question,
                "question_type": text.question_type,
                "prediction": text.prediction,
                "score": text.score,
                "targets": text.targets,
            }
            if text.box is not None:
                row["box"] = text.box
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        try:
            atomic_write_text(folder / PREDICTIONS_FILE, "".join(rows))
            atomic_write_text(folder / METRICS_FILE, json.dumps(self.metrics, indent=2) + "\n")
        except OSError as error:
            raise DataError(
                f"{folder} cannot be written: {error.strerror}; choose another folder.",
                code="evaluation.write",
                path=str(folder),
            ) from error
