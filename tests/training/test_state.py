"""States on disk: whole or absent, found again, pruned, and restored to the bit."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_runs import number_config

from mmx.config.schema import ParamGroupConfig, TrainingConfig
from mmx.errors import CheckpointError
from mmx.models.checkpoint import load_model
from mmx.models.model import Model
from mmx.testing import tiny_model
from mmx.training.optim import ExponentialMovingAverage, build_optimizer
from mmx.training.state import TrainingProgress, latest_state, load_state, save_state


class Run:
    """A model, its optimizer and its average, a few steps old."""

    def __init__(self, out: Path, steps: int = 2, keep: int = 2, parts: Any = None, model: Model | None = None) -> None:
        self.out, self.model = out, model or tiny_model(layers=1)
        self.config = number_config("nowhere.jsonl", out, keep=keep)
        training = TrainingConfig(learning_rate=0.01, param_groups=parts or {}, ema_decay=0.5)
        self.optimizer, self.average = build_optimizer(self.model, training), ExponentialMovingAverage(self.model, 0.5)
        self.progress = TrainingProgress()
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.progress.step += 1
        self.progress.samples_seen += 4
        self.average.update(self.model, self.progress.step)

    def save(self) -> Path:
        return save_state(self.out, self.config, self.model, self.optimizer, self.average, self.progress, {"step": 1})

    def load(self, folder: Path) -> None:
        self.progress = load_state(folder, self.model, self.optimizer, self.average)

    def tensors(self) -> dict[str, torch.Tensor]:
        moments = {
            f"{i}.{key}": value
            for i, entry in self.optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        return {**self.model.state_dict(), **moments, **{f"average.{n}": t for n, t in self.average.weights.items()}}


def names(run: Run) -> list[str]:
    return sorted(path.name for path in (run.out / "steps").iterdir())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_everything_comes_back_to_the_bit(tmp_path):
    run = Run(tmp_path, steps=3)
    run.progress.best, run.progress.best_step, run.progress.skipped = -1.25, 3, ["one"]
    folder = run.save()
    other = Run(tmp_path, steps=0, model=tiny_model(layers=1, seed=9))
    other.load(folder)
    assert same(other.tensors(), run.tensors())
    assert other.progress == run.progress
    torch.manual_seed(5)
    run.step()
    torch.manual_seed(5)
    other.step()
    assert same(other.tensors(), run.tensors())
    averaged = load_model(folder).state_dict()
    kept = load_file(folder / "model.safetensors")
    assert same(dict(averaged), kept)
    raw = load_file(folder / "training" / "model.safetensors")
    assert not torch.equal(raw["decoder.embedding.weight"], kept["decoder.embedding.weight"])


def test_momentum_finds_its_weight_where_convolutions_lie_channels_last():
    """A fused step pairs the two by their place in memory; loaded the plain way round, they would be mixed up."""

    def convolution() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)

    from mmx.training.state import _flatten, _unflatten

    def stepped(module: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        picture = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        module(picture).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, other = convolution(), convolution()
    first, second = (
        build_optimizer(one, TrainingConfig(learning_rate=0.1)),
        build_optimizer(other, TrainingConfig(learning_rate=0.1)),
    )
    for seed in range(3):
        stepped(one, first, seed)
    other.load_state_dict(one.state_dict())
    _unflatten(second, _flatten(first), Path("here"))
    for seed in range(3, 6):
        stepped(one, first, seed)
        stepped(other, second, seed)
    assert torch.equal(one.weight, other.weight)


def test_links_pruning_and_the_best(tmp_path):
    run = Run(tmp_path, steps=0, keep=2)
    for number in range(1, 6):
        run.step()
        if number == 2:
            run.progress.best, run.progress.best_step = 1.0, 2
        run.save()
    assert names(run) == ["000002", "000004", "000005"]
    assert os.readlink(tmp_path / "last") == "steps/000005"
    assert os.readlink(tmp_path / "best") == "steps/000002"
    assert latest_state(tmp_path) == tmp_path / "steps" / "000005"
    load_model(tmp_path / "best")


def test_keep_one_keeps_the_newest_and_the_best(tmp_path):
    run = Run(tmp_path, steps=0, keep=1)
    for _ in range(3):
        run.step()
        run.save()
    assert names(run) == ["000003"]


def test_a_best_link_lost_to_a_kill_is_set_by_the_next_save(tmp_path):
    run = Run(tmp_path, steps=1)
    run.progress.best, run.progress.best_step = 1.0, 1
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
    assert latest_state(tmp_path / "nowhere") is None


def test_what_killed_processes_left_behind_is_removed(tmp_path):
    run = Run(tmp_path, steps=1)
    for name in (".000009.77.tmp", ".000008.77.old"):
        (tmp_path / "steps" / name).mkdir(parents=True)
    run.save()
    assert names(run) == ["000001"]


def as_older_copies_wrote_it(folder: Path) -> None:
    """No names beside the optimizer's tensors, and fewer fields in the progress."""
    path = folder / "training" / "optimizer.safetensors"
    save_file(load_file(path), path)
    known = {"step", "best", "best_step", "seen", "bad", "seconds"}
    progress = json.loads((folder / "training" / "progress.json").read_text())
    progress = {key: value for key, value in progress.items() if key in known}
    (folder / "training" / "progress.json").write_text(json.dumps(progress))


def test_a_state_of_an_older_copy_loads(tmp_path):
    run = Run(tmp_path)
    folder = run.save()
    as_older_copies_wrote_it(folder)
    other = Run(tmp_path, steps=0)
    other.load(folder)
    assert same(other.tensors(), run.tensors())
    assert (other.progress.step, other.progress.samples_seen, other.progress.window) == (2, 8, [])


@pytest.mark.parametrize("older", [False, True])
def test_other_frozen_parts_are_refused(tmp_path, older):
    folder = Run(tmp_path).save()
    if older:
        as_older_copies_wrote_it(folder)
    other = Run(tmp_path, steps=0, parts={"decoder": ParamGroupConfig(freeze=True)})
    with pytest.raises(CheckpointError, match="other parts frozen"):
        other.load(folder)


def test_a_parameter_without_a_gradient_is_no_reason_to_refuse(tmp_path):
    run = Run(tmp_path, steps=0)
    for name, parameter in run.model.named_parameters():
        parameter.grad = None if name.startswith("sources") else torch.ones_like(parameter)
    run.optimizer.step()
    run.progress.step = 1
    folder = run.save()
    other = Run(tmp_path, steps=0)
    other.load(folder)
    assert same(other.tensors(), run.tensors())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "junk"])
def test_a_damaged_state_is_one_sentence(tmp_path, name, damage):
    run = Run(tmp_path)
    path = run.save() / "training" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\x07junk" * 9)
    with pytest.raises(CheckpointError) as caught:
        Run(tmp_path, steps=0).load(tmp_path / "steps" / "000002")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_previous_state_alone(tmp_path):
    run = Run(tmp_path, steps=1)
    before = {path: path.read_bytes() for path in run.save().rglob("*") if path.is_file()}
    run.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file may grow further: writing really fails
        with pytest.raises(CheckpointError, match="could not be written") as caught:
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert names(run) == ["000001"]
    assert {path: path.read_bytes() for path in before} == before
    assert latest_state(tmp_path) == tmp_path / "steps" / "000001"
    run.save()
    assert names(run) == ["000001", "000002"]


def test_ten_kills_while_saving_leave_a_state_that_loads(tmp_path):
    """Kill -9 at random moments of a process that does nothing but save."""
    context, rng, steps = multiprocessing.get_context("fork"), random.Random(0), []
    Run(tmp_path, steps=1).save()
    for number in range(10):
        child = context.Process(target=save_for_ever, args=(tmp_path, 1000 * (number + 1)))
        child.start()
        seen = latest_state(tmp_path)
        deadline = time.monotonic() + 60
        while latest_state(tmp_path) == seen and time.monotonic() < deadline:  # until it saves at full speed
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found = latest_state(tmp_path)
        other = Run(tmp_path, steps=0)
        other.load(found)
        load_model(found)
        assert other.progress.step == int(found.name)
        load_model(tmp_path / "last")
        steps.append(other.progress.step)
    assert steps == sorted(set(steps))
    assert [step // 1000 for step in steps] == list(range(1, 11))


def save_for_ever(out: Path, first: int) -> None:
    torch.set_num_threads(1)
    run = Run(out, steps=0)
    run.step()
    run.progress.step = first
    while True:
        run.progress.step += 1
        run.save()
