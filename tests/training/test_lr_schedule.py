"""The learning rate by hand, and its shape for any configuration."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.config.schema import TrainingConfig
from mmx.training.lr_schedule import learning_rate, lr_factor, set_learning_rate


def test_learning_rate_by_hand():
    config = TrainingConfig(max_steps=14, warmup_steps=4, min_lr_ratio=0.1)
    factors = [lr_factor(step, config) for step in range(15)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[9] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down
    assert factors[11] == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.7 * math.pi)))
    assert factors[14] == pytest.approx(0.1)
    assert lr_factor(99, config) == pytest.approx(0.1)


@given(st.integers(0, 50), st.integers(1, 80), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_learning_rate_rises_and_then_falls(warmup, steps, min_ratio):
    config = TrainingConfig(max_steps=steps, warmup_steps=warmup, min_lr_ratio=min_ratio)
    factors = [lr_factor(step, config) for step in range(steps)]
    assert all(0 < factor <= 1 or factor == min_ratio for factor in factors)
    peak = min(max(warmup - 1, 0), steps - 1)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert all(a >= b - 1e-12 for a, b in zip(factors[warmup:], factors[warmup + 1 :], strict=False))


def test_every_group_is_scaled_from_its_own_maximum():
    groups = [{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(1)], "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups)
    config = TrainingConfig(max_steps=14, warmup_steps=4)
    for step in (0, 1, 2):
        set_learning_rate(optimizer, step, config)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.075), pytest.approx(0.0075)]
    assert learning_rate(optimizer) == pytest.approx(0.075)
