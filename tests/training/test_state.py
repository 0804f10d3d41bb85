"""States on disk: complete or absent, found again, removed when old, and restored bit-exactly."""

import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_runs import number_config

from mmx.config.schema import ParamGroupConfig, TrainingConfig
from mmx.errors import CheckpointError
from mmx.models.checkpoint import load_model
from mmx.models.model import Model
from mmx.testing import tiny_model
from mmx.training.ema import ExponentialMovingAverage
from mmx.training.param_groups import build_optimizer
from mmx.training.state import (
    TrainingState,
    _flatten_optimizer,
    _restore_optimizer,
    latest_state,
    load_state,
    save_state,
)


class SmallRun:
    """A tiny model, its optimizer and its average, after a few steps with random gradients."""

    def __init__(
        self,
        folder: Path,
        steps: int = 2,
        save_total_limit: int = 2,
        param_groups: Mapping[str, ParamGroupConfig] | None = None,
        model: Model | None = None,
    ) -> None:
        self.folder = folder
        self.config = number_config("missing.jsonl", folder, save_total_limit=save_total_limit)
        options = TrainingConfig(learning_rate=0.01, param_groups=dict(param_groups or {}), ema_decay=0.5)
        model = model or tiny_model(num_layers=1)
        optimizer = build_optimizer(model, options)
        self.state = TrainingState(model, optimizer, ExponentialMovingAverage(model, 0.5))
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        state = self.state
        for parameter in state.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()
        state.progress.step += 1
        state.progress.samples_seen += 4
        state.average.update(state.model, state.progress.step)

    def save(self) -> Path:
        return save_state(self.folder, self.config, self.state, {"step": 1})

    def load(self, folder: Path) -> None:
        load_state(folder, self.state)

    def tensors(self) -> dict[str, Tensor]:
        tensors = dict(self.state.model.state_dict())
        for index, entry in self.state.optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                tensors[f"{index}.{key}"] = value
        for name, tensor in self.state.average.weights.items():
            tensors[f"average.{name}"] = tensor
        return tensors

    def step_names(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "steps").iterdir())


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- saving and loading ------------------------------------------------------------------------------------------


def test_state_is_restored_bit_exactly(tmp_path):
    run = SmallRun(tmp_path, steps=3)
    progress = run.state.progress
    progress.best = -1.25
    progress.best_step = 3
    progress.skipped = ["one"]
    progress.recent_losses = [0.5]
    folder = run.save()
    other = SmallRun(tmp_path, steps=0, model=tiny_model(num_layers=1, seed=9))
    other.load(folder)
    assert same_tensors(other.tensors(), run.tensors())
    assert other.state.progress == progress
    torch.manual_seed(5)
    run.step()
    torch.manual_seed(5)
    other.step()
    assert same_tensors(other.tensors(), run.tensors())
    stored = load_file(folder / "model.safetensors")
    assert same_tensors(dict(load_model(folder).state_dict()), stored)
    raw = load_file(folder / "training" / "model.safetensors")
    assert not torch.equal(raw["decoder.embedding.weight"], stored["decoder.embedding.weight"])


def channels_last_convolution() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)


def train_on_image(module: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    image = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    module(image).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_momentum_of_channels_last_weights_is_restored():
    """Fused kernels pair weight and momentum by their position in memory, so both need the same memory format."""
    one = channels_last_convolution()
    other = channels_last_convolution()
    first = build_optimizer(one, TrainingConfig(learning_rate=0.1))
    second = build_optimizer(other, TrainingConfig(learning_rate=0.1))
    for seed in range(3):
        train_on_image(one, first, seed)
    other.load_state_dict(one.state_dict())
    _restore_optimizer(second, _flatten_optimizer(first), Path("here"))
    for seed in range(3, 6):
        train_on_image(one, first, seed)
        train_on_image(other, second, seed)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("without_names", [False, True])
def test_state_with_other_frozen_groups_is_refused(tmp_path, without_names):
    folder = SmallRun(tmp_path).save()
    if without_names:
        path = folder / "training" / "optimizer.safetensors"
        save_file(load_file(path), path)
    groups = {} if without_names else {"decoder": ParamGroupConfig(freeze=True)}
    with pytest.raises(CheckpointError) as error:
        SmallRun(tmp_path, steps=0, param_groups=groups).load(folder)
    assert error.value.code == "training.other_groups_frozen"


def test_parameters_without_a_gradient_are_restored(tmp_path):
    run = SmallRun(tmp_path, steps=0)
    for name, parameter in run.state.model.named_parameters():
        parameter.grad = None if name.startswith("sources") else torch.ones_like(parameter)
    run.state.optimizer.step()
    run.state.progress.step = 1
    folder = run.save()
    other = SmallRun(tmp_path, steps=0)
    other.load(folder)
    assert same_tensors(other.tensors(), run.tensors())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "overwritten"])
def test_damaged_state_is_one_line(tmp_path, name, damage):
    path = SmallRun(tmp_path).save() / "training" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    if damage == "overwritten":
        path.write_bytes(b"\x07junk" * 9)
    with pytest.raises(CheckpointError) as error:
        SmallRun(tmp_path, steps=0).load(tmp_path / "steps" / "000002")
    assert name in str(error.value)
    assert "\n" not in str(error.value)


# ---- folders and links -------------------------------------------------------------------------------------------


def test_links_and_removal_of_old_states(tmp_path):
    run = SmallRun(tmp_path, steps=0, save_total_limit=2)
    for number in range(1, 6):
        run.step()
        if number == 2:
            run.state.progress.best = 1.0
            run.state.progress.best_step = 2
        run.save()
    assert run.step_names() == ["000002", "000004", "000005"]
    assert os.readlink(tmp_path / "last") == "steps/000005"
    assert os.readlink(tmp_path / "best") == "steps/000002"
    assert latest_state(tmp_path) == tmp_path / "steps" / "000005"
    load_model(tmp_path / "best")


def test_save_total_limit_of_one_keeps_the_newest(tmp_path):
    run = SmallRun(tmp_path, steps=0, save_total_limit=1)
    for _ in range(3):
        run.step()
        run.save()
    assert run.step_names() == ["000003"]


def test_best_link_that_a_kill_prevented_is_set_by_the_next_save(tmp_path):
    run = SmallRun(tmp_path, steps=1)
    run.state.progress.best = 1.0
    run.state.progress.best_step = 1
    run.save()
    (tmp_path / "best").unlink()
    run.step()
    run.save()
    assert os.readlink(tmp_path / "best") == "steps/000001"


def test_steps_are_compared_as_numbers(tmp_path):
    for name in ("999999", "1000000", "000007"):
        (tmp_path / "steps" / name / "training").mkdir(parents=True)
        (tmp_path / "steps" / name / "training" / "progress.json").write_text("{}")
    (tmp_path / "steps" / "2000000" / "training").mkdir(parents=True)  # not complete
    assert latest_state(tmp_path) == tmp_path / "steps" / "1000000"
    assert latest_state(tmp_path / "missing") is None


def test_state_whose_replacement_was_killed_is_found(tmp_path):
    """A kill between two renames leaves only the backup of the state that was being replaced."""
    run = SmallRun(tmp_path, steps=1)
    folder = run.save()
    folder.rename(folder.with_name(".000001.old"))
    found = latest_state(tmp_path)
    assert found is not None
    other = SmallRun(tmp_path, steps=0)
    other.load(found)
    assert same_tensors(other.tensors(), run.tensors())
    other.save()
    assert other.step_names() == ["000001"]


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    run = SmallRun(tmp_path, steps=1)
    for name in (".000009.77.tmp", ".000008.old"):
        (tmp_path / "steps" / name).mkdir(parents=True)
    run.save()
    assert run.step_names() == ["000001"]


def test_full_disk_keeps_the_previous_state(tmp_path):
    run = SmallRun(tmp_path, steps=1)
    before = {path: path.read_bytes() for path in run.save().rglob("*") if path.is_file()}
    run.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # writing larger files fails
        with pytest.raises(CheckpointError) as error:
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.code == "checkpoint.write"
    assert "\n" not in str(error.value)
    assert run.step_names() == ["000001"]
    assert {path: path.read_bytes() for path in before} == before
    assert latest_state(tmp_path) == tmp_path / "steps" / "000001"
    run.save()
    assert run.step_names() == ["000001", "000002"]


def test_ten_kills_while_saving_leave_a_state_that_loads(tmp_path):
    """SIGKILL at random moments of a process that only saves."""
    context = multiprocessing.get_context("fork")
    rng = random.Random(0)
    steps = []
    SmallRun(tmp_path, steps=1).save()
    for number in range(10):
        child = context.Process(target=save_forever, args=(tmp_path, 1000 * (number + 1)))
        child.start()
        before = latest_state(tmp_path)
        deadline = time.monotonic() + 60
        while latest_state(tmp_path) == before and time.monotonic() < deadline:  # wait for its first state
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found = latest_state(tmp_path)
        other = SmallRun(tmp_path, steps=0)
        other.load(found)
        load_model(found)
        assert other.state.progress.step == int(found.name)
        load_model(tmp_path / "last")
        steps.append(other.state.progress.step)
    assert steps == sorted(set(steps))
    assert [step // 1000 for step in steps] == list(range(1, 11))


def save_forever(folder: Path, first_step: int) -> None:
    torch.set_num_threads(1)
    run = SmallRun(folder, steps=0)
    run.step()
    run.state.progress.step = first_step
    while True:
        run.state.progress.step += 1
        run.save()
