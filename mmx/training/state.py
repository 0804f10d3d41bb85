"""Where a run stands: saved whole or not at all, and found again.

    runs/NAME/config.yaml            the resolved configuration of the run
    runs/NAME/metrics.jsonl          a line for each report
    runs/NAME/steps/000500/          a checkpoint folder (mmx.checkpoint), and in it training/: optimizer, raw weights
    runs/NAME/last -> steps/000500   the newest complete one
    runs/NAME/best -> steps/000300   the best by `training.monitor`

All tensors are safetensors, all else JSON. A resumed run continues to the bit, because data and dropout are functions
of the seed and the step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mmx.checkpoint import WEIGHTS, fill, read_tensors, write_folder, write_model
from mmx.config import Config
from mmx.errors import CheckpointError
from mmx.model import Model
from mmx.training.optim import MovingAverage


@dataclass
class Progress:
    """Steps done, the best value of the monitored metric and its step, samples passed over, seconds spent."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    seen: int = 0
    bad: list[str] = field(default_factory=list)
    seconds: float = 0.0


def save_state(
    run: Path,
    config: Config,
    model: Model,
    optimizer: torch.optim.Optimizer,
    average: MovingAverage,
    progress: Progress,
    provenance: Mapping[str, Any],
) -> Path:
    """Write steps/NNNNNN and point `last` at it; point `best` too if this step is the best. Old steps are removed
    only once the new one is complete."""

    def write(place: Path) -> None:
        write_model(place, model, provenance, config.generation, weights=average.weights)
        inner = place / "training"
        inner.mkdir()
        raw = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        save_file(raw, inner / WEIGHTS)
        save_file(_flatten(optimizer), inner / "optimizer.safetensors")
        (inner / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")

    folder = write_folder(run / "steps" / f"{progress.step:06d}", write)
    point(run / "last", folder)
    if progress.best_step == progress.step:
        point(run / "best", folder)
    _prune(run, config.training.keep)
    return folder


def load_state(
    folder: Path, model: Model, optimizer: torch.optim.Optimizer, average: MovingAverage
) -> Progress:
    """Restore everything from a step's folder and return its progress. Raises CheckpointError."""
    inner = folder / "training"
    fill(model, read_tensors(inner / WEIGHTS), str(inner / WEIGHTS))
    _unflatten(optimizer, load_file(inner / "optimizer.safetensors"), folder)
    averaged = read_tensors(folder / WEIGHTS)
    for name, tensor in average.weights.items():
        tensor.copy_(averaged[name])
    return Progress(**json.loads((inner / "progress.json").read_text(encoding="utf-8")))


def newest(run: Path) -> Path | None:
    """The newest complete step of a run, or None."""
    steps = sorted(path for path in (run / "steps").glob("[0-9]*") if (path / "training" / "progress.json").is_file())
    return steps[-1] if steps else None


def point(link: Path, folder: Path) -> None:
    """Let `link` name `folder` from one moment to the next."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.relative_to(link.parent))
    os.replace(temporary, link)


def _prune(run: Path, keep: int) -> None:
    pointed = {(run / name).resolve() for name in ("last", "best")}
    steps = sorted((run / "steps").glob("[0-9]*"))
    for old in steps[:-keep]:
        if old.resolve() not in pointed:
            shutil.rmtree(old, ignore_errors=True)


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors by "parameter.key"; rates are functions of the step, so there is nothing else to keep."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().clone().contiguous()
        for index, entry in state.items()
        for key, value in entry.items()
    }


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    document = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    if tensors and len(state) != sum(len(group["params"]) for group in document["param_groups"]):
        raise CheckpointError(f"{folder} was trained with other parts frozen; resume with the configuration it had.")
    optimizer.load_state_dict({"state": state, "param_groups": document["param_groups"]})
