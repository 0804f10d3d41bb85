"""The text decoder: tokens and a memory to logits. It has no key or value weights for cross-attention of its own.

B memories, K streams, T text positions, E hidden size, V vocabulary. Masks: True = may be attended.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmx.config.schema import DecoderConfig
from mmx.memory import Memory
from mmx.nn.cross_attention import Recorder
from mmx.nn.kv_cache import KVCache
from mmx.nn.layers import ACTIVATIONS, build_norm, init_weights
from mmx.nn.prepack import MIN_NUMEL, PrepackedLinear, PrepackKind, prepack, prepack_linear
from mmx.nn.transformer import Transformer


class LMHead(nn.Module):
    """Hidden states to logits over the vocabulary. A tied head uses the weight of the token embedding."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = None
        if not config.tie_word_embeddings:
            self.weight = nn.Parameter(torch.randn(vocab_size, config.hidden_size) * 0.02)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if config.lm_head_bias else None
        self.transform = LMHeadTransform(config) if config.lm_head_transform else nn.Identity()
        self.prepacked: PrepackedLinear | None = None  # a copy of weight and bias; not part of the state_dict

    def forward(self, states: Tensor, embedding: Tensor) -> Tensor:
        """states: [..., E], embedding: [V, E] -> [..., V]."""
        states = self.transform(states)
        if self.prepacked is not None:
            return self.prepacked(states)
        return F.linear(states, embedding if self.weight is None else self.weight, self.bias)

    def prepack(self, embedding: Tensor, kind: PrepackKind) -> None:
        """Prepack a copy of the weight, see `mmx.nn.prepack`; the embedding itself is still needed to embed tokens."""
        weight = embedding if self.weight is None else self.weight
        self.prepacked = prepack_linear(weight, self.bias, kind, persistent=False)


class LMHeadTransform(nn.Module):
    """Linear layer, activation and norm before the logits (the head of BERT, Devlin et al. 2019)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = build_norm(config.norm, config.hidden_size, config.norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return self.norm(self.activation(self.dense(states)))


class TextDecoder(Transformer):
    """A transformer with cross-attention to a memory, and an output projection."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.lm_head = LMHead(config, self.vocab_size)
        init_weights(self, config.num_layers)

    def forward(
        self,
        tokens: Tensor,
        memory: Memory,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
        visibility: Tensor | None = None,
    ) -> Tensor:
        """Return the logits [B, K, T, V] of the token after each position. Arguments as in `hidden_states`."""
        return self.logits(self.hidden_states(tokens, memory, mask, cache, recorder, visibility))

    def logits(self, states: Tensor) -> Tensor:
        """[..., E] -> [..., V]."""
        return self.lm_head(states, self.embedding.weight)

    @property
    def is_prepacked(self) -> bool:
        """Whether `prepack` was called; the weights can then no longer be trained or cast."""
        return any(isinstance(module, PrepackedLinear) for module in self.modules())

    def prepack(self, kind: PrepackKind) -> None:
        """Prepack every large linear layer for inference on a CPU, see `mmx.nn.prepack`."""
        prepack(self, kind)
        if self.embedding.weight.numel() >= MIN_NUMEL:
            self.lm_head.prepack(self.embedding.weight, kind)

    def new_cache(self, streams: int, capacity: int) -> KVCache:
        """Return an empty cache for N `streams` of up to `capacity` tokens."""
        config = self.config
        weight = self.embedding.weight
        return KVCache.allocate(config.num_layers, streams, config.num_kv_heads, capacity, config.head_dim, weight)
