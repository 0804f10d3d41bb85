"""The time left: what is measured, when it is printed, and the remedy that fits where the time goes."""

from typing import Any

import pytest
from toy_runs import number_config, write_numbers

from mmx.config.schema import ParamGroupConfig, RunConfig
from mmx.training import time_left
from mmx.training.loop import train
from mmx.training.time_left import (
    NUM_STEPS,
    StepTime,
    StepTimer,
    format_duration,
    nearest_remedy,
    time_left_line,
)

MODEL = {"sources": {"image": {"encoder": "image"}}, "decoder": {}}


def make_config(init: str | None = "bundled", data: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    document: dict[str, Any] = {"init": init} if init else {"model": MODEL}
    document["train"] = [{"path": "list.jsonl", **(data or {})}]
    document["training"] = {"mixed_precision": "no", **training}
    return RunConfig.model_validate(document)


def remedy(config: RunConfig, data: float = 0.0, compute: float = 1.0, device: str = "cpu") -> str:
    return nearest_remedy(config, StepTime(data, compute), device)


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(time_left.os, "cpu_count", lambda: 8)


def test_the_median_without_the_first_step_is_measured():
    now = [0.0]
    waits = [9.0, 1.0, 2.0, 3.0, 50.0, 0.0]
    computes = [90.0, 4.0, 5.0, 6.0, 5.0, 0.0]

    def data():
        for wait in waits:
            now[0] += wait
            yield wait

    timer = StepTimer(clock=lambda: now[0])
    results = []
    for _, compute in zip(timer.measure_data(data()), computes, strict=False):
        now[0] += compute
        results.append(timer.end_step())
    assert results == [None, None, None, None, StepTime(2.5, 5.0), None]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "1 h 0 min"), (3660, "1 h 1 min"), (90061, "25 h 1 min")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_the_time_left_is_that_of_the_remaining_steps():
    config = make_config(max_steps=105)
    assert "about 2 min left" in time_left_line(config, 5, StepTime(0.2, 1.0), "cpu")


def test_a_remedy_is_named_only_where_more_than_an_hour_is_left():
    short = time_left_line(make_config(max_steps=3605), 5, StepTime(0.0, 1.0), "cpu")
    long = time_left_line(make_config(max_steps=3606), 5, StepTime(0.0, 1.0), "cpu")
    assert "max_steps" not in short
    assert "training.max_steps" in long


@pytest.mark.parametrize(
    ("config", "cores", "expected"),
    [
        (make_config(), 8, "training.num_workers=4"),
        (make_config(), 3, "training.num_workers=2"),
        (make_config(), 2, "image_cache_size"),
        (make_config(num_workers=2), 8, "image_cache_size"),
        (make_config(num_workers=2, data={"image_cache_size": 64}), 8, "training.num_workers=3"),
        (make_config(data={"path": "scenes", "num_examples": 4}), 2, "training.num_workers=1"),
    ],
)
def test_where_data_is_slow_the_remedy_is_faster_data(monkeypatch, config, cores, expected):
    monkeypatch.setattr(time_left.os, "cpu_count", lambda: cores)
    assert expected in remedy(config, data=0.5)
    assert expected not in remedy(config, data=0.1)


FROZEN = {"sources.image.encoder": ParamGroupConfig(freeze=True)}


@pytest.mark.parametrize(
    ("config", "device", "is_native", "expected"),
    [
        (make_config(), "cuda", True, "mixed_precision=bf16"),
        (make_config(), "cpu", True, "mixed_precision=bf16"),
        (make_config(mixed_precision="bf16"), "cpu", False, "mixed_precision=no"),
        (make_config(mixed_precision="bf16"), "cuda", True, "max_steps"),
        (make_config(init=None), "cpu", False, "init: bundled"),
        (make_config(), "cpu", False, "freeze: true"),
        (make_config(param_groups=FROZEN), "cpu", False, "a GPU"),
    ],
)
def test_where_arithmetic_is_slow_the_remedy_is_less_of_it(monkeypatch, config, device, is_native, expected):
    monkeypatch.setattr(time_left, "has_bf16_units", lambda given: is_native)
    assert expected in remedy(config, device=device)


def time_left_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if " left at " in line]


def test_training_prints_one_line_after_five_steps(capsys, tmp_path):
    data = write_numbers(tmp_path)
    train(number_config(data, tmp_path / "run", max_steps=NUM_STEPS + 2))
    (line,) = time_left_lines(capsys.readouterr().err)
    assert line.startswith("step 5: ")
    train(number_config(data, tmp_path / "short", max_steps=NUM_STEPS))
    train(number_config(data, tmp_path / "quiet", max_steps=NUM_STEPS + 2), quiet=True)
    assert time_left_lines(capsys.readouterr().err) == []
