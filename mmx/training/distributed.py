"""The processes of one run: how they find their devices and each other, and how they part."""

from __future__ import annotations

import atexit
import gc
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from mmx.errors import TrainingError


def start_processes(mixed_precision: str) -> Accelerator:
    """The Accelerator of this process, joined with those that were launched beside it.

    Raises TrainingError for a precision that cannot be had here.
    """
    # Which parameters a batch uses depends on the sources it has and on the backbone (some keep unused layers).
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
    try:
        # Without a GPU, accelerate sees several processes only when it is told that the CPU is meant.
        cpu = not torch.accelerator.is_available()
        accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=[unused])
    except ValueError as error:
        raise TrainingError(
            f"training.mixed_precision {mixed_precision!r} cannot be had here: this device lacks it, or this process "
            "has trained with another one; use 'no' or 'bf16', or a new process."
        ) from error
    atexit.unregister(_part)
    atexit.register(_part)
    return accelerator


def _part() -> None:
    """End the process group while Python is still whole; left to the interpreter's end, one exit in five aborts.

    Threads of gloo hold tensors of the last reductions, and free them when no Python is left to ask. The wrapped
    models hold the group, and are in cycles: they must be gone before it. No process waits here for another, which may
    have failed.
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized():
        gc.collect()
        group.destroy_process_group()
