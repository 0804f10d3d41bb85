"""Where a run stands: saved whole or not at all, and found again.

    runs/NAME/config.yaml            the resolved configuration of the run
    runs/NAME/metrics.jsonl          a line for each report
    runs/NAME/steps/000500/          a checkpoint folder (mmx.models.checkpoint), and in it training/: optimizer, raw weights
    runs/NAME/last -> steps/000500   the newest complete one
    runs/NAME/best -> steps/000300   the best by `training.monitor`

All tensors are safetensors, all else JSON. A resumed run continues to the bit, because data and dropout are functions
of the seed and the step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmx.config.schema import RunConfig
from mmx.errors import CheckpointError
from mmx.io.atomic import atomic_symlink
from mmx.models.checkpoint import (
    WEIGHTS,
    check_format,
    load_strict,
    read_tensors,
    unique_tensors,
    write_folder,
    write_model,
)
from mmx.models.model import Model
from mmx.training.adapters import averaged_adapters, merged_weights
from mmx.training.optim import ExponentialMovingAverage

ADAPTERS = "adapters.safetensors"  # their average, which a checkpoint has added up with what they stand on


@dataclass
class TrainingProgress:
    """Steps done, the best value of the monitored metric and its step, samples taken and passed over, seconds spent.

    window: the losses since the last report; rewards: since then, of rank 0, the mean of each step;
    owed: whether this step's validation is still to be done; scaler: what the gradient scaler of fp16 has found out.
    A file of an older copy may lack fields.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    samples_seen: int = 0
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0
    window: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    validation_pending: bool = False
    scaler: dict[str, float] = field(default_factory=dict)


def save_state(
    run: Path,
    config: RunConfig,
    model: Model,
    optimizer: torch.optim.Optimizer,
    average: ExponentialMovingAverage,
    progress: TrainingProgress,
    provenance: Mapping[str, Any],
) -> Path:
    """Write steps/NNNNNN, point `last` at it and `best` at the best step. Old steps are removed only once the new one
    is complete. Raises CheckpointError when it cannot be written; what stood there is untouched."""

    def write(place: Path) -> None:
        with merged_weights(model, average) as weights:
            write_model(place, model, provenance, config.generation, weights=weights)
        inner = place / "training"
        inner.mkdir()
        if adapters := averaged_adapters(average):
            save_file({name: tensor.contiguous() for name, tensor in adapters.items()}, inner / ADAPTERS)
        raw = {name: tensor.detach().contiguous() for name, tensor in unique_tensors(model.state_dict()).items()}
        save_file(raw, inner / WEIGHTS)
        names = {"parameters": json.dumps(_trained_names(model, optimizer))}
        save_file(_flatten(optimizer), inner / "optimizer.safetensors", names)
        (inner / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")

    steps = run / "steps"
    folder = write_folder(steps / f"{progress.step:06d}", write)
    best = None if progress.best_step is None else steps / f"{progress.best_step:06d}"
    try:
        atomic_symlink(run / "last", folder)
        if best is not None and best.is_dir():  # again each time: a kill may have come between its folder and its link
            atomic_symlink(run / "best", best)
    except OSError as error:
        raise CheckpointError(f"{run} takes no links ({error.strerror}); the state itself is in {folder}.") from error
    _prune(run, config.training.save_total_limit)
    return folder


def load_state(
    folder: Path, model: Model, optimizer: torch.optim.Optimizer, average: ExponentialMovingAverage
) -> TrainingProgress:
    """Restore everything from a step's folder and return its progress. Raises CheckpointError."""
    check_format(folder)
    inner = folder / "training"
    load_strict(model, read_tensors(inner / WEIGHTS), str(inner / WEIGHTS))
    _check_names(inner / "optimizer.safetensors", _trained_names(model, optimizer))
    _unflatten(optimizer, read_tensors(inner / "optimizer.safetensors"), folder)
    averaged = read_tensors(folder / WEIGHTS)
    if (inner / ADAPTERS).exists():
        averaged |= read_tensors(inner / ADAPTERS)
    for name, tensor in average.weights.items():
        tensor.copy_(averaged[name])
    try:
        return TrainingProgress(**json.loads((inner / "progress.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{inner / 'progress.json'} is damaged or of a newer mmx; copy it again.") from error


def latest_state(run: Path) -> Path | None:
    """The newest complete step of a run, or None."""
    steps = [path for path in _steps(run) if (path / "training" / "progress.json").is_file()]
    return steps[-1] if steps else None


def _steps(run: Path) -> list[Path]:
    return sorted((path for path in (run / "steps").glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


def _prune(run: Path, keep: int) -> None:
    pointed = {(run / name).resolve() for name in ("last", "best")}
    unfinished = [*(run / "steps").glob(".*.tmp"), *(run / "steps").glob(".*.old")]  # of processes that were killed
    for old in [*_steps(run)[:-keep], *unfinished]:
        if old.resolve() not in pointed:
            shutil.rmtree(old, ignore_errors=True)


def _trained_names(model: Model, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _check_names(path: Path, names: list[str]) -> None:
    """Momentum must meet the parameter it belongs to. A file of an older copy names none, and is believed."""
    try:
        with safe_open(path, "pt") as file:
            kept = (file.metadata() or {}).get("parameters")
    except (SafetensorError, OSError):
        return  # the reader of the tensors says what is wrong
    if kept is not None and json.loads(kept) != names:
        raise _other_parts(path)


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors by "parameter.key"; rates are functions of the step, so there is nothing else to keep."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().clone().contiguous()
        for index, entry in state.items()
        for key, value in entry.items()
    }


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Give the optimizer its state; a parameter that never had a gradient has none."""
    document = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        place = int(index)
        if place >= len(parameters) or tensor.ndim and tensor.shape != parameters[place].shape:
            raise _other_parts(folder)
        # Fused kernels pair momentum and weight by place in memory, and the weights of convolutions lie channels last.
        state.setdefault(place, {})[key] = torch.empty_like(parameters[place]).copy_(tensor) if tensor.ndim else tensor
    optimizer.load_state_dict({"state": state, "param_groups": document["param_groups"]})


def _other_parts(place: Path) -> CheckpointError:
    return CheckpointError(f"{place} was trained with other parts frozen; resume with the configuration it had.")
