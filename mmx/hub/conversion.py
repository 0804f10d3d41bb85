"""What a family's file says of one published model: our configuration, and where each tensor goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmx.config.schema import GenerationConfig, ModelConfig
from mmx.hub.weight_mapping import WeightMapping
from mmx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ConversionSpec:
    """config, tokenizer and generation of our checkpoint; `weights` and `dropped`: the weight map; `encoders`: by
    source, the prefix of the tensors that go to a pretrained encoder, which knows its own."""

    config: ModelConfig
    tokenizer: Tokenizer
    generation: GenerationConfig
    weights: list[WeightMapping]
    dropped: tuple[str, ...] = ()
    encoders: Mapping[str, str] = field(default_factory=dict)
