"""Small training runs on numbers: what they are made of, and a trainer that writes down what it does."""

import json
import os
from pathlib import Path
from typing import Any

from mmx.config.schema import RunConfig
from mmx.training.loop import Trainer

COUNT = 23  # no multiple of any batch size: epochs end inside batches


def write_numbers(folder: Path, count: int = COUNT, bad: int | None = None, name: str = "numbers.jsonl") -> str:
    """A manifest of lists of one to three numbers, each with two captions; the one numbered `bad` holds a NaN."""
    rows = [
        {"numbers": [i % 7 / 7, *[i % 3 / 3] * (i % 3)], "captions": [f"number {i % 7}", f"the rest is {i % 3}."]}
        for i in range(count)
    ]
    for number, row in enumerate(rows):
        row["numbers"][0] = float("nan") if number == bad else row["numbers"][0] + number / 1000
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def number_config(data: str, out: Path, validate: bool = False, dropout: float = 0.1, **training: Any) -> RunConfig:
    """A run of a tiny model on numbers; `training` changes fields of TrainingConfig."""
    facts = {
        "max_steps": 12,
        "per_device_batch_size": 4,
        "texts_per_image": 2,
        "warmup_steps": 3,
        "learning_rate": 3e-3,
        "ema_decay": 0.9,
        "logging_steps": 1,
    }
    facts |= {"save_steps": 4, "eval_steps": 6} | training
    model = {
        "sources": {"numbers": {"encoder": "mmx.testing:ToyEncoder"}},
        "decoder": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "dropout": dropout},
        "vocab_size": 300,
    }
    validation = {"some": {"path": data, "max_examples": 7}} if validate else {}
    document = {"model": model, "train": [{"path": data}], "validation": validation, "training": facts}
    return RunConfig.model_validate({**document, "generation": {"max_new_tokens": 4}, "output_dir": str(out)})


def critical_config(data: str, out: Path, streams: int = 4, **training: Any) -> RunConfig:
    """Captions of the numbers by reward, and beside them the same word by word."""
    document = number_config(data, out, streams=streams, **training).model_dump(mode="json")
    document["train"] = [{"path": data, "reward": "cider"}, {"path": data}]
    return RunConfig.model_validate(document)


class Watched(Trainer):
    """Notes (step, loss, rate, ids) of each step; asked to stop during the step `stop_in`."""

    stop_in: int | None = None

    def __init__(self, config: RunConfig, resume: bool = False) -> None:
        super().__init__(config, resume, quiet=True)
        self.taken: list[tuple[int, float, float, list[str]]] = []

    def _step(self, batches: Any) -> tuple[float, bool]:
        if self.progress.step + 1 == self.stop_in:
            self.stop.received = True
        loss, stopping = super()._step(batches)
        ids = [name for batch in batches for name in batch.ids]
        self.taken.append((self.progress.step, loss, self._rate(), ids))
        return loss, stopping


def state_bytes(out: Path) -> dict[str, bytes]:
    """Every tensor file of the newest state, averaged weights, raw weights and optimizer, as bytes."""
    last = (out / "last").resolve()
    return {str(path.relative_to(last)): path.read_bytes() for path in sorted(last.rglob("*.safetensors"))}


def reports(out: Path) -> list[dict[str, float]]:
    """What the run reported, but for the time."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def child_environment() -> dict[str, str]:
    """For another Python that must find this package and these files."""
    here = Path(__file__).resolve()
    paths = [str(here.parents[2]), str(here.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
