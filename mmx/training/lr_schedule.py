"""The learning rate: linear warm-up, then a cosine."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from mmx.config.schema import TrainingConfig

_BASE_LR = "base_lr"  # key of an optimizer's group


def lr_factor(step: int, config: TrainingConfig) -> float:
    """Return the learning rate at a step as a fraction of its maximum.

    Linear warm-up, then a cosine down to `min_lr_ratio` (Loshchilov and Hutter 2017, "SGDR").
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine


def set_learning_rate(optimizer: Optimizer, step: int, config: TrainingConfig) -> None:
    """Set the learning rate of every group for a step. The first call takes the present ones as the maxima."""
    factor = lr_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault(_BASE_LR, group["lr"]) * factor


def learning_rate(optimizer: Optimizer) -> float:
    """Return the present learning rate of the first group."""
    return float(optimizer.param_groups[0]["lr"])
