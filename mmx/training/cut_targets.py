"""Target texts that were cut because they are too long: their number, their share, and the first of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from mmx.data.batching import Batch
from mmx.evaluation.report import EvaluationReport, cut_sentence
from mmx.training.state import TrainingProgress

LIMIT = "training.max_target_length or the decoder's positions"


def count_cut(batches: Sequence[Batch], progress: TrainingProgress, quiet: bool) -> None:
    """Count the texts of a step that were cut, and print the first of a run unless `quiet`."""
    cut = [origin for batch in batches for origin in batch.cut]
    progress.texts_seen += sum(batch.num_texts for batch in batches)
    progress.cut_texts += len(cut)
    if cut and not progress.first_cut:
        progress.first_cut = cut[0]
        if not quiet:
            tqdm.write(f"cut: a target text of {cut[0]} exceeds {LIMIT}", file=sys.stderr)


def print_cut(progress: TrainingProgress, quiet: bool) -> None:
    """Print how many texts of the run were cut, if any were, unless `quiet`."""
    if progress.cut_texts and not quiet:
        sentence = cut_sentence(progress.cut_texts, progress.texts_seen, progress.first_cut, LIMIT)
        tqdm.write(sentence, file=sys.stderr)


def print_cut_references(report: EvaluationReport, quiet: bool) -> None:
    """Print how many reference texts of a validation were cut, if any were, unless `quiet`."""
    sentence = report.cut_sentence()
    if sentence and not quiet:
        tqdm.write(f"validation: {sentence}", file=sys.stderr)
