"""Reader: a question is read while looking, and what it has become is the memory that the decoder looks at.

Alphabet: B memories, K streams (questions over each), T positions of a question, S slots.

Source: Li et al. 2022, "BLIP", section 3.1 (the image-grounded text encoder), as it answers questions in section 5.4.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmx.config.schema import DecoderConfig, QuestionEncoderConfig
from mmx.errors import MmxError
from mmx.memory import Memory
from mmx.models.projection import KeyValueProjection
from mmx.nn.features import Features
from mmx.nn.layers import TokenEmbedding, init_weights
from mmx.nn.transformer import Transformer
from mmx.text.tokenizer import Tokenizer

QUESTION_ENCODER = "question_encoder"  # its name among the sources of a batch, and that of its slots in a memory


class AbsolutePositionTokenEmbedding(TokenEmbedding):
    """Padding after a text has positions of its own, which those who show it expect; elsewhere it counts nothing."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions: int [N, T] -> [N, T, E], each token at its place in the row."""
        return super().forward(tokens, torch.arange(tokens.shape[1], device=tokens.device).expand_as(positions))


class QuestionEncoder(Transformer):
    """Reads questions as text encoders do, with `prepare` and `collate`; and over a memory."""

    def __init__(self, config: QuestionEncoderConfig, decoder: DecoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, len(tokenizer), causal=False)
        self.tokenizer, self.prefix_token_ids, self.suffix_token_ids = (
            tokenizer,
            list(config.prefix_token_ids),
            list(config.suffix_token_ids),
        )
        self.attend_padding = config.attend_padding
        if config.attend_padding:
            self.embedding = AbsolutePositionTokenEmbedding(config, self.vocab_size)
        init_weights(self, config.num_layers)
        self.projection = KeyValueProjection(config.projection, decoder, config.hidden_size, 1, QUESTION_ENCODER)

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        """A question -> {"tokens": int [T], "mask": bool [T]}. Raises MmxError for one that is too long."""
        ids = [*self.prefix_token_ids, *self.tokenizer.encode(str(raw)), *self.suffix_token_ids]
        if len(ids) > self.config.max_position_embeddings:
            most = self.config.max_position_embeddings
            raise MmxError(f"the question has {len(ids)} tokens; this model reads up to {most}, ask more shortly.")
        tokens = torch.tensor(ids)
        return {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}

    def labels(self, raw: Any) -> list[str]:
        """The text of each token of a question: what its slots are called."""
        return [self.tokenizer.decode([token]) for token in self.prepare(raw)["tokens"].tolist()]

    def collate(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Questions to one batch, padded at the end."""
        padded = {
            name: nn.utils.rnn.pad_sequence([item[name] for item in prepared], batch_first=True)
            for name in ("tokens", "mask")
        }
        return {**padded, "tokens": padded["tokens"].masked_fill(~padded["mask"], self.tokenizer.pad)}

    def forward(self, questions: Mapping[str, Tensor], rows: Tensor, memory: Memory, streams: int) -> Memory:
        """What n questions {"tokens": [n, T], "mask": [n, T]} have become over the memory of B: B rows, of which each
        of K `streams` sees its own question alone. rows: int [n], the place of each among B*K."""
        shape = (memory.batch_size * streams, questions["tokens"].shape[1])
        tokens = questions["tokens"].new_full(shape, self.tokenizer.pad).index_copy(0, rows, questions["tokens"])
        mask = questions["mask"].new_zeros(shape).index_copy(0, rows, questions["mask"])
        by_stream = (tokens.unflatten(0, (-1, streams)), mask.unflatten(0, (-1, streams)))
        states = self.hidden_states(by_stream[0], memory, by_stream[1]).flatten(0, 1)
        shown = mask.any(-1, keepdim=True).expand_as(mask) if self.attend_padding else mask
        return self.projection(Features(states, shown, None)).fold_streams(streams)
