"""The question encoder: a question and the memory of the sources to the memory of the decoder.

B memories, K streams (questions about each), T positions of a question.

Source: Li et al. 2022, "BLIP", section 3.1 (image-grounded text encoder) and section 5.4 (visual question answering).
"""

from collections.abc import Mapping, Sequence

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

QUESTION_ENCODER = "question_encoder"  # name of the questions in a batch, and of their slots in a memory


class AbsolutePositionTokenEmbedding(TokenEmbedding):
    """A token embedding whose positions count padding, as `attend_padding` requires: visible padding has positions."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens: int [N, T] -> [N, T, E]; `positions` is replaced by the index in the row."""
        index = torch.arange(tokens.shape[1], device=tokens.device)
        return super().forward(tokens, index.expand_as(positions))


class QuestionEncoder(Transformer):
    """Encodes questions that attend to a memory, and projects the result to keys and values for the decoder.

    Like an encoder of a source, it has `prepare`, `labels` and `collate`.
    """

    def __init__(self, config: QuestionEncoderConfig, decoder: DecoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, len(tokenizer), causal=False)
        self.tokenizer = tokenizer
        self.prefix_token_ids = list(config.prefix_token_ids)
        self.suffix_token_ids = list(config.suffix_token_ids)
        self.attend_padding = config.attend_padding
        if config.attend_padding:
            self.embedding = AbsolutePositionTokenEmbedding(config, self.vocab_size)
        init_weights(self, config.num_layers)
        self.projection = KeyValueProjection(config.projection, decoder, config.hidden_size, 1, QUESTION_ENCODER)

    def prepare(self, raw: object) -> dict[str, Tensor]:
        """Convert a question to {"tokens": int [T], "mask": bool [T]}. Raises MmxError if it is too long."""
        tokens = [*self.prefix_token_ids, *self.tokenizer.encode(str(raw)), *self.suffix_token_ids]
        maximum = self.config.max_position_embeddings
        if len(tokens) > maximum:
            raise MmxError(
                f"the question has {len(tokens)} tokens, and this model reads up to {maximum}; shorten the question.",
                code="question.too_long",
                length=len(tokens),
                maximum=maximum,
            )
        return {"tokens": torch.tensor(tokens), "mask": torch.ones(len(tokens), dtype=torch.bool)}

    def labels(self, raw: object) -> list[str]:
        """Return the text of each token of a question."""
        return [self.tokenizer.decode([token]) for token in self.prepare(raw)["tokens"].tolist()]

    def collate(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Pad questions at the end to a batch {"tokens": int [n, T], "mask": bool [n, T]}."""
        pad_sequence = nn.utils.rnn.pad_sequence
        tokens = pad_sequence([item["tokens"] for item in prepared], True, self.tokenizer.pad_token_id)
        mask = pad_sequence([item["mask"] for item in prepared], True, False)
        return {"tokens": tokens, "mask": mask}

    def forward(self, questions: Mapping[str, Tensor], rows: Tensor, memory: Memory, streams: int) -> Memory:
        """Encode n questions over a memory.

        Args:
            questions: {"tokens": int [n, T], "mask": bool [n, T]}.
            rows: int [n], the index of each question among B*K.
            memory: memory of the sources, B rows.
            streams: K.

        Returns:
            A memory of B rows and K*T slots, of which stream k attends to its own question only.
        """
        num_questions = memory.batch_size * streams
        length = questions["tokens"].shape[1]
        tokens = questions["tokens"].new_full((num_questions, length), self.tokenizer.pad_token_id)
        tokens = tokens.index_copy(0, rows, questions["tokens"])
        mask = questions["mask"].new_zeros(num_questions, length).index_copy(0, rows, questions["mask"])
        states = self.hidden_states(
            tokens.unflatten(0, (-1, streams)), memory, mask.unflatten(0, (-1, streams))
        ).flatten(0, 1)
        visible = mask.any(-1, keepdim=True).expand_as(mask) if self.attend_padding else mask
        return self.projection(Features(states, visible)).fold_streams(streams)
