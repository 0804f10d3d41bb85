"""Small test doubles that build in milliseconds: a byte tokenizer, an encoder of numbers, a model of two layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from mmx.config.schema import DecoderConfig, FrozenModel, ModelConfig, ProjectionConfig, SourceConfig
from mmx.encoders.base import Encoder, Features
from mmx.models.model import Model
from mmx.text.tokenizer import Tokenizer


class ToyEncoder(Encoder):
    """A list of numbers to one slot per number. It uses all of the encoder contract."""

    modality = "numbers"

    class Options(FrozenModel):
        """`features`: F."""

        features: PositiveInt = 8

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.width = options.features
        self.linear = nn.Linear(1, options.features)

    def prepare(self, raw: object) -> dict[str, Tensor]:
        """Convert [1.0, 2.0, ...] to {"numbers": [S], "mask": [S]}."""
        numbers = torch.tensor(raw, dtype=torch.float32)
        return {"numbers": numbers, "mask": torch.ones_like(numbers, dtype=torch.bool)}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """Encode {"numbers": [B, S], "mask": [B, S]} to Features."""
        states = self.linear(batch["numbers"][..., None]).tanh()
        return Features(states, batch["mask"])


def toy_tokenizer() -> Tokenizer:
    """Return a tokenizer in which every byte of a text is a token."""
    return Tokenizer.train([], 0)


def tiny_model(
    sources: Mapping[str, str | SourceConfig] | None = None,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    question_input: str = "prompt",
    projection: ProjectionConfig | None = None,
    **decoder: object,
) -> Model:
    """Return a model in eval mode with random weights, two layers and hidden size 32.

    Args:
        sources: source name to encoder name, address or SourceConfig. Default: a ToyEncoder as `numbers`.
        projection: of the sources given by name or address.
        decoder: fields of DecoderConfig.
    """
    encoders = sources or {"numbers": "mmx.testing:ToyEncoder"}
    configs = {}
    for name, source in encoders.items():
        if not isinstance(source, SourceConfig):
            source = SourceConfig(encoder=source, projection=projection or ProjectionConfig())
        configs[name] = source
    fields = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128, **decoder}
    config = ModelConfig(sources=configs, decoder=DecoderConfig(**fields), question_input=question_input)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model(config, tokenizer or toy_tokenizer()).eval()
