"""The metrics of a run, one JSON object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from mmx.errors import TrainingError
from mmx.io.atomic import atomic_write_text

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends metrics to `metrics.jsonl` in a run folder.

    Args:
        folder: the run folder.
        quiet: do not print the metrics to standard error.
    """

    def __init__(self, folder: Path, quiet: bool) -> None:
        self.path = folder / METRICS_FILE
        self.quiet = quiet

    def append(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Append one line. Raises TrainingError if the file cannot be written."""
        line = {"step": step, "seconds": round(seconds, 1), **metrics}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written: {error.strerror}; free some space and use --resume.",
                code="training.write",
                path=str(self.path),
            ) from error
        if not self.quiet:
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
            tqdm.write(f"step {step}: {numbers}", file=sys.stderr)

    def truncate(self, step: int) -> None:
        """Remove lines after a step, which will be trained again, and incomplete lines. Raises OSError."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                continue
        atomic_write_text(self.path, "".join(kept))
