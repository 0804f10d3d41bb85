"""The processes of one training run: start, reductions over ranks, and exit."""

from __future__ import annotations

import atexit
import gc
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object

from mmx.errors import MmxError, TrainingError


def start_processes(mixed_precision: str) -> Accelerator:
    """Return the Accelerator of this process, which joins the processes that were launched together.

    Raises:
        TrainingError: the precision is not available.
    """
    # Which parameters a batch uses depends on its sources and on the backbone; some backbones have unused layers.
    ddp_options = DistributedDataParallelKwargs(find_unused_parameters=True)
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
    try:
        # Without a GPU, accelerate starts several processes only if cpu=True.
        cpu = not torch.accelerator.is_available()
        accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=[ddp_options])
    except ValueError as error:
        raise TrainingError(
            f"training.mixed_precision {mixed_precision!r} is not available: this device does not support it, or this "
            "process has trained with another one; use 'auto', or start a new process.",
            code="training.precision",
            given=mixed_precision,
        ) from error
    atexit.unregister(_destroy_process_group)
    atexit.register(_destroy_process_group)
    return accelerator


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether a flag is set on any rank. All ranks must call this."""
    value = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(value, "sum") > 0)


def raise_on_all_ranks(accelerator: Accelerator, error: MmxError | None) -> None:
    """Raise the error of the first rank that has one, on all ranks. All ranks must call this."""
    if any_rank(accelerator, error is not None):
        raise next(found for found in gather_object([error]) if found is not None)


def _destroy_process_group() -> None:
    """Destroy the process group before interpreter shutdown.

    Threads of gloo hold tensors of the last reductions. If they release them after the interpreter has ended, the
    process aborts. The wrapped models hold the group and are in reference cycles, so they are collected first. No
    process waits for another one here, as it may have failed.
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized():
        gc.collect()
        group.destroy_process_group()
