"""One trial of a study: a small model, trained and measured on given texts by the roads that all models take.

Alphabet: B texts, S slots.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmx.config.loader import parse_config
from mmx.config.schema import DataConfig, RunConfig
from mmx.data.formats import read_examples
from mmx.evaluation.evaluate import EvaluatedText, evaluate
from mmx.inference.pipeline import Pipeline
from mmx.models.checkpoint import load_model
from mmx.models.model import Model
from mmx.studies.synthetic_text import TextExample
from mmx.training.loop import train

SOURCE = "text"
NEVER = 1_000_000_000  # more steps than any study takes: nothing is saved or reported on the way


@dataclass(frozen=True)
class Experiment:
    """What came out. loss: nats a token of the held-out targets; said: (text said, target) of each held-out pair."""

    loss: float
    predictions: tuple[tuple[str, str], ...]
    model: Model

    @property
    def exact(self) -> float:
        """The share of texts that are right from end to end."""
        return sum(said == target for said, target in self.predictions) / len(self.predictions)

    @property
    def words(self) -> float:
        """The share of the targets' words that stand in their place."""
        return share_in_place(self.predictions, lambda word: True)[0]


def share_in_place(said: Sequence[tuple[str, str]], counts: Callable[[str], bool]) -> tuple[float, int]:
    """Of the targets' words that count, the share that was said in its place, and their number (0.0 of 0)."""
    found = []
    for text, target in said:
        given = words_of(text)
        found += [given[i : i + 1] == [word] for i, word in enumerate(words_of(target)) if counts(word)]
    return sum(found) / max(len(found), 1), len(found)


def words_of(text: str) -> list[str]:
    """The words of a text, commas apart."""
    return text.replace(",", " ").split()


def run_experiment(
    model: Mapping[str, Any],
    learned: Sequence[TextExample],
    held: Sequence[TextExample],
    steps: int,
    seed: int,
    **training: Any,
) -> Experiment:
    """Train a model of this configuration, with one source `text`, and measure it on the held-out pairs.

    `training` changes fields of TrainingConfig. Raises MmxError, as training and evaluation do.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        paths = [_write(folder / f"{part}.jsonl", pairs) for part, pairs in (("train", learned), ("held", held))]
        longest = model["decoder"]["max_position_embeddings"]
        facts = {
            "per_device_batch_size": 32,
            "texts_per_image": 1,
            "warmup_steps": max(1, steps // 10),
            "label_smoothing": 0.0,
        }
        never = {"save_steps": NEVER, "eval_steps": NEVER, "logging_steps": NEVER, "max_target_length": longest}
        document = {
            "model": dict(model),
            "train": [{"path": paths[0]}],
            "training": {**facts, **never, "max_steps": steps, "seed": seed, **training},
            "generation": {"max_new_tokens": longest - 2},
            "output_dir": str(folder / "run"),
        }
        config = parse_config(document, RunConfig, where="study")
        trained = load_model(train(config, quiet=True))
        report = evaluate(
            Pipeline(trained, config.generation), read_examples(DataConfig(path=paths[1])), batch_size=100
        )
    return Experiment(report.metrics["loss"], tuple(map(_said, report.predictions)), trained)


def _said(judged: EvaluatedText) -> tuple[str, str]:
    return judged.prediction, judged.targets[0]


def _write(path: Path, pairs: Sequence[TextExample]) -> str:
    """A manifest of texts and what should be said of them."""
    rows = ({SOURCE: pair.source, "captions": [pair.target]} for pair in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
