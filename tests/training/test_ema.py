"""The exponential moving average by hand."""

import pytest
import torch
from small_modules import SmallModule, train_steps
from torch import nn

from mmx.config.schema import TrainingConfig
from mmx.training.ema import ExponentialMovingAverage


def test_moving_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = ExponentialMovingAverage(model, 0.5)
    expected = 1.0
    for step, value in enumerate((2.0, 5.0, -1.0, 7.0, 7.0, 3.0), start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))  # 2/11, 3/12, 4/13, 5/14, 6/15, 7/16
        expected = decay * expected + (1 - decay) * value
        assert float(average.weights["weight"]) == pytest.approx(expected, rel=1e-6)


def test_swap_exchanges_weights_and_average():
    model = SmallModule()
    average = ExponentialMovingAverage(model, 0.9)
    train_steps(model, TrainingConfig(learning_rate=0.1))
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = {name: tensor.clone() for name, tensor in average.weights.items()}
    average.swap(model)
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in model.named_parameters())
    average.swap(model)
    assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in average.weights.items())


def test_average_is_empty_without_decay_and_leaves_out_frozen_parameters():
    model = SmallModule()
    average = ExponentialMovingAverage(model, 0.0)
    average.update(model, 1)
    average.swap(model)
    assert average.weights == {}
    model.encoder.requires_grad_(False)
    names = {name.split(".")[0] for name in ExponentialMovingAverage(model, 0.9).weights}
    assert names == {"decoder", "table"}
