"""The state of a run on disk: written completely or not at all, and found again by a resumed run.

    runs/NAME/config.yaml            the resolved configuration of the run
    runs/NAME/metrics.jsonl          one line for each report
    runs/NAME/steps/000500/          a checkpoint (mmx.models.checkpoint), with training/: optimizer and raw weights
    runs/NAME/last -> steps/000500   the newest complete state
    runs/NAME/best -> steps/000300   the best state by `training.metric_for_best_model`

All tensors are safetensors, everything else is JSON. A resumed run is bit-exact, because data and dropout are functions
of the seed and the step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmx.config.schema import RunConfig
from mmx.errors import CheckpointError
from mmx.io.atomic import atomic_symlink, folder_or_backup
from mmx.models.checkpoint import WEIGHTS, load_strict, read_tensors, unique_tensors, write_folder, write_model
from mmx.models.model import Model
from mmx.training.ema import ExponentialMovingAverage
from mmx.training.lora import averaged_adapters, merged_weights

TRAINING = "training"
OPTIMIZER = "optimizer.safetensors"
ADAPTERS = "adapters.safetensors"  # averaged adapters, which the checkpoint has merged
PROGRESS = "progress.json"


@dataclass
class TrainingProgress:
    """How far a run has come.

    Args:
        step: optimizer steps done.
        best, best_step: best value of the metric for the best model, and its step.
        samples_seen: position in the training stream.
        skipped: messages about training examples that could not be read.
        validation_skipped: the same of the validation sets.
        texts_seen: texts drawn by rank 0.
        cut_texts: those of them that were cut, because they exceed `max_target_length` or the decoder's positions.
        first_cut: origin of the first of them.
        seconds: training time.
        recent_losses: losses since the last report.
        recent_rewards: mean rewards of rank 0 since the last report.
        validation_pending: whether the validation of this step is still to be done.
        scaler: state of the gradient scaler of fp16.
        num_processes: processes of the run; None in states of older versions.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    samples_seen: int = 0
    skipped: list[str] = field(default_factory=list)
    validation_skipped: list[str] = field(default_factory=list)
    texts_seen: int = 0
    cut_texts: int = 0
    first_cut: str = ""
    seconds: float = 0.0
    recent_losses: list[float] = field(default_factory=list)
    recent_rewards: list[float] = field(default_factory=list)
    validation_pending: bool = False
    scaler: dict[str, float] = field(default_factory=dict)
    num_processes: int | None = None

    def take_metrics(self) -> dict[str, float]:
        """Return the mean loss and reward since the last report, and the fraction of texts that were cut, if any."""
        metrics = {"loss": sum(self.recent_losses) / len(self.recent_losses)}
        if self.recent_rewards:
            metrics["reward"] = sum(self.recent_rewards) / len(self.recent_rewards)
        if self.cut_texts:
            metrics["cut targets"] = self.cut_texts / self.texts_seen
        self.recent_losses = []
        self.recent_rewards = []
        return metrics

    def counts(self) -> dict[str, int]:
        """Return the numbers of examples that could not be read and of texts that were cut, for the model card."""
        return {
            "skipped examples": len(self.skipped),
            "skipped validation examples": len(self.validation_skipped),
            "cut targets": self.cut_texts,
        }


@dataclass
class TrainingState:
    """Everything that training changes."""

    model: Model
    optimizer: torch.optim.Optimizer
    average: ExponentialMovingAverage
    progress: TrainingProgress = field(default_factory=TrainingProgress)


def save_state(run: Path, config: RunConfig, state: TrainingState, provenance: Mapping[str, object]) -> Path:
    """Write steps/NNNNNN and point `last` to it, and `best` to the best step. Older steps are removed afterwards.

    Raises:
        CheckpointError: the state cannot be written; older states are unchanged.
    """

    def write(folder: Path) -> None:
        with merged_weights(state.model, state.average) as weights:
            write_model(folder, state.model, provenance, config.generation, weights=weights)
        _write_training_files(folder / TRAINING, state)

    steps = run / "steps"
    folder = write_folder(steps / f"{state.progress.step:06d}", write)
    best_step = state.progress.best_step
    best = None if best_step is None else steps / f"{best_step:06d}"
    try:
        atomic_symlink(run / "last", folder)
        if best is not None and best.is_dir():  # every time: the process may have been killed before the last link
            atomic_symlink(run / "best", best)
    except OSError as error:
        raise CheckpointError(
            f"{run} does not support symbolic links ({error.strerror}); the state itself is in {folder}.",
            code="training.no_symlinks",
            path=str(run),
        ) from error
    _remove_old_steps(run, config.training.save_total_limit)
    return folder


def load_state(folder: Path, state: TrainingState) -> None:
    """Restore a state from the folder of a step. Raises CheckpointError."""
    training = folder / TRAINING
    load_strict(state.model, read_tensors(training / WEIGHTS), str(training / WEIGHTS))
    _check_parameter_names(training / OPTIMIZER, _trained_names(state))
    _restore_optimizer(state.optimizer, read_tensors(training / OPTIMIZER), folder)
    averaged = read_tensors(folder / WEIGHTS)
    if (training / ADAPTERS).exists():
        averaged |= read_tensors(training / ADAPTERS)
    for name, tensor in state.average.weights.items():
        tensor.copy_(averaged[name])
    state.progress = load_progress(folder)


def load_progress(folder: Path) -> TrainingProgress:
    """Read how far a run had come from the folder of a step. Raises CheckpointError."""
    path = folder / TRAINING / PROGRESS
    try:
        return TrainingProgress(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged or was written by another version of mmx; copy it again or start a new run.",
            code="training.progress_file",
            path=str(path),
        ) from error


def latest_state(run: Path) -> Path | None:
    """Return the folder of the newest complete step of a run, or None."""
    complete = [folder for folder in _step_folders(run) if (folder / TRAINING / PROGRESS).is_file()]
    return complete[-1] if complete else None


def _write_training_files(folder: Path, state: TrainingState) -> None:
    folder.mkdir()
    adapters = averaged_adapters(state.average)
    if adapters:
        save_file({name: tensor.contiguous() for name, tensor in adapters.items()}, folder / ADAPTERS)
    tensors = unique_tensors(state.model.state_dict())
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    metadata = {"parameters": json.dumps(_trained_names(state))}
    save_file(_flatten_optimizer(state.optimizer), folder / OPTIMIZER, metadata)
    (folder / PROGRESS).write_text(json.dumps(asdict(state.progress)), encoding="utf-8")


def _step_folders(run: Path) -> list[Path]:
    """Return the folders of all steps by number. A step that was being replaced when a process ended is its backup."""
    steps = run / "steps"
    names = {path.name.removeprefix(".").removesuffix(".old") for path in steps.glob("*")}
    numbers = sorted((name for name in names if name.isdigit()), key=int)
    return [folder_or_backup(steps / number) for number in numbers]


def _remove_old_steps(run: Path, keep: int) -> None:
    linked = {(run / name).resolve() for name in ("last", "best")}
    unfinished = [*(run / "steps").glob(".*.tmp"), *(run / "steps").glob(".*.old")]  # of processes that were killed
    for folder in [*_step_folders(run)[:-keep], *unfinished]:
        if folder.resolve() not in linked:
            shutil.rmtree(folder, ignore_errors=True)


def _trained_names(state: TrainingState) -> list[str]:
    """Return the names of the optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    return [names[id(parameter)] for parameter in _parameters(state.optimizer)]


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_parameter_names(path: Path, names: list[str]) -> None:
    """Refuse an optimizer state of other parameters, or in another order."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return  # reading the tensors raises the error
    if json.loads(metadata.get("parameters", "[]")) != names:
        raise _other_groups_frozen(path)


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors by "parameter.key". Learning rates are functions of the step and not saved."""
    tensors = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            tensors[f"{index}.{key}"] = torch.as_tensor(value).detach().clone().contiguous()
    return tensors


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Restore the optimizer's state. A parameter that never had a gradient has none."""
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        index = int(number)
        if index >= len(parameters) or (tensor.ndim and tensor.shape != parameters[index].shape):
            raise _other_groups_frozen(folder)
        if tensor.ndim:
            # Fused kernels need the memory format of the parameter, which is channels_last for convolutions.
            tensor = torch.empty_like(parameters[index]).copy_(tensor)
        state.setdefault(index, {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _other_groups_frozen(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} was trained with other groups frozen; resume with the training.param_groups it had.",
        code="training.other_groups_frozen",
        path=str(path),
    )
