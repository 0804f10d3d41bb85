"""The precision of a run: `auto`, what a resumed run keeps, and the warning where bf16 is emulated."""

from pathlib import Path

import pytest
import torch
from toy_runs import number_config, write_numbers

from mmx.config.loader import load_config
from mmx.config.schema import RunConfig, TrainingConfig
from mmx.models.checkpoint import load_provenance
from mmx.training import precision
from mmx.training.loop import train
from mmx.training.precision import has_bf16_units, resolve_precision, warn_if_emulated


@pytest.fixture
def fresh_process(monkeypatch):
    """A process that has not trained, so that accelerate has no precision yet."""
    monkeypatch.setattr(precision, "is_initialized", lambda: False)


def set_device(monkeypatch: pytest.MonkeyPatch, device: str, is_native: bool) -> None:
    """Let training run on a device with or without bfloat16 units."""
    monkeypatch.setattr(precision, "device_type", lambda: device)
    monkeypatch.setattr(precision, "has_bf16_units", lambda given: is_native and given == device)


def run_config(value: str, folder: Path) -> RunConfig:
    return number_config("data.jsonl", folder, mixed_precision=value)


def test_auto_is_the_default():
    assert TrainingConfig().mixed_precision == "auto"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize(("is_native", "expected"), [(True, "bf16"), (False, "no")])
def test_auto_is_bf16_only_where_it_is_native(monkeypatch, fresh_process, tmp_path, device, is_native, expected):
    set_device(monkeypatch, device, is_native)
    assert resolve_precision(run_config("auto", tmp_path), resume=False).training.mixed_precision == expected


@pytest.mark.parametrize("value", ["no", "bf16", "fp16"])
def test_a_given_precision_is_kept(monkeypatch, fresh_process, tmp_path, value):
    set_device(monkeypatch, "cpu", is_native=value == "no")
    config = run_config(value, tmp_path)
    assert resolve_precision(config, resume=False) == config


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "expected"),
    [(False, False, False), (True, False, True), (False, True, True), (True, True, True)],
)
def test_processors_with_bf16_units(monkeypatch, avx512_bf16, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_bf16_units("cpu") is expected


@pytest.mark.parametrize("is_native", [True, False])
def test_gpus_with_bf16_units(monkeypatch, is_native):
    """Emulation does not count: torch emulates bfloat16 on GPUs before compute capability 8.0."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: is_native or including_emulation
    )
    assert has_bf16_units("cuda") is is_native
    assert not has_bf16_units("mps")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_line_where_bf16_is_emulated(monkeypatch, capsys, device):
    set_device(monkeypatch, device, is_native=False)
    warn_if_emulated("bf16")
    (line,) = capsys.readouterr().err.splitlines()
    assert "training.mixed_precision=auto" in line


@pytest.mark.parametrize(
    ("device", "is_native", "value"),
    [
        ("cpu", True, "bf16"),
        ("cuda", True, "bf16"),
        ("cpu", False, "no"),
        ("cuda", False, "fp16"),
        ("mps", False, "bf16"),
    ],
)
def test_no_line_where_the_precision_is_native_or_unknown(monkeypatch, capsys, device, is_native, value):
    set_device(monkeypatch, device, is_native)
    warn_if_emulated(value)
    assert capsys.readouterr().err == ""


def test_training_prints_the_line_unless_quiet(monkeypatch, capsys, tmp_path):
    lines = []
    monkeypatch.setattr("mmx.training.loop.warn_if_emulated", lines.append)
    data = write_numbers(tmp_path)
    train(number_config(data, tmp_path / "quiet", max_steps=1), quiet=True)
    assert lines == []
    train(number_config(data, tmp_path / "run", max_steps=1))
    assert lines == ["no"]


def test_the_files_of_a_run_name_its_precision_and_a_resumed_run_keeps_it(monkeypatch, fresh_process, tmp_path):
    config = number_config(write_numbers(tmp_path), tmp_path / "run", mixed_precision="auto", max_steps=1)
    best = train(config, quiet=True)
    assert load_config(tmp_path / "run" / "config.yaml", RunConfig).training.mixed_precision == "no"
    assert load_provenance(best)["config"]["training"]["mixed_precision"] == "no"
    set_device(monkeypatch, "cpu", is_native=True)
    assert resolve_precision(config, resume=False).training.mixed_precision == "bf16"
    assert resolve_precision(config, resume=True).training.mixed_precision == "no"


def test_auto_keeps_the_precision_of_a_process_that_has_trained(monkeypatch, tmp_path):
    train(number_config(write_numbers(tmp_path), tmp_path / "first", max_steps=1), quiet=True)
    set_device(monkeypatch, "cpu", is_native=True)
    assert resolve_precision(run_config("auto", tmp_path), resume=False).training.mixed_precision == "no"
