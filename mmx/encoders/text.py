"""The built-in text encoder: a bidirectional transformer over the model's own tokens, from the layers of the decoder.

Alphabet: B texts, S slots (tokens), F feature width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmx.config.schema import BaseTransformerConfig
from mmx.encoders.base import Encoder, Features
from mmx.nn.layers import (
    SelfAttention,
    TokenEmbedding,
    build_feed_forward,
    build_norm,
    build_residual,
    init_weights,
    position_ids_from_mask,
)
from mmx.text.tokenizer import Tokenizer


class TextEncoder(Encoder):
    """Text -> one slot a token; every token sees the whole text, or (`causal`) what came before it."""

    modality = "text"
    uses_tokenizer = True

    class Options(BaseTransformerConfig):
        """A transformer's facts; text past `max_positions` tokens is cut. `causal`: no token sees those after it."""

        causal: bool = False

    def __init__(self, options: Options, tokenizer: Tokenizer) -> None:
        super().__init__(options)
        self.tokenizer, self.width = tokenizer, options.hidden_size
        self.embedding = TokenEmbedding(options, len(tokenizer))
        self.layers = nn.ModuleList(EncoderLayer(options) for _ in range(options.num_layers))
        final = options.norm if options.norm_placement == "pre" else "none"
        self.norm = build_norm(final, options.hidden_size, options.norm_eps)
        init_weights(self, options.num_layers)

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        """A text -> {"tokens": int [S], "mask": bool [S]}, closed by the end token, so that no text is empty."""
        kept = self.tokenizer.encode(str(raw))[: self.options.max_positions - 1]
        tokens = torch.tensor([*kept, self.tokenizer.eos])
        return {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}

    def labels(self, raw: Any) -> list[str]:
        """The text of each token."""
        tokens = self.prepare(raw)["tokens"].tolist()
        return ["end" if token == self.tokenizer.eos else self.tokenizer.decode([token]) for token in tokens]

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """{"tokens": [B, S], "mask": [B, S]} -> Features."""
        mask = batch["mask"]
        positions, may_attend = position_ids_from_mask(mask), mask[:, None, None]
        if self.options.causal:
            may_attend = may_attend & torch.ones(mask.shape[1], mask.shape[1], device=mask.device).tril().bool()
        x = self.embedding(batch["tokens"], positions)
        for block in self.layers:
            x = block(x, may_attend, positions)
        return Features(self.norm(x), mask)


class EncoderLayer(nn.Module):
    """Look round in your own text, think it over."""

    def __init__(self, options: BaseTransformerConfig) -> None:
        super().__init__()
        self.self_attention, self.self_residual = SelfAttention(options), build_residual(options)
        self.feed_forward, self.feed_residual = build_feed_forward(options), build_residual(options)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """[B, S, F] -> [B, S, F]."""
        x = self.self_residual(x, lambda y: self.self_attention(y, mask, positions))
        return self.feed_residual(x, self.feed_forward)
