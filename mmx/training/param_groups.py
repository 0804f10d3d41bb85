"""Parameter groups: which parameters are trained, at which fraction of the learning rate, and with which decay."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import AdamW

from mmx.config.schema import ParamGroupConfig, RunConfig, TrainingConfig
from mmx.errors import ConfigError, suggest
from mmx.models.model import Model
from mmx.training.lora import DECODER_LAYERS, add_adapters

_NO_DECAY = re.compile(r"(table|(embedding|positions|along\.\d|lm_head|relative_position_bias)\.weight)$")
_ADAPTER_PARTS = ("lora_A", "lora_B", "lora_dropout")


def build_optimizer(model: nn.Module, config: TrainingConfig) -> AdamW:
    """Return AdamW (Loshchilov and Hutter 2019) with one group for each learning rate and weight decay.

    Vectors and lookup tables are not decayed. Frozen parameters stop requiring a gradient.

    Raises:
        ConfigError: `param_groups` names a prefix that the model does not have, or freezes everything.
    """
    check_param_groups(model, config.param_groups)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        group = param_group_for(name, config.param_groups)
        if group.freeze:
            parameter.requires_grad_(False)
        if parameter.requires_grad:  # an encoder may have frozen some itself, such as fixed position embeddings
            groups.setdefault((group.lr_scale, _has_decay(name, parameter)), []).append(parameter)
    if not groups:
        raise ConfigError(
            "training.param_groups freezes the whole model; leave at least one group to be trained.",
            code="training.all_frozen",
        )
    settings = []
    for (lr_scale, has_decay), parameters in groups.items():
        decay = config.weight_decay if has_decay else 0.0
        settings.append({"params": parameters, "lr": config.learning_rate * lr_scale, "weight_decay": decay})
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in model.parameters())
    return AdamW(settings, betas=config.betas, fused=fused)


def param_group_for(name: str, groups: Mapping[str, ParamGroupConfig]) -> ParamGroupConfig:
    """Return the group of the longest prefix of a parameter or module name; prefixes match whole dotted parts."""
    matching = [prefix for prefix in groups if name == prefix or name.startswith(prefix + ".")]
    return groups[max(matching, key=len)] if matching else ParamGroupConfig()


def check_param_groups(model: nn.Module, groups: Mapping[str, ParamGroupConfig]) -> None:
    """Raise ConfigError for a prefix that the model does not have."""
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for prefix in groups:
        if prefix not in known:
            candidates = sorted(name for name in known if name and name.count(".") < 3)
            raise ConfigError(
                f"training.param_groups names {prefix!r}, which the model does not have; {suggest(prefix, candidates)}",
                code="training.unknown_group",
                key=prefix,
            )


def set_training_mode(model: nn.Module, groups: Mapping[str, ParamGroupConfig]) -> None:
    """Set training mode, and evaluation mode for frozen groups, which disables dropout and keeps running statistics."""
    model.train()
    for name, module in model.named_modules():
        # Not module.eval(), which would also change trained modules inside a frozen group.
        module.training = not param_group_for(name, groups).freeze


def prepare_param_groups(model: Model, config: RunConfig) -> TrainingConfig:
    """Add LoRA adapters to the model if configured, and return the training options with the default groups.

    If the decoder is a pretrained language model, or has adapters, it is frozen except cross-attention with its norms
    and gates, and the adapters, unless `training.param_groups` has an entry for "decoder". Layers with an adapter are
    always frozen.
    """
    options = config.training
    is_pretrained = config.model is not None and config.model.decoder.pretrained is not None
    if not is_pretrained and options.lora is None:
        return options
    defaults = {} if "decoder" in options.param_groups else _train_cross_attention_only(model)
    if options.lora is not None:
        for name in add_adapters(model, options.lora):
            defaults[f"{name}.base_layer"] = ParamGroupConfig(freeze=True)
            for part in _ADAPTER_PARTS:
                defaults[f"{name}.{part}"] = ParamGroupConfig()
    return options.model_copy(update={"param_groups": {**defaults, **options.param_groups}})


def _train_cross_attention_only(model: Model) -> dict[str, ParamGroupConfig]:
    groups = {"decoder": ParamGroupConfig(freeze=True)}
    for name, _ in model.named_modules():
        if name.startswith(DECODER_LAYERS) and name.endswith((".cross_attention", ".cross_residual")):
            groups[name] = ParamGroupConfig()
    return groups


def _has_decay(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: not to vectors, embeddings, positions and relative biases."""
    return parameter.ndim > 1 and not _NO_DECAY.search(name)
