"""TextDecoder: tokens and Memory in, logits out. It has queries and outputs, and no cross keys or values of its own.

Alphabet: B memories, K streams, N = B*K, T text positions, S source slots, L layers, H heads, D head width, E width,
V vocabulary. Masks: True = may be attended. The cache and the recorder are arguments; the decoder keeps no state.
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
    """States to scores over the vocabulary; `table` is the embedding when tied, its own matrix otherwise."""

    def __init__(self, config: DecoderConfig, vocabulary: int) -> None:
        super().__init__()
        self.weight = (
            None if config.tie_word_embeddings else nn.Parameter(torch.randn(vocabulary, config.hidden_size) * 0.02)
        )
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if config.lm_head_bias else None
        self.transform = LMHeadTransform(config) if config.lm_head_transform else nn.Identity()
        self.prepacked: PrepackedLinear | None = None  # a copy of weight and bias; not part of the state_dict

    def forward(self, states: Tensor, embedding: Tensor) -> Tensor:
        """[..., E] -> [..., V]."""
        states = self.transform(states)
        if self.prepacked is not None:
            return self.prepacked(states)
        return F.linear(states, embedding if self.weight is None else self.weight, self.bias)

    def prepack(self, embedding: Tensor, kind: PrepackKind) -> None:
        """Prepack a copy of the weight, see `mmx.nn.prepack`; the embedding stays as it is for looking up tokens."""
        weight = embedding if self.weight is None else self.weight
        self.prepacked = prepack_linear(weight, self.bias, kind, persistent=False)


class LMHeadTransform(nn.Module):
    """Dense, activation, norm before the scores (Devlin et al. 2019, the masked-language-model head)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.dense, self.activation = nn.Linear(config.hidden_size, config.hidden_size), ACTIVATIONS[config.activation]
        self.norm = build_norm(config.norm, config.hidden_size, config.norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return self.norm(self.activation(self.dense(states)))


class TextDecoder(Transformer):
    """A stack that looks, and a head that speaks."""

    def __init__(self, config: DecoderConfig, vocabulary: int) -> None:
        super().__init__(config, vocabulary)
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
        """Return the logits [B, K, T, V] of what follows each token; the arguments as in `states`."""
        return self.logits(self.hidden_states(tokens, memory, mask, cache, recorder, visibility))

    def logits(self, states: Tensor) -> Tensor:
        """[..., E] -> [..., V]."""
        return self.lm_head(states, self.embedding.weight)

    @property
    def is_prepacked(self) -> bool:
        """Whether `pack` was called: its weights then stay as they are."""
        return any(isinstance(module, PrepackedLinear) for module in self.modules())

    def prepack(self, kind: PrepackKind) -> None:
        """For inference on a CPU: every large map in the layout that is fastest to read, see `mmx.nn.prepack`."""
        prepack(self, kind)
        if self.embedding.weight.numel() >= MIN_NUMEL:
            self.lm_head.prepack(self.embedding.weight, kind)

    def new_cache(self, streams: int, capacity: int) -> KVCache:
        """An empty cache for N `streams` of up to `capacity` tokens."""
        config, like = self.config, self.embedding.weight
        return KVCache.allocate(config.num_layers, streams, config.num_kv_heads, capacity, config.head_dim, like)
