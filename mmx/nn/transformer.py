"""What looks: blocks that attend to their own text and to a memory. The decoder is made of it, and the reader.

Alphabet: B memories, K streams, N = B*K, T text positions, S source slots, L layers, H heads, D head width, E width.
Masks: True = may be attended. The cache and the recorder are arguments; nothing here keeps state.
"""

import torch
from torch import Tensor, nn

from mmx.config.schema import TransformerConfig
from mmx.errors import MmxError
from mmx.memory import Memory
from mmx.nn.attention import attention, fold_streams, unfold_streams
from mmx.nn.kv_cache import KVCache
from mmx.nn.layers import (
    PastKeyValues,
    SelfAttention,
    TanhGate,
    TokenEmbedding,
    build_feed_forward,
    build_norm,
    build_residual,
    merge_heads,
    position_ids_from_mask,
    split_heads,
)
from mmx.nn.relative_position import (
    CrossAttentionInputs,
    Recorder,
    RelativePositionBias,
    relative_distances,
    wait_k_mask,
)


class CrossAttention(nn.Module):
    """Ask the memory: queries from the text, keys and values as they stand in the memory."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        self.num_heads, self.index, inner = config.num_heads, index, config.num_heads * config.head_dim
        self.query = nn.Linear(config.hidden_size, inner, bias=config.bias)
        self.out = nn.Linear(inner, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, sight: CrossAttentionInputs) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        memory = sight.memory
        queries = fold_streams(split_heads(self.query(x), self.num_heads), memory.batch_size)
        if sight.recorder is not None:
            sight.recorder.record(self.index, queries, sight)
        keys, values = memory.layer(self.index)
        read = attention(queries, keys.to(queries.dtype), values.to(queries.dtype), sight.mask, sight.bias)
        return self.out(merge_heads(unfold_streams(read, len(x) // memory.batch_size)))


class DecoderLayer(nn.Module):
    """Speak to yourself, look at the memory (in a looking block), think it over."""

    def __init__(self, config: TransformerConfig, looking: int | None) -> None:
        super().__init__()
        self.self_attention, self.self_residual = SelfAttention(config), build_residual(config)
        self.cross_attention: CrossAttention | None = None
        if looking is not None:
            self.cross_attention = CrossAttention(config, looking)
            self.cross_residual = build_residual(config, TanhGate() if config.gate == "tanh" else None)
        self.feed_forward, self.feed_residual = build_feed_forward(config), build_residual(config)

    def forward(
        self, x: Tensor, mask: Tensor | None, positions: Tensor, past: PastKeyValues | None, sight: CrossAttentionInputs
    ) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        x = self.self_residual(x, lambda y: self.self_attention(y, mask, positions, past))
        look = self.cross_attention
        if look is not None:
            x = self.cross_residual(x, lambda y: look(y, sight))
        return self.feed_residual(x, self.feed_forward)


class Transformer(nn.Module):
    """Embedding, blocks, norm: tokens and a memory in, states out."""

    def __init__(self, config: TransformerConfig, vocabulary: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, config.padded_vocab_size or vocabulary
        self.embedding = TokenEmbedding(config, self.vocab_size)
        looking = {block: order for order, block in enumerate(config.cross_attention_layers)}
        self.layers = nn.ModuleList(DecoderLayer(config, looking.get(i)) for i in range(config.num_layers))
        final = config.norm if config.norm_placement == "pre" else "none"
        self.norm = build_norm(final, config.hidden_size, config.norm_eps)
        relative = config.cross_attention_positions == "relative"
        self.relative_position_bias = (
            RelativePositionBias(config.num_heads, config.max_relative_distance) if relative else None
        )

    def hidden_states(
        self,
        tokens: Tensor,
        memory: Memory,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        recorder: Recorder | None = None,
        visibility: Tensor | None = None,
        causal: bool = True,
    ) -> Tensor:
        """Return what each token has become, [B, K, T, E].

        tokens: int [B, K, T], K texts over each memory; mask: bool [B, K, T], False where a token is padding;
        cache: continues what it holds and is extended in place; visibility: bool [T, S], which slots each position may
        see; causal: no token sees what comes after it. Raises MmxError for a memory of another model.
        """
        batch, streams, length = tokens.shape
        self._check_fit(memory, batch)
        tokens = tokens.flatten(0, 1)
        exists = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.flatten(0, 1)
        held = exists if cache is None else cache.extend_mask(exists)
        positions = position_ids_from_mask(held)[:, -length:]
        may_attend = _self_attention_mask(held, length, causal)
        sight = self.cross_attention_inputs(memory, positions, visibility, recorder)
        x = self.embedding(tokens, positions)
        for index, block in enumerate(self.layers):
            past = None if cache is None else cache.layer(index)
            x = block(x, may_attend, positions, past, sight)
        if cache is not None:
            cache.advance(length)
        return self.norm(x).unflatten(0, (batch, streams))

    def cross_attention_inputs(
        self, memory: Memory, positions: Tensor, visibility: Tensor | None = None, recorder: Recorder | None = None
    ) -> CrossAttentionInputs:
        """What texts at these positions, int [N, T], look at."""
        streams, length = len(positions) // memory.batch_size, positions.shape[1]
        mask, config = memory.cross_attention_mask(streams, length, visibility), self.config
        if config.wait_k is None and self.relative_position_bias is None:
            return CrossAttentionInputs(memory, mask, None, recorder)
        apart = relative_distances(positions, memory)
        if config.wait_k is not None:
            open_ = wait_k_mask(apart, config.wait_k)
            mask = open_ if mask is None else mask & open_
        return CrossAttentionInputs(
            memory, mask, None if self.relative_position_bias is None else self.relative_position_bias(apart), recorder
        )

    def _check_fit(self, memory: Memory, batch: int) -> None:
        """Without this a memory of fewer rows would be shared out as streams, and a foreign one read layer by layer."""
        layers, rows, heads, _, width = memory.keys.shape
        config, looking = self.config, len(self.config.cross_attention_layers)
        if layers not in (1, looking) or (rows, heads, width) != (batch, config.num_heads, config.head_dim):
            raise MmxError(
                f"the memory is [L, B, H, D] {[layers, rows, heads, width]}, expected "
                f"{[looking, batch, config.num_heads, config.head_dim]}; encode with this model, a row for each of tokens."
            )

    def empty_memory(self, batch: int) -> Memory:
        """Nothing to see, for `batch` rows: what would be said without looking."""
        config, like = self.config, self.embedding.weight
        return Memory.empty(
            len(config.cross_attention_layers),
            batch,
            config.num_heads,
            config.head_dim,
            dtype=like.dtype,
            device=like.device,
        )


def _self_attention_mask(held: Tensor, length: int, causal: bool) -> Tensor | None:
    """bool [N, 1, T or 1, held]: which of their own text's positions the last T may attend; None for all of them."""
    if length == 1 and held.device.type == "cpu" and bool(held.all()):  # on a GPU it would cost more than it saves
        return None
    return _causal_mask(held, length) if causal else held[:, None, None]


def _causal_mask(held: Tensor, length: int) -> Tensor:
    """bool [N, 1, T, held]: the last `length` positions see themselves and what came before, padding excepted.

    A padded position keeps itself, so that no row of the kernel is empty; nobody else sees it.
    """
    total = held.shape[1]
    rows = torch.arange(total - length, total, device=held.device)[:, None]
    columns = torch.arange(total, device=held.device)
    return (((columns <= rows) & held[:, None]) | (columns == rows)).unsqueeze(1)
