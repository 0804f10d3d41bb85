"""Which parts of a decoder that can speak already are trained, and adapters, which train it by little.

An adapter (Hu et al. 2021, "LoRA", section 4.1) leaves a linear map W as it is and adds (alpha / rank) B A to it, B
starting at zero. They are in the model while it is trained and in what a run goes on from; a checkpoint that is handed
over has them added up, under the plain names, and knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmx.config.schema import LoraConfig, ParamGroupConfig, RunConfig, TrainingConfig
from mmx.errors import ConfigError
from mmx.hub.language_model import is_new
from mmx.models.model import Model
from mmx.training.optim import ExponentialMovingAverage

BLOCKS, ADAPTER = "decoder.layers", "default"


def prepare_param_groups(model: Model, config: RunConfig) -> TrainingConfig:
    """The training configuration with the parts as they are trained where the decoder is a language model or gets
    adapters, which are put into the model here.

    Then the decoder is frozen but for what is new in it, unless `training.parts` has an entry for it: cross-attention
    with its norms and gates, and the adapters. What an adapter adds to is always frozen.
    """
    options = config.training
    taken = config.model is not None and config.model.decoder.pretrained is not None
    if not taken and options.lora is None:
        return options
    parts = {} if "decoder" in options.param_groups else _new_alone(model)
    if options.lora is not None:
        for name in add_adapters(model, options.lora):
            parts[f"{name}.base_layer"] = ParamGroupConfig(freeze=True)
            parts |= {f"{name}.{part}": ParamGroupConfig() for part in ("lora_A", "lora_B", "lora_dropout")}
    return options.model_copy(update={"param_groups": {**parts, **options.param_groups}})


def add_adapters(model: Model, config: LoraConfig) -> list[str]:
    """Put an adapter on every linear map of the decoder's blocks that `targets` names, and return their full names.

    Cross-attention gets none: it is trained itself. Raises ConfigError where peft or a target is lacking.
    """
    try:
        from peft import LoraConfig as Theirs
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("training.lora needs peft, which is not installed; pip install 'mmx[lora]'.") from error
    blocks = model.decoder.layers
    maps = [name for name, part in blocks.named_modules() if isinstance(part, nn.Linear) and not is_new(f".{name}")]
    known = {name.rpartition(".")[2] for name in maps}
    if unknown := sorted(set(config.target_modules) - known):
        raise ConfigError(
            f"training.lora.target_modules names {unknown[0]!r}; expected some of {', '.join(sorted(known))}."
        )
    chosen = [name for name in maps if name.rpartition(".")[2] in config.target_modules]
    trained = [(parameter, parameter.requires_grad) for parameter in blocks.parameters()]
    theirs = Theirs(
        r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=chosen, bias="none"
    )
    inject_adapter_in_model(theirs, blocks, ADAPTER)
    for parameter, before in trained:  # peft freezes all else; what is trained is for `training.parts` to say
        parameter.requires_grad_(before)
    return [f"{BLOCKS}.{name}" for name in chosen]


@contextmanager
def merged_weights(model: Model, average: ExponentialMovingAverage) -> Iterator[Mapping[str, Tensor]]:
    """For as long as it lasts, the model with averaged adapters added to their maps; yields the other averages.

    No weight is touched: maps are exchanged for sums of their own, and put back, for adding and subtracting again
    would not give the same bits.
    """
    adapted = {name: part for name, part in model.named_modules() if hasattr(part, "get_delta_weight")}
    if not adapted:
        yield average.weights
        return
    average.swap(model)
    sums = {name: _sum(part) for name, part in adapted.items()}
    average.swap(model)
    try:
        for name, part in sums.items():
            model.set_submodule(name, part)
        own = model.state_dict()
        yield {name: tensor for name, tensor in average.weights.items() if name in own}
    finally:
        for name, part in adapted.items():
            model.set_submodule(name, part)


def averaged_adapters(average: ExponentialMovingAverage) -> dict[str, Tensor]:
    """What of the average a checkpoint does not tell, because it is added up there."""
    return {name: tensor for name, tensor in average.weights.items() if ".lora_" in name}


def _new_alone(model: Model) -> dict[str, ParamGroupConfig]:
    new = [name for name, _ in model.named_modules() if name.endswith((".cross_attention", ".cross_residual"))]
    return {
        "decoder": ParamGroupConfig(freeze=True),
        **{name: ParamGroupConfig() for name in new if name.startswith(BLOCKS)},
    }


def _sum(part: nn.Module) -> nn.Linear:
    """A linear map that does alone what `part` and its adapter do."""
    base: nn.Linear = part.base_layer  # type: ignore[assignment]
    with torch.no_grad():
        weight = base.weight + part.get_delta_weight(ADAPTER)  # type: ignore[operator]
    made = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = base.bias
    return made
