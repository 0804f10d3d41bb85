"""One step of decoding: the last tokens in, the scores of the next ones out. Streams may be regrouped between steps.

Alphabet: B memories, K streams, N = B*K, T text positions, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mmx.generation.fast_decode import FastDecodeStep, supports_fast_decode
from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.nn.kv_cache import KVCache
from mmx.nn.relative_position import Recorder


class DecodeStep(Protocol):
    """What generation needs of a model; a fake of twenty lines is enough to test a chooser."""

    def prefill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Read the prompts [B, K, T] (mask False: padding, at the end); return logits [N, V] of what follows each."""
        ...

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append one token to each stream, int [N]; return logits [N, V]."""
        ...

    def reorder(self, index: Tensor) -> None:
        """Let stream i continue from stream index[i]. Each stays with its memory; each memory keeps equally many."""
        ...

    def select(self, rows: Tensor) -> None:
        """Go on with these memories only, and with their streams."""
        ...


class DecoderStep:
    """The real step: a decoder over a memory, with a cache for what was said; `unrolled` where nothing is recorded."""

    def __init__(
        self,
        decoder: TextDecoder,
        memory: Memory,
        capacity: int,
        recorder: Recorder | None = None,
        unrolled: bool = True,
    ) -> None:
        self.decoder, self.memory, self.capacity, self.recorder = decoder, memory, capacity, recorder
        self.unrolled = unrolled and recorder is None and supports_fast_decode(decoder)
        self.cache: KVCache | None = None
        self.one_token: FastDecodeStep | None = None

    def prefill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See Step.prefill; after it `capacity` more tokens fit."""
        batch, streams, length = tokens.shape
        self.cache = self.decoder.new_cache(batch * streams, length + self.capacity)
        states = self.decoder.hidden_states(tokens, self.memory, mask, self.cache, self.recorder).flatten(0, 1)
        last = mask.flatten(0, 1).sum(-1) - 1
        return self.decoder.logits(states[torch.arange(len(states), device=last.device), last])

    def __call__(self, tokens: Tensor) -> Tensor:
        """See Step."""
        assert self.cache is not None, "prefill comes first"
        if self.unrolled:
            if self.one_token is None or self.one_token.memory is not self.memory:
                self.one_token = FastDecodeStep(self.decoder, self.memory)
            return self.one_token(tokens, self.cache)
        tokens = tokens.view(self.memory.batch_size, -1, 1)
        states = self.decoder.hidden_states(tokens, self.memory, cache=self.cache, recorder=self.recorder)
        return self.decoder.logits(states.flatten(0, 2))

    def reorder(self, index: Tensor) -> None:
        """See Step. Only the self-attention cache moves; the memory stands still."""
        assert self.cache is not None, "prefill comes first"
        self.cache.reorder(index)

    def select(self, rows: Tensor) -> None:
        """See Step."""
        assert self.cache is not None, "prefill comes first"
        streams = len(self.cache.mask) // self.memory.batch_size
        self.memory = self.memory.select(rows)
        self.cache.reorder((rows[:, None] * streams + torch.arange(streams, device=rows.device)).flatten())


class UncachedStep:
    """The slow twin of DecoderStep: reads everything again at every step. For tests, and for measuring the cache."""

    def __init__(self, decoder: TextDecoder, memory: Memory) -> None:
        self.decoder, self.memory = decoder, memory
        self.tokens = self.mask = torch.zeros(0)

    def prefill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See Step.prefill."""
        self.tokens, self.mask = tokens.flatten(0, 1), mask.flatten(0, 1)
        return self._logits()

    def __call__(self, tokens: Tensor) -> Tensor:
        """See Step."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens[:, None], dtype=torch.bool)], 1)
        return self._logits()

    def reorder(self, index: Tensor) -> None:
        """See Step."""
        self.tokens, self.mask = self.tokens[index], self.mask[index]

    def select(self, rows: Tensor) -> None:
        """See Step."""
        split = (t.unflatten(0, (self.memory.batch_size, -1))[rows].flatten(0, 1) for t in (self.tokens, self.mask))
        self.tokens, self.mask = split
        self.memory = self.memory.select(rows)

    def _logits(self) -> Tensor:
        tokens, mask = (t.unflatten(0, (self.memory.batch_size, -1)) for t in (self.tokens, self.mask))
        states = self.decoder.hidden_states(tokens, self.memory, mask).flatten(0, 1)
        last = self.mask.shape[1] - 1 - self.mask.flip(-1).int().argmax(-1)
        return self.decoder.logits(states[torch.arange(len(states)), last])
