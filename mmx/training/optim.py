"""What is trained, how fast, and towards what average: parameter groups, schedule, loss, moving average."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from mmx.config.schema import ParamGroupConfig, TrainingConfig
from mmx.data.batching import IGNORE_INDEX
from mmx.errors import ConfigError, suggest

_NO_DECAY = re.compile(r"(table|(embedding|positions|along\.\d|lm_head|relative_position_bias)\.weight)$")


def build_optimizer(model: nn.Module, config: TrainingConfig) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019) with a group per learning rate; vectors and tables get no weight decay."""
    check_param_groups(model, config.param_groups)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        part = param_group_for(name, config.param_groups)
        if part.freeze:
            parameter.requires_grad_(False)
        if parameter.requires_grad:  # what an encoder froze itself stays so, such as a table of fixed positions
            groups.setdefault((part.lr_scale, _decays(name, parameter)), []).append(parameter)
    if not groups:
        raise ConfigError("training.param_groups freezes every part of the model; leave at least one to be trained.")
    return AdamW(
        [
            {
                "params": parameters,
                "lr": config.learning_rate * scale,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (scale, decays), parameters in groups.items()
        ],
        betas=config.betas,
        fused=all(p.device.type in ("cpu", "cuda") for p in model.parameters()),
    )


def param_group_for(name: str, parts: Mapping[str, ParamGroupConfig]) -> ParamGroupConfig:
    """How a parameter is trained: by the longest prefix of its name that `parts` has."""
    matching = [prefix for prefix in parts if name == prefix or name.startswith(prefix + ".")]
    return parts[max(matching, key=len)] if matching else ParamGroupConfig()


def check_param_groups(model: nn.Module, parts: Mapping[str, ParamGroupConfig]) -> None:
    """Raise ConfigError for a part that the model does not have."""
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for prefix in parts:
        if prefix not in known:
            near = suggest(prefix, sorted(name for name in known if name and name.count(".") < 3))
            raise ConfigError(f"training.param_groups names {prefix!r}, which the model does not have; {near}")


def set_mode(model: nn.Module, parts: Mapping[str, ParamGroupConfig]) -> None:
    """Training mode, frozen parts excepted: their running statistics and dropout must stand still as well."""
    model.train()
    for name, module in model.named_modules():
        # One by one: eval() of a frozen part would also still a part inside it that is trained.
        module.training = not param_group_for(name, parts).freeze


def lr_factor(step: int, config: TrainingConfig) -> float:
    """The share of the full rate at a step: linear warm-up, then a cosine down to `final_lr` (Loshchilov 2017)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def token_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Sum over tokens of the cross-entropy in nats, labels smoothed (Szegedy et al. 2016, section 7).

    logits: [n, V], targets: int [n]. A sum, because the mean over micro-batches is not the mean over tokens.
    """
    return F.cross_entropy(
        logits.float(), targets, label_smoothing=smoothing, ignore_index=IGNORE_INDEX, reduction="sum"
    )


def scst_loss(
    logits: Tensor, targets: Tensor, smoothing: float, advantages: Tensor, temperature: float = 1.0
) -> Tensor:
    """As `token_loss`, where some tokens were said by the model itself: there minus the log-probability times the
    advantage (Williams 1992, REINFORCE), unsmoothed, at the temperature that they were drawn with. advantages: [n], NaN
    for tokens that people wrote."""
    own = ~advantages.isnan()
    said = F.cross_entropy(logits[own].float() / temperature, targets[own], ignore_index=IGNORE_INDEX, reduction="none")
    return token_loss(logits[~own], targets[~own], smoothing) + (said * advantages[own]).sum()


class ExponentialMovingAverage:
    """An exponential moving average of the trained parameters (Polyak and Juditsky 1992), or nothing at decay 0.

    Early on the decay is (1 + step) / (10 + step), so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().clone() for n, p in self._trained(model)} if decay else {}

    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the model's present weights."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = [(self.weights[name], parameter.detach()) for name, parameter in self._trained(model)]
        torch._foreach_lerp_([average for average, _ in pairs], [now for _, now in pairs], 1 - decay)

    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the average; a second call changes them back."""
        with torch.no_grad():
            for name, parameter in self._trained(model):
                if name in self.weights:
                    kept = parameter.detach().clone()
                    parameter.copy_(self.weights[name])
                    self.weights[name] = kept

    @staticmethod
    def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _decays(name: str, parameter: Tensor) -> bool:
    """Vectors and lookup tables (embeddings, positions, relative biases) are not decayed."""
    return parameter.ndim > 1 and not _NO_DECAY.search(name)
