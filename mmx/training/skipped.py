"""Training examples that cannot be read: noted once, printed, and limited."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from mmx.errors import TrainingError
from mmx.evaluation.evaluate import first_skipped, skip_limit


def note_skipped(messages: Sequence[str], noted: list[str], quiet: bool) -> None:
    """Add the messages that are new to a list, and print them unless `quiet`."""
    for message in messages:
        if message not in noted:
            noted.append(message)
            if not quiet:
                tqdm.write(f"skipped: {message}", file=sys.stderr)


def check_skipped(skipped: Sequence[str], num_examples: int, max_skip_fraction: float) -> None:
    """Raise TrainingError if more training examples than `skip_limit` allows cannot be read."""
    limit = skip_limit(num_examples, max_skip_fraction)
    if len(skipped) > limit:
        raise TrainingError(
            f"{len(skipped)} of {num_examples} training examples cannot be read, and at most {limit} may be "
            f"(training.max_skip_fraction); correct or remove them: {first_skipped(skipped)}.",
            code="training.too_many_skipped",
            skipped=len(skipped),
            limit=limit,
            first=skipped[0],
        )
