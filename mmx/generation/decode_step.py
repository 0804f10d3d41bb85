"""Decoding steps: the last tokens in, the logits of the next tokens out.

Axes: B memories, K streams, N = B*K, T text positions, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmx.errors import MmxError
from mmx.generation.fast_decode import FastDecodeStep, supports_fast_decode
from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.nn.cross_attention import Recorder
from mmx.nn.kv_cache import KVCache


class PromptBatch(NamedTuple):
    """Prompts to continue.

    Attributes:
        tokens: int [B, K, T], padded at the end.
        mask: bool [B, K, T], False for padding.
    """

    tokens: Tensor
    mask: Tensor


class DecodeStep(Protocol):
    """What generation needs of a model."""

    def prefill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Process the prompts [B, K, T], padded at the end; return the logits [N, V] of the next token of each."""
        ...

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append one token to each stream, int [N]; return the logits [N, V] of the next token."""
        ...

    def reorder(self, index: Tensor) -> None:
        """Let stream i continue from stream index[i].

        A stream stays with its memory, and every memory must have equally many streams.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Keep only these memories, int [M], and their streams."""
        ...


class CachedDecodeStep:
    """A decoder over a memory, with a KV cache.

    Args:
        decoder: the text decoder.
        memory: B memories.
        capacity: number of tokens that can be generated after the prompts.
        recorder: receives the queries of every cross-attention layer.
        fast: whether to use `FastDecodeStep` where possible: no gradients, no dropout, no recorder.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        memory: Memory,
        capacity: int,
        recorder: Recorder | None = None,
        fast: bool = True,
    ) -> None:
        self.decoder = decoder
        self.memory = memory
        self.capacity = capacity
        self.recorder = recorder
        self.fast = fast and recorder is None and supports_fast_decode(decoder)
        self._cache: KVCache | None = None
        self._fast_step: FastDecodeStep | None = None

    @property
    def cache(self) -> KVCache:
        """The KV cache. Raises MmxError (code `generation.no_prefill`) before `prefill`."""
        if self._cache is None:
            raise MmxError("the decoding step has no prompts; call prefill first.", code="generation.no_prefill")
        return self._cache

    def prefill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See DecodeStep.prefill. Afterwards `capacity` more tokens fit into the cache."""
        batch, streams, length = tokens.shape
        self._cache = self.decoder.new_cache(batch * streams, length + self.capacity)
        states = self.decoder.hidden_states(tokens, self.memory, mask, self._cache, self.recorder).flatten(0, 1)
        last = mask.flatten(0, 1).sum(-1) - 1
        return self.decoder.logits(states[torch.arange(len(states), device=last.device), last])

    def __call__(self, tokens: Tensor) -> Tensor:
        """See DecodeStep."""
        cache = self.cache
        if self.fast:
            if self._fast_step is None or self._fast_step.memory is not self.memory:
                self._fast_step = FastDecodeStep(self.decoder, self.memory)
            return self._fast_step(tokens, cache)
        tokens = tokens.view(self.memory.batch_size, -1, 1)
        states = self.decoder.hidden_states(tokens, self.memory, cache=cache, recorder=self.recorder)
        return self.decoder.logits(states.flatten(0, 2))

    def reorder(self, index: Tensor) -> None:
        """See DecodeStep. Only the KV cache is reordered, never the memory."""
        self.cache.reorder(index)

    def select(self, rows: Tensor) -> None:
        """See DecodeStep."""
        streams = len(self.cache.mask) // self.memory.batch_size
        self.memory = self.memory.select(rows)
        self.cache.reorder(streams_of_rows(rows, streams))


class UncachedDecodeStep:
    """Slow reference of CachedDecodeStep: processes the whole text again at every step."""

    def __init__(self, decoder: TextDecoder, memory: Memory) -> None:
        self.decoder = decoder
        self.memory = memory
        self.tokens = torch.zeros(0)
        self.mask = torch.zeros(0)

    def prefill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See DecodeStep.prefill."""
        self.tokens = tokens.flatten(0, 1)
        self.mask = mask.flatten(0, 1)
        return self._logits()

    def __call__(self, tokens: Tensor) -> Tensor:
        """See DecodeStep."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens[:, None], dtype=torch.bool)], 1)
        return self._logits()

    def reorder(self, index: Tensor) -> None:
        """See DecodeStep."""
        self.tokens = self.tokens[index]
        self.mask = self.mask[index]

    def select(self, rows: Tensor) -> None:
        """See DecodeStep."""
        self.reorder(streams_of_rows(rows, len(self.tokens) // self.memory.batch_size))
        self.memory = self.memory.select(rows)

    def _logits(self) -> Tensor:
        by_memory = (self.memory.batch_size, -1)
        tokens = self.tokens.unflatten(0, by_memory)
        mask = self.mask.unflatten(0, by_memory)
        states = self.decoder.hidden_states(tokens, self.memory, mask).flatten(0, 1)
        last = self.mask.shape[1] - 1 - self.mask.flip(-1).int().argmax(-1)
        return self.decoder.logits(states[torch.arange(len(states)), last])


def prefill_logits(step: DecodeStep, prompts: PromptBatch) -> Tensor:
    """Process the prompts; return the logits of the first token of each stream, [B*K, V].

    Raises MmxError (generation.not_finite) if they overflow: any token would be as good as another then.
    """
    logits = step.prefill(prompts.tokens, prompts.mask)
    if not bool((logits < float("inf")).all()):  # false for NaN too; minus infinity masks a token
        dtype = str(logits.dtype).removeprefix("torch.")
        raise MmxError(
            f"the logits of the decoder are not finite in {dtype}; check the features of the encoders, or load the "
            "model with dtype float32.",
            code="generation.not_finite",
        )
    return logits


def streams_of_rows(rows: Tensor, streams: int) -> Tensor:
    """Return the indices of all `streams` of each memory in `rows`, int [len(rows) * streams]."""
    return (rows[:, None] * streams + torch.arange(streams, device=rows.device)).flatten()
