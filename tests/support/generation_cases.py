"""Shared by the tests of generation: a decoding step that is a table, a model whose texts differ."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmx.generation import PromptBatch
from mmx.memory import Memory
from mmx.models.batching import pad_texts
from mmx.models.model import Model
from mmx.testing import tiny_model


class TableStep:
    """A decoding step without a model: logits [B, V, V, V] by memory, previous token and last token."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.batch = len(table)
        self.calls = 0

    def prefill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        tokens = tokens.flatten(0, 1)
        end = mask.flatten(0, 1).sum(-1) - 1
        rows = torch.arange(len(tokens))
        self.memory = rows // mask.shape[1]
        self.previous = tokens[rows, end - 1]
        self.last = tokens[rows, end]
        return self._logits()

    def __call__(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        self.previous = self.last
        self.last = tokens
        return self._logits()

    def reorder(self, index: Tensor) -> None:
        assert torch.equal(self.memory[index].unique(), self.memory.unique())
        self._index(index)

    def select(self, rows: Tensor) -> None:
        streams = len(self.last) // self.batch
        self._index((rows[:, None] * streams + torch.arange(streams)).flatten())
        self.batch = len(rows)

    def _index(self, index: Tensor) -> None:
        self.memory = self.memory[index]
        self.previous = self.previous[index]
        self.last = self.last[index]

    def _logits(self) -> Tensor:
        return self.table[self.memory, self.previous, self.last]


def random_table_step(vocab_size: int, memories: int = 1, seed: int = 0, scale: float = 1.0) -> TableStep:
    generator = torch.Generator().manual_seed(seed)
    return TableStep(torch.randn(memories, *[vocab_size] * 3, generator=generator) * scale)


def pad_prompts(rows: Sequence[Sequence[list[int]]]) -> PromptBatch:
    """Prompts [B][K] of unequal lengths -> [B, K, T], padded at the end."""
    texts = [[(prompt, [0]) for prompt in row] for row in rows]
    padded = pad_texts(texts, len(rows[0]), 0)
    return PromptBatch(padded.tokens, padded.mask)


def varied_model(**decoder: object) -> Model:
    """A tiny model over lists of numbers with large weights, so that its texts differ from input to input."""
    model = tiny_model(**decoder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "positions" not in name:
                weight.mul_(6.0)
    return model


def random_inputs(count: int, seed: int = 0) -> list[list[float]]:
    """Inputs of 1 to 9 numbers."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (count,), generator=generator).tolist()
    return [torch.randn(length, generator=generator).tolist() for length in lengths]


def encode_inputs(model: Model, inputs: Sequence[list[float]]) -> Memory:
    with torch.no_grad():
        return model.encode({"numbers": model.collate("numbers", inputs)}, len(inputs))
