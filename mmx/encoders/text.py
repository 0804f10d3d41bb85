"""The built-in text encoder: a transformer over the model's own tokens, made of the same layers as the decoder.

Axes: B texts, S slots (tokens), F feature size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmx.config.schema import BaseTransformerConfig
from mmx.encoders.base import Encoder, Features, check_text_length
from mmx.nn.layers import (
    SelfAttention,
    TokenEmbedding,
    build_feed_forward,
    build_norm,
    build_residual,
    init_weights,
)
from mmx.nn.position_embedding import position_ids_from_mask
from mmx.text.tokenizer import Tokenizer


class TextEncoder(Encoder):
    """Text to one slot per token. Attention is bidirectional, or causal with the option `causal`."""

    modality = "text"
    uses_tokenizer = True

    class Options(BaseTransformerConfig):
        """Configuration of the transformer. A text has up to `max_position_embeddings` tokens, eos included.

        `causal`: a token attends to itself and to earlier tokens only.
        """

        causal: bool = False

    options: Options

    def __init__(self, options: Options, tokenizer: Tokenizer) -> None:
        super().__init__(options)
        self.tokenizer = tokenizer
        self.width = options.hidden_size
        self.embedding = TokenEmbedding(options, len(tokenizer))
        self.layers = nn.ModuleList(EncoderLayer(options) for _ in range(options.num_layers))
        final_norm = options.norm if options.norm_placement == "pre" else "none"
        self.norm = build_norm(final_norm, options.hidden_size, options.norm_eps)
        init_weights(self, options.num_layers)

    def prepare(self, raw: object) -> dict[str, Tensor]:
        """Text to {"tokens": int [S], "mask": bool [S]}. The last token is eos, so that no text is empty.

        Raises MmxError (text.too_long) for a text of more than `max_position_embeddings` tokens.
        """
        tokens = torch.tensor([*self.tokenizer.encode(str(raw)), self.tokenizer.eos_token_id])
        check_text_length(len(tokens), self.options.max_position_embeddings)
        return {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}

    def labels(self, raw: object) -> list[str]:
        """Return the text of each token."""
        labels = []
        for token in self.prepare(raw)["tokens"].tolist():
            labels.append("end" if token == self.tokenizer.eos_token_id else self.tokenizer.decode([token]))
        return labels

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """Encode {"tokens": [B, S], "mask": [B, S]} to Features."""
        mask = batch["mask"]
        attention_mask = mask[:, None, None]
        if self.options.causal:
            length = mask.shape[1]
            causal_mask = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
            attention_mask = attention_mask & causal_mask
        positions = position_ids_from_mask(mask)
        x = self.embedding(batch["tokens"], positions)
        for layer in self.layers:
            x = layer(x, attention_mask, positions)
        return Features(self.norm(x), mask)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual connection."""

    def __init__(self, options: BaseTransformerConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(options)
        self.self_residual = build_residual(options)
        self.feed_forward = build_feed_forward(options)
        self.feed_residual = build_residual(options)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Map [B, S, F] to [B, S, F]."""
        x = self.self_residual(x, self.self_attention, mask, positions)
        return self.feed_residual(x, self.feed_forward)
