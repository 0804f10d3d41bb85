"""One experiment of a study: train a small model and evaluate it, with the same functions as any other model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from mmx.config.loader import parse_config
from mmx.config.schema import DataConfig, RunConfig
from mmx.data.formats import read_examples
from mmx.evaluation.evaluate import EvaluationOptions, evaluate
from mmx.inference.pipeline import Pipeline
from mmx.models.checkpoint import load_model
from mmx.models.model import Model
from mmx.studies.synthetic_text import TextExample
from mmx.training.loop import train

SOURCE = "text"
NEVER = 1_000_000_000  # more steps than any experiment has


class Prediction(NamedTuple):
    """A generated text and the text that was expected."""

    text: str
    target: str


class WordAccuracy(NamedTuple):
    """The fraction of words that are correct, and their number."""

    accuracy: float
    words: int


@dataclass(frozen=True)
class ExperimentConfig:
    """What differs between experiments.

    Args:
        model: the model section of the configuration.
        steps: training steps.
        seed: of the initial weights and the order of the texts.
        learning_rate: peak learning rate.
    """

    model: Mapping[str, object]
    steps: int
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class Experiment:
    """Results on the held-out texts.

    Args:
        loss: mean cross-entropy per token of the targets, in nats.
        predictions: one for each text.
        model: the trained model.
    """

    loss: float
    predictions: tuple[Prediction, ...]
    model: Model

    @property
    def exact(self) -> float:
        """The fraction of texts that are entirely correct."""
        return sum(text == target for text, target in self.predictions) / len(self.predictions)

    @property
    def words(self) -> float:
        """The fraction of words of the targets that are generated at the same position."""
        return word_accuracy(self.predictions).accuracy


def word_accuracy(predictions: Sequence[Prediction], counts: Callable[[str], bool] = lambda word: True) -> WordAccuracy:
    """The fraction of the targets' words, of those that count, that are generated at the same position; 0 of none."""
    correct = 0
    total = 0
    for text, target in predictions:
        generated = split_words(text)
        for index, word in enumerate(split_words(target)):
            if counts(word):
                total += 1
                correct += generated[index : index + 1] == [word]
    return WordAccuracy(correct / max(total, 1), total)


def split_words(text: str) -> list[str]:
    """The words of a text without commas."""
    return text.replace(",", " ").split()


def run_experiment(
    config: ExperimentConfig, train_texts: Sequence[TextExample], held_out: Sequence[TextExample]
) -> Experiment:
    """Train a model with one source `text`, and evaluate it on the held-out texts.

    Raises MmxError as training and evaluation do.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        train_path = _write_manifest(folder / "train.jsonl", train_texts)
        held_out_path = _write_manifest(folder / "held_out.jsonl", held_out)
        document = _run_document(config, train_path, folder / "run")
        run_config = parse_config(document, RunConfig, where="study")
        model = load_model(train(run_config, quiet=True))
        pipeline = Pipeline(model, run_config.generation)
        examples = read_examples(DataConfig(path=held_out_path), sources=model.encoders)
        report = evaluate(pipeline, examples, EvaluationOptions(batch_size=100))
    predictions = tuple(Prediction(text.prediction, text.targets[0]) for text in report.predictions)
    return Experiment(report.metrics["loss"], predictions, model)


def _run_document(config: ExperimentConfig, train_path: str, output_dir: Path) -> dict[str, object]:
    """The configuration of the training run."""
    decoder: Mapping[str, int] = config.model["decoder"]  # type: ignore[assignment]
    max_length = decoder["max_position_embeddings"]
    training = {
        "mixed_precision": "no",  # so that the results do not depend on the processor
        "per_device_batch_size": 32,
        "texts_per_image": 1,
        "max_steps": config.steps,
        "warmup_steps": max(1, config.steps // 10),
        "learning_rate": config.learning_rate,
        "label_smoothing": 0.0,
        "max_target_length": max_length,
        "save_steps": NEVER,
        "eval_steps": NEVER,
        "logging_steps": NEVER,
        "seed": config.seed,
    }
    return {
        "model": dict(config.model),
        "train": [{"path": train_path}],
        "training": training,
        "generation": {"max_new_tokens": max_length - 2},
        "output_dir": str(output_dir),
    }


def _write_manifest(path: Path, texts: Sequence[TextExample]) -> str:
    """A data file in which each source has its target as caption."""
    rows = ({SOURCE: text.source, "captions": [text.target]} for text in texts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
