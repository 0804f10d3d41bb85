"""From a configuration file to answers that are right, through the command line, in about a minute on two cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

from toy_runs import child_environment

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "scenes-60s.yaml"


def mmx(*words: str) -> str:
    """What the command prints; it must end well."""
    environment = {**child_environment(), "OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1))}
    done = subprocess.run(
        [sys.executable, "-m", "mmx", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_minute_of_training_answers_nine_questions_of_ten(tmp_path):
    best = mmx("train", str(CONFIG), f"output_dir={tmp_path / 'run'}", "--quiet").strip()
    assert best == str(tmp_path / "run" / "best")
    unseen = ["num_examples=250", "seed=3", "max_objects=1", "tasks=[ask]", "question_types=[color, size]"]
    printed = mmx("eval", best, "--data", "scenes", *unseen, "--json", "--quiet", "--out", str(tmp_path / "report"))
    metrics = json.loads(printed)
    assert metrics["questions"] == 500
    assert metrics["exact match"] >= 0.9
    assert metrics == json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert len((tmp_path / "report" / "predictions.jsonl").read_text().splitlines()) == 500
