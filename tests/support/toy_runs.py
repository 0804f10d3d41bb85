"""Small training runs on lists of numbers, and a trainer that records its steps."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmx.config.schema import RunConfig
from mmx.data.batching import Batch
from mmx.training.loop import StepResult, Trainer
from mmx.training.lr_schedule import learning_rate

COUNT = 23  # not a multiple of any batch size: epochs end inside batches


class RecordedStep(NamedTuple):
    """One step of a run."""

    step: int
    loss: float
    learning_rate: float
    ids: list[str]


def write_numbers(folder: Path, count: int = COUNT, damaged: int | None = None, name: str = "numbers.jsonl") -> str:
    """Write a manifest of lists of one to three numbers with two captions each; the line `damaged` holds a NaN."""
    lines = []
    for i in range(count):
        numbers = [i % 7 / 7 + i / 1000, *[i % 3 / 3] * (i % 3)]
        if i == damaged:
            numbers[0] = float("nan")
        captions = [f"number {i % 7}", f"the rest is {i % 3}."]
        lines.append(json.dumps({"numbers": numbers, "captions": captions}) + "\n")
    path = folder / name
    path.write_text("".join(lines))
    return str(path)


def number_config(
    data: str, output_dir: Path, validate: bool = False, dropout: float = 0.1, **training: object
) -> RunConfig:
    """Return a run of a tiny model on numbers; `training` changes fields of TrainingConfig."""
    options = {
        "mixed_precision": "no",
        "max_steps": 12,
        "per_device_batch_size": 4,
        "texts_per_image": 2,
        "warmup_steps": 3,
        "learning_rate": 3e-3,
        "ema_decay": 0.9,
        "logging_steps": 1,
        "save_steps": 4,
        "eval_steps": 6,
        **training,
    }
    model = {
        "sources": {"numbers": {"encoder": "mmx.testing:ToyEncoder"}},
        "decoder": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "dropout": dropout},
        "vocab_size": 300,
    }
    document = {
        "model": model,
        "train": [{"path": data}],
        "validation": {"some": {"path": data, "max_examples": 7}} if validate else {},
        "training": options,
        "generation": {"max_new_tokens": 4},
        "output_dir": str(output_dir),
    }
    return RunConfig.model_validate(document)


def scst_config(data: str, output_dir: Path, texts_per_image: int = 4, **training: object) -> RunConfig:
    """Return a run that trains the captions of numbers by reward, and the same captions by cross-entropy."""
    config = number_config(data, output_dir, texts_per_image=texts_per_image, **training)
    document = config.model_dump(mode="json")
    document["train"] = [{"path": data, "reward": "cider"}, {"path": data}]
    return RunConfig.model_validate(document)


class RecordingTrainer(Trainer):
    """Records each step. SIGTERM is simulated during the step `stop_in`."""

    stop_in: int | None = None

    def __init__(self, config: RunConfig, resume: bool = False) -> None:
        super().__init__(config, resume, quiet=True)
        self.recorded: list[RecordedStep] = []

    def _step(self, batches: Sequence[Batch]) -> StepResult:
        if self.progress.step + 1 == self.stop_in:
            self.stop.received = True
        result = super()._step(batches)
        ids = [name for batch in batches for name in batch.ids]
        self.recorded.append(RecordedStep(self.progress.step, result.loss, learning_rate(self.optimizer), ids))
        return result


def state_bytes(run: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor file of the newest state: averaged weights, raw weights and optimizer."""
    last = (run / "last").resolve()
    return {str(path.relative_to(last)): path.read_bytes() for path in sorted(last.rglob("*.safetensors"))}


def metrics_lines(run: Path) -> list[dict[str, float]]:
    """Return the reported metrics of a run without the time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def child_environment() -> dict[str, str]:
    """Return the environment of another Python process that must find this package and these files."""
    here = Path(__file__).resolve()
    paths = [str(here.parents[2]), str(here.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
