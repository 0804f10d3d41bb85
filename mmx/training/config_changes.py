"""What a resumed run may change: the saved configuration is compared with the given one.

Most changes would make another run, whose record and metrics would be mixed with the old one's; they are refused. These
are accepted:
- how long the run is, how often it reports, validates and saves, how many states and data workers it has, and how many
  unreadable examples it accepts. The learning rate follows the schedule of the new `training.max_steps`;
- the batch size and the gradient accumulation, if the examples of a step over all processes stay the same;
- the same file or folder under another path, and a run folder that was moved;
- validation sets, decoding options and the metric for the best model, if no value that they change is compared with an
  older one: until the first validation, and where the metric does not depend on them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TypeGuard

from mmx.config.loader import load_config
from mmx.config.schema import RunConfig
from mmx.errors import ConfigError, TrainingError
from mmx.training.state import TrainingProgress
from mmx.training.validation import is_loss

CONFIG_FILE = "config.yaml"
_FREE_KEYS = {
    "output_dir",
    "training.num_workers",
    "training.logging_steps",
    "training.eval_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.max_skip_fraction",
}
_BATCH_KEYS = {"training.per_device_batch_size", "training.gradient_accumulation_steps"}
_PATH_KEYS = {"path", "annotations", "init"}
_MAX_LISTED = 8


class ConfigChange(NamedTuple):
    """A value that differs between two configurations."""

    key: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.old)} -> {_short(self.new)}"


@dataclass(frozen=True)
class ResumedRun:
    """The old and the new configuration of a run, and how far it has come."""

    old: RunConfig
    new: RunConfig
    progress: TrainingProgress
    num_processes: int

    def may_change(self, key: str) -> bool:
        """Return whether the run may be resumed with the new value of a key."""
        if key in _FREE_KEYS:
            return True
        if key == "training.max_steps":
            return self.new.training.max_steps >= self.progress.step
        if key in _BATCH_KEYS:
            return self._has_equal_steps()
        name = key.partition(".")[0]
        if name == "generation" and any(data.reward for data in self.new.train):
            return False  # captions are sampled with these options
        if name in ("validation", "generation") or key == "training.metric_for_best_model":
            return self.progress.best is None or not self._changes_best_metric(key)
        return False

    def _has_equal_steps(self) -> bool:
        """Whether a step has as many examples as before, over all processes."""
        old = self.old.training
        new = self.new.training
        old_size = old.per_device_batch_size * old.gradient_accumulation_steps
        new_size = new.per_device_batch_size * new.gradient_accumulation_steps
        return old_size * (self.progress.num_processes or self.num_processes) == new_size * self.num_processes

    def _changes_best_metric(self, key: str) -> bool:
        metric = self.old.training.metric_for_best_model
        if key.startswith("validation."):
            name = metric.partition(".")[0]
            return metric == "loss" or f"{key}.".startswith(f"validation.{name}.")
        if key.startswith("generation."):
            return not is_loss(metric)
        return True


def check_config_changes(
    folder: Path, config: RunConfig, progress: TrainingProgress, num_processes: int
) -> list[ConfigChange]:
    """Return the changes since the configuration that a run folder holds.

    Raises:
        TrainingError: a change makes another run, or the configuration of the run is unknown.
    """
    path = folder / CONFIG_FILE
    try:
        old = load_config(path, RunConfig)
    except ConfigError as error:
        raise TrainingError(
            f"{path} is missing or damaged, so the configuration of the run is unknown; copy it again, or set "
            "output_dir to another folder and leave --resume out.",
            code="training.run_config",
            path=str(path),
        ) from error
    run = ResumedRun(old, config, progress, num_processes)
    changes = list(_differences(old.model_dump(mode="json"), config.model_dump(mode="json"), ""))
    refused = [change for change in changes if not run.may_change(change.key)]
    if refused:
        raise TrainingError(
            f"the run in {folder} has another configuration ({list_changes(refused)}); give --resume the configuration "
            "of that run, or set output_dir to another folder and leave --resume out to start anew.",
            code="training.other_config",
            path=str(folder),
            changes={change.key: (change.old, change.new) for change in refused},
        )
    return changes


def list_changes(changes: Sequence[ConfigChange]) -> str:
    """Return changes as text, `key: old -> new, ...`."""
    listed = [str(change) for change in changes[:_MAX_LISTED]]
    if len(changes) > _MAX_LISTED:
        listed.append(f"and {len(changes) - _MAX_LISTED} more")
    return ", ".join(listed)


def _differences(old: object, new: object, key: str) -> Iterator[ConfigChange]:
    """Yield the values that differ, by dotted key; of a list of mappings, by position."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif _is_list_of_mappings(old) and _is_list_of_mappings(new):
        for index, (was, now) in enumerate(zip_longest(old, new)):
            yield from _differences(was, now, f"{key}.{index}")
    elif old != new and not _is_same_path(key, old, new):
        yield ConfigChange(key, old, new)


def _is_list_of_mappings(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_same_path(key: str, old: object, new: object) -> bool:
    is_path = key.rpartition(".")[2] in _PATH_KEYS and isinstance(old, str) and isinstance(new, str)
    return is_path and os.path.realpath(str(old)) == os.path.realpath(str(new))


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
