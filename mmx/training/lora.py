"""Low-rank adapters on linear layers of the decoder (Hu et al. 2021, "LoRA", section 4.1), with peft.

An adapter leaves the weight W of a linear layer unchanged and adds (alpha / r) B A to it, with B initialized to zero.
Adapters exist in the model during training and in the saved training state. In checkpoints they are merged into W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmx.config.schema import LoraConfig
from mmx.errors import ConfigError
from mmx.hub.language_model import is_new
from mmx.models.model import Model
from mmx.training.ema import ExponentialMovingAverage

DECODER_LAYERS = "decoder.layers"
ADAPTER = "default"


def add_adapters(model: Model, config: LoraConfig) -> list[str]:
    """Add an adapter to every linear layer of the decoder that `target_modules` names; return their full names.

    Cross-attention gets none, because it is trained itself.

    Raises:
        ConfigError: peft is not installed, or a target does not exist.
    """
    try:
        from peft import LoraConfig as PeftLoraConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "training.lora needs peft, which is not installed; type pip install 'mmx[lora]'.",
            code="training.peft_missing",
        ) from error
    layers = model.decoder.layers
    names = _target_names(layers, config.target_modules)
    required_grad = [(parameter, parameter.requires_grad) for parameter in layers.parameters()]
    peft_config = PeftLoraConfig(
        r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=names, bias="none"
    )
    inject_adapter_in_model(peft_config, layers, ADAPTER)
    for parameter, before in required_grad:  # peft freezes the other parameters; `training.param_groups` decides
        parameter.requires_grad_(before)
    return [f"{DECODER_LAYERS}.{name}" for name in names]


@contextmanager
def merged_weights(model: Model, average: ExponentialMovingAverage) -> Iterator[Mapping[str, Tensor]]:
    """Inside the block, the averaged adapters are merged into the model; yields the other averaged weights.

    Adapted layers are exchanged for merged copies and restored afterwards. Adding and subtracting the adapters in place
    would not restore the weights exactly.
    """
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    if not adapted:
        yield average.weights
        return
    average.swap(model)
    merged = {name: _merge(module) for name, module in adapted.items()}
    average.swap(model)
    try:
        for name, module in merged.items():
            model.set_submodule(name, module)
        names = model.state_dict().keys()
        yield {name: tensor for name, tensor in average.weights.items() if name in names}
    finally:
        for name, module in adapted.items():
            model.set_submodule(name, module)


def averaged_adapters(average: ExponentialMovingAverage) -> dict[str, Tensor]:
    """Return the averaged adapter weights, which a checkpoint does not hold because they are merged there."""
    return {name: tensor for name, tensor in average.weights.items() if ".lora_" in name}


def _target_names(layers: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Return the names of the linear layers whose last part is one of `targets`."""
    linear_names = []
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear) and not is_new(f".{name}"):
            linear_names.append(name)
    known = {name.rpartition(".")[2] for name in linear_names}
    unknown = sorted(set(targets) - known)
    if unknown:
        raise ConfigError(
            f"training.lora.target_modules names {unknown[0]!r}; expected some of {', '.join(sorted(known))}.",
            code="training.lora_target",
            given=unknown[0],
            expected=sorted(known),
        )
    return [name for name in linear_names if name.rpartition(".")[2] in targets]


def _merge(module: nn.Module) -> nn.Linear:
    """Return a linear layer that computes what a layer and its adapter compute."""
    base: nn.Linear = module.base_layer  # type: ignore[assignment]
    with torch.no_grad():
        weight = base.weight + module.get_delta_weight(ADAPTER)  # type: ignore[operator]
    merged = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    merged.weight = nn.Parameter(weight, requires_grad=False)
    merged.bias = base.bias
    return merged
