"""TextDecoder: tokens and Memory in, logits out. It has queries and outputs, and no cross keys or values of its own.

Alphabet: B memories, K streams, N = B*K, T text positions, S source slots, L layers, H heads, D head width, E width,
V vocabulary. Masks: True = may be attended. The cache and the recorder are arguments; the decoder keeps no state.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmx.config.schema import DecoderConfig
from mmx.memory import Memory
from mmx.nn.kv_cache import KeyValueCache
from mmx.nn.layers import ACTIVATIONS, build_norm, initialise
from mmx.nn.prepack import LEAST, PackedLinear, Packing, pack, packed
from mmx.nn.relative_position import Recorder
from mmx.nn.transformer import LookingStack


class Head(nn.Module):
    """States to scores over the vocabulary; `table` is the embedding when tied, its own matrix otherwise."""

    def __init__(self, config: DecoderConfig, vocabulary: int) -> None:
        super().__init__()
        self.table = None if config.tied_embeddings else nn.Parameter(torch.randn(vocabulary, config.width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if config.head_bias else None
        self.transform = HeadTransform(config) if config.head_transform else nn.Identity()
        self.scores: Callable[[Tensor], Tensor] | None = None  # the same maps packed; no part of what is saved

    def forward(self, states: Tensor, embedding: Tensor) -> Tensor:
        """[..., E] -> [..., V]."""
        states = self.transform(states)
        if self.scores is not None:
            return self.scores(states)
        return F.linear(states, embedding if self.table is None else self.table, self.bias)

    def pack(self, embedding: Tensor, kind: Packing) -> None:
        """Lay the scores out for speaking, beside the embedding, whose rows are still looked up."""
        self.scores = packed(embedding if self.table is None else self.table, self.bias, kind).forward


class HeadTransform(nn.Module):
    """Dense, activation, norm before the scores (Devlin et al. 2019, the masked-language-model head)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.dense, self.activation = nn.Linear(config.width, config.width), ACTIVATIONS[config.feed_forward]
        self.norm = build_norm(config.norm, config.width, config.norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return self.norm(self.activation(self.dense(states)))


class TextDecoder(LookingStack):
    """A stack that looks, and a head that speaks."""

    def __init__(self, config: DecoderConfig, vocabulary: int) -> None:
        super().__init__(config, vocabulary)
        self.head = Head(config, self.vocabulary)
        initialise(self, config.layers)

    def forward(
        self,
        tokens: Tensor,
        memory: Memory,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        recorder: Recorder | None = None,
        visibility: Tensor | None = None,
    ) -> Tensor:
        """Return the logits [B, K, T, V] of what follows each token; the arguments as in `states`."""
        return self.logits(self.states(tokens, memory, mask, cache, recorder, visibility))

    def logits(self, states: Tensor) -> Tensor:
        """[..., E] -> [..., V]."""
        return self.head(states, self.embedding.table)

    @property
    def is_packed(self) -> bool:
        """Whether `pack` was called: its weights then stay as they are."""
        return self.head.scores is not None or any(isinstance(part, PackedLinear) for part in self.modules())

    def pack(self, kind: Packing) -> None:
        """For inference on a CPU: every large map in the layout that is fastest to read, see `mmx.nn.prepack`."""
        pack(self, kind)
        if self.embedding.table.numel() >= LEAST:
            self.head.pack(self.embedding.table, kind)

    def new_cache(self, streams: int, capacity: int) -> KeyValueCache:
        """An empty cache for N `streams` of up to `capacity` tokens."""
        config, like = self.config, self.embedding.table
        return KeyValueCache.allocate(config.layers, streams, config.key_heads, capacity, config.head_size, like)
