"""The micro-batches of each step of a run."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate import Accelerator
from torch.utils.data import DataLoader

from mmx.config.schema import TrainingConfig
from mmx.data.batching import Batch, TrainingDataset
from mmx.data.sampling import PositionSampler
from mmx.training.state import TrainingProgress
from mmx.training.stop_signals import ignore_interrupt


def step_batches(
    data: TrainingDataset, options: TrainingConfig, progress: TrainingProgress, accelerator: Accelerator
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each remaining step of this rank, on its device."""
    num_batches = (options.max_steps - progress.step) * options.gradient_accumulation_steps
    positions = PositionSampler(
        options.per_device_batch_size,
        progress.samples_seen,
        num_batches,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = DataLoader(
        data,
        batch_sampler=positions,
        collate_fn=data.collate,
        num_workers=options.num_workers,
        persistent_workers=options.num_workers > 0,
        worker_init_fn=ignore_interrupt,
    )
    batches: list[Batch] = []
    for batch in loader:
        batches.append(batch.to(accelerator.device))
        if len(batches) == options.gradient_accumulation_steps:
            yield batches
            batches = []
