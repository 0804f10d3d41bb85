"""The result of a family's converter: our configuration, and the origin of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmx.config.schema import GenerationConfig, ModelConfig
from mmx.hub.weight_mapping import WeightMapping
from mmx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ConversionSpec:
    """How a published model is converted.

    config, tokenizer, generation: of our checkpoint.
    weights: which published tensors each of our tensors is made of.
    dropped: patterns of whole names of published tensors that are not needed.
    encoders: source name to the prefix of the tensors of its pretrained encoder, which converts them itself.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    generation: GenerationConfig
    weights: list[WeightMapping]
    dropped: tuple[str, ...] = ()
    encoders: Mapping[str, str] = field(default_factory=dict)
