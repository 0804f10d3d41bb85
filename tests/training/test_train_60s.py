"""From a configuration file to correct answers through the command line, in about a minute on two cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import child_environment

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "scenes-60s.yaml"
README = (ROOT / "README.md").read_text(encoding="utf-8")
UNSEEN_SCENES = [
    "num_examples=250",
    "seed=3",
    "max_objects=1",
    "tasks=[ask]",
    "question_types=[color, size]",
]


def run_mmx(*args: str) -> str:
    """Return the standard output of the command, which must succeed."""
    environment = {**child_environment(), "OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1))}
    done = subprocess.run(
        [sys.executable, "-m", "mmx", *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_minute_of_training_answers_nine_of_ten_questions(tmp_path):
    best = run_mmx("train", str(CONFIG), f"output_dir={tmp_path / 'run'}", "--quiet").strip()
    assert best == str(tmp_path / "run" / "best")
    report = tmp_path / "report"
    printed = run_mmx("eval", best, "--data", "scenes", *UNSEEN_SCENES, "--json", "--quiet", "--out-dir", str(report))
    metrics = json.loads(printed)
    assert metrics["questions"] == 500
    assert metrics["exact match"] >= 0.9
    assert metrics == json.loads((report / "metrics.json").read_text())
    assert len((report / "predictions.jsonl").read_text().splitlines()) == 500


@pytest.mark.slow
def test_the_bundled_model_learns_the_captions_of_a_dozen_images(tmp_path):
    """What the README shows: the command, the captions of three images, and that all twelve are learned."""
    saved = run_mmx("train", "configs/your-images.yaml", f"output_dir={tmp_path / 'run'}", "--quiet").strip()
    assert saved == str(tmp_path / "run" / "last")
    printed = run_mmx("caption", "demos/your-images", "--model", saved, "--quiet")
    captions = {}
    for line in printed.splitlines():
        path, caption = line.split("\t")
        captions[Path(path).name] = caption
    rows = [json.loads(line) for line in (ROOT / "demos/your-images/list.jsonl").read_text().splitlines()]
    assert len(captions) == len(rows) == 12
    assert sum(captions[row["image"]] in row["captions"] for row in rows) >= 11
    assert all(f"demos/your-images/{row['image']}\t{row['captions'][0]}\n" in README for row in rows[:3])
