"""A small module with two parts for tests of parameter groups and averages."""

import torch
from torch import Tensor, nn

from mmx.config.schema import TrainingConfig
from mmx.training.param_groups import build_optimizer, set_training_mode


class SmallModule(nn.Module):
    """An encoder with a part of its own, a decoder, a batch norm in each, and a lookup table."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.Dropout()))
        self.decoder = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        self.table = nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)) + self.table.sum(0)


def train_steps(model: nn.Module, config: TrainingConfig, steps: int = 3) -> None:
    """Train on random inputs with the optimizer and the mode of the configuration."""
    optimizer = build_optimizer(model, config)
    for _ in range(steps):
        set_training_mode(model, config.param_groups)
        model(torch.randn(6, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
