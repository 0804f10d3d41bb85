"""Small stand-ins that build in milliseconds: a tokenizer of bytes, an encoder of numbers, a model of two layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from mmx.config.schema import DecoderConfig, FrozenModel, ModelConfig, ProjectionConfig, SourceConfig
from mmx.encoders.base import Encoder, Features
from mmx.models.model import Model
from mmx.text.tokenizer import Tokenizer


class ToyEncoder(Encoder):
    """A list of numbers -> one slot a number. The smallest honest encoder: it shows the whole contract."""

    modality = "numbers"

    class Options(FrozenModel):
        """`features` is F."""

        features: PositiveInt = 8

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.width = options.features
        self.linear = nn.Linear(1, options.features)

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        """[1.0, 2.0, ...] -> {"numbers": [S], "mask": [S]}."""
        numbers = torch.tensor(raw, dtype=torch.float32)
        return {"numbers": numbers, "mask": torch.ones_like(numbers, dtype=torch.bool)}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """{"numbers": [B, S], "mask": [B, S]} -> Features."""
        return Features(self.linear(batch["numbers"][..., None]).tanh(), batch["mask"])


def toy_tokenizer() -> Tokenizer:
    """Every byte of a text is a token; nothing was learned."""
    return Tokenizer.train([], 0)


def tiny_model(
    sources: Mapping[str, str | SourceConfig] | None = None,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    question_input: str = "prompt",
    projection: ProjectionConfig | None = None,
    **decoder: Any,
) -> Model:
    """A model in eval mode with given sources (name -> encoder name, address or SourceConfig); two layers, width 32.

    Without sources it mounts a ToyEncoder as `numbers`. `decoder` changes fields of DecoderConfig.
    """
    mounted = sources or {"numbers": "mmx.testing:ToyEncoder"}
    projection = projection or ProjectionConfig()
    configs = {
        name: source if isinstance(source, SourceConfig) else SourceConfig(encoder=source, projection=projection)
        for name, source in mounted.items()
    }
    facts = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128, **decoder}
    config = ModelConfig(sources=configs, decoder=DecoderConfig(**facts), question_input=question_input)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model(config, tokenizer or toy_tokenizer()).eval()
