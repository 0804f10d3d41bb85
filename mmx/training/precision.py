"""The precision of a run: what `training.mixed_precision: auto` stands for, and a warning where bf16 is slow."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, is_initialized

from mmx.config.loader import load_config
from mmx.config.schema import MixedPrecision, RunConfig
from mmx.errors import MmxError
from mmx.training.config_changes import CONFIG_FILE

_DEVICE_NAMES = {"cpu": "processor", "cuda": "GPU"}


def resolve_precision(config: RunConfig, resume: bool) -> RunConfig:
    """Return the configuration with the precision that `auto` stands for.

    A resumed run keeps the precision it was started with, and a process its first precision, because accelerate allows
    only one. Else it is bf16 if the device computes it natively, and float32 if not.
    """
    if config.training.mixed_precision != "auto":
        return config
    precision = _saved_precision(Path(config.output_dir)) if resume else None
    if precision is None and is_initialized():
        precision = AcceleratorState().mixed_precision
    if precision is None:
        precision = "bf16" if has_bf16_units(device_type()) else "no"
    training = config.training.model_copy(update={"mixed_precision": precision})
    return config.model_copy(update={"training": training})


def warn_if_emulated(precision: MixedPrecision) -> None:
    """Print a sentence to standard error if a precision is emulated on this device and therefore slow."""
    device = device_type()
    if precision == "bf16" and device in _DEVICE_NAMES and not has_bf16_units(device):
        print(
            f"warning: training.mixed_precision is bf16, but this {_DEVICE_NAMES[device]} has no bfloat16 units, and a "
            "step can take ten times as long as in float32; start the run with training.mixed_precision=auto.",
            file=sys.stderr,
        )


def device_type() -> str:
    """Return the type of the device that training runs on, such as "cpu" or "cuda"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def has_bf16_units(device: str) -> bool:
    """Return whether a type of device multiplies bfloat16 matrices natively; False where that is not known."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def _saved_precision(folder: Path) -> MixedPrecision | None:
    """Return the precision of the run in a folder; None if its configuration cannot be read."""
    try:
        return load_config(folder / CONFIG_FILE, RunConfig).training.mixed_precision
    except MmxError:
        return None
