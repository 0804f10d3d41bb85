"""Stand-ins that the tests of decoding share: a step that is a table, a model whose texts differ."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmx.memory import Memory
from mmx.models.model import Model
from mmx.testing import tiny_model


class Chain:
    """A step of twenty lines: logits [B, V, V, V] of a memory, the token before and the last one (so order matters)."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.batch, self.calls = table, len(table), 0

    def prefill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        tokens, last = tokens.flatten(0, 1), mask.flatten(0, 1).sum(-1) - 1
        rows = torch.arange(len(tokens))
        self.memory, self.before, self.last = rows // mask.shape[1], tokens[rows, last - 1], tokens[rows, last]
        return self.table[self.memory, self.before, self.last]

    def __call__(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        self.before, self.last = self.last, tokens
        return self.table[self.memory, self.before, self.last]

    def reorder(self, index: Tensor) -> None:
        assert torch.equal(self.memory[index].unique(), self.memory.unique())
        self.memory, self.before, self.last = self.memory[index], self.before[index], self.last[index]

    def keep(self, rows: Tensor) -> None:
        each = len(self.last) // self.batch
        self.reorder_freely((rows[:, None] * each + torch.arange(each)).flatten())
        self.batch = len(rows)

    def reorder_freely(self, index: Tensor) -> None:
        self.memory, self.before, self.last = self.memory[index], self.before[index], self.last[index]


def chain(vocabulary: int, memories: int = 1, seed: int = 0, loud: float = 1.0) -> Chain:
    generator = torch.Generator().manual_seed(seed)
    return Chain(torch.randn(memories, *[vocabulary] * 3, generator=generator) * loud)


def prompts(rows: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """Prompts [B][K] of unequal lengths -> tokens and mask [B, K, T], padded at the end."""
    longest = max(len(prompt) for row in rows for prompt in row)
    tokens = torch.tensor([[[*p, *[0] * (longest - len(p))] for p in row] for row in rows])
    lengths = torch.tensor([[len(p) for p in row] for row in rows])
    return tokens, torch.arange(longest) < lengths[..., None]


def loud_model(**decoder: object) -> Model:
    """A tiny model over lists of numbers that has something else to say about each of them."""
    model = tiny_model(**decoder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "positions" not in name:
                weight.mul_(6.0)
    return model


def numbers(count: int, seed: int = 0) -> list[list[float]]:
    """Inputs of 1 to 9 numbers."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (count,), generator=generator).tolist()
    return [torch.randn(n, generator=generator).tolist() for n in lengths]


def remember(model: Model, raw: Sequence[list[float]]) -> Memory:
    with torch.no_grad():
        return model.encode({"numbers": model.collate("numbers", raw)}, len(raw))
