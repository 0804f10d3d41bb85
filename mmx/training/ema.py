"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


class ExponentialMovingAverage:
    """Exponential moving average of the trained parameters (Polyak and Juditsky 1992); empty if the decay is 0.

    The decay of the first steps is (1 + step) / (10 + step), so that the random initialization is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().clone() for n, p in self._trained_parameters(model)} if decay else {}

    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the present weights of the model."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = []
        present = []
        for name, parameter in self._trained_parameters(model):
            averages.append(self.weights[name])
            present.append(parameter.detach())
        torch._foreach_lerp_(averages, present, 1 - decay)

    def swap(self, model: nn.Module) -> None:
        """Exchange the weights of the model and the average; a second call restores both."""
        with torch.no_grad():
            for name, parameter in self._trained_parameters(model):
                if name in self.weights:
                    present = parameter.detach().clone()
                    parameter.copy_(self.weights[name])
                    self.weights[name] = present

    @staticmethod
    def _trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
