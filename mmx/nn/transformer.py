"""What looks: blocks that attend to their own text and to a memory. The decoder is made of it, and the reader.

Alphabet: B memories, K streams, N = B*K, T text positions, S source slots, L layers, H heads, D head width, E width.
Masks: True = may be attended. The cache and the recorder are arguments; nothing here keeps state.
"""

import torch
from torch import Tensor, nn

from mmx.config.schema import LookingConfig
from mmx.errors import MmxError
from mmx.memory import Memory
from mmx.nn.attention import attend, fold_streams, unfold_streams
from mmx.nn.kv_cache import KeyValueCache
from mmx.nn.layers import (
    Past,
    SelfAttention,
    TanhGate,
    TokenEmbedding,
    build_feed_forward,
    build_norm,
    build_residual,
    merge_heads,
    real_positions,
    split_heads,
)
from mmx.nn.relative_position import Recorder, RelativeBias, Sight, distances, opened


class CrossAttention(nn.Module):
    """Ask the memory: queries from the text, keys and values as they stand in the memory."""

    def __init__(self, config: LookingConfig, index: int) -> None:
        super().__init__()
        self.heads, self.index, inner = config.heads, index, config.heads * config.head_size
        self.query = nn.Linear(config.width, inner, bias=config.biases)
        self.out = nn.Linear(inner, config.width, bias=config.biases)

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        memory = sight.memory
        queries = fold_streams(split_heads(self.query(x), self.heads), memory.batch)
        if sight.recorder is not None:
            sight.recorder.note(self.index, queries, sight)
        keys, values = memory.layer(self.index)
        read = attend(queries, keys.to(queries.dtype), values.to(queries.dtype), sight.mask, sight.bias)
        return self.out(merge_heads(unfold_streams(read, len(x) // memory.batch)))


class LookingBlock(nn.Module):
    """Speak to yourself, look at the memory (in a looking block), think it over."""

    def __init__(self, config: LookingConfig, looking: int | None) -> None:
        super().__init__()
        self.self_attention, self.self_residual = SelfAttention(config), build_residual(config)
        self.cross_attention: CrossAttention | None = None
        if looking is not None:
            self.cross_attention = CrossAttention(config, looking)
            self.cross_residual = build_residual(config, TanhGate() if config.gate == "tanh" else None)
        self.feed_forward, self.feed_residual = build_feed_forward(config), build_residual(config)

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor, past: Past | None, sight: Sight) -> Tensor:
        """[N, T, E] -> [N, T, E]."""
        x = self.self_residual(x, lambda y: self.self_attention(y, mask, positions, past))
        look = self.cross_attention
        if look is not None:
            x = self.cross_residual(x, lambda y: look(y, sight))
        return self.feed_residual(x, self.feed_forward)


class LookingStack(nn.Module):
    """Embedding, blocks, norm: tokens and a memory in, states out."""

    def __init__(self, config: LookingConfig, vocabulary: int) -> None:
        super().__init__()
        self.config, self.vocabulary = config, config.table or vocabulary
        self.embedding = TokenEmbedding(config, self.vocabulary)
        looking = {block: order for order, block in enumerate(config.looking)}
        self.blocks = nn.ModuleList(LookingBlock(config, looking.get(i)) for i in range(config.layers))
        final = config.norm if config.norm_placement == "pre" else "none"
        self.norm = build_norm(final, config.width, config.norm_eps)
        relative = config.cross_positions == "relative"
        self.distance_bias = RelativeBias(config.heads, config.cross_reach) if relative else None

    def states(
        self,
        tokens: Tensor,
        memory: Memory,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
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
        positions = real_positions(held)[:, -length:]
        may_attend = _attendable(held, length, causal)
        sight = self.sight(memory, positions, visibility, recorder)
        x = self.embedding(tokens, positions)
        for index, block in enumerate(self.blocks):
            past = None if cache is None else cache.layer(index)
            x = block(x, may_attend, positions, past, sight)
        if cache is not None:
            cache.advance(length)
        return self.norm(x).unflatten(0, (batch, streams))

    def sight(
        self, memory: Memory, positions: Tensor, visibility: Tensor | None = None, recorder: Recorder | None = None
    ) -> Sight:
        """What texts at these positions, int [N, T], look at."""
        streams, length = len(positions) // memory.batch, positions.shape[1]
        mask, config = memory.attendable(streams, length, visibility), self.config
        if config.wait_k is None and self.distance_bias is None:
            return Sight(memory, mask, None, recorder)
        apart = distances(positions, memory)
        if config.wait_k is not None:
            open_ = opened(apart, config.wait_k)
            mask = open_ if mask is None else mask & open_
        return Sight(memory, mask, None if self.distance_bias is None else self.distance_bias(apart), recorder)

    def _check_fit(self, memory: Memory, batch: int) -> None:
        """Without this a memory of fewer rows would be shared out as streams, and a foreign one read layer by layer."""
        layers, rows, heads, _, width = memory.keys.shape
        config, looking = self.config, len(self.config.looking)
        if layers not in (1, looking) or (rows, heads, width) != (batch, config.heads, config.head_size):
            raise MmxError(
                f"the memory is [L, B, H, D] {[layers, rows, heads, width]}, expected "
                f"{[looking, batch, config.heads, config.head_size]}; encode with this model, a row for each of tokens."
            )

    def empty_memory(self, batch: int) -> Memory:
        """Nothing to see, for `batch` rows: what would be said without looking."""
        config, like = self.config, self.embedding.table
        return Memory.empty(
            len(config.looking), batch, config.heads, config.head_size, dtype=like.dtype, device=like.device
        )


def _attendable(held: Tensor, length: int, causal: bool) -> Tensor | None:
    """bool [N, 1, T or 1, held]: which of their own text's positions the last T may attend; None for all of them."""
    if length == 1 and held.device.type == "cpu" and bool(held.all()):  # on a GPU it would cost more than it saves
        return None
    return _causal(held, length) if causal else held[:, None, None]


def _causal(held: Tensor, length: int) -> Tensor:
    """bool [N, 1, T, held]: the last `length` positions see themselves and what came before, padding excepted.

    A padded position keeps itself, so that no row of the kernel is empty; nobody else sees it.
    """
    total = held.shape[1]
    rows = torch.arange(total - length, total, device=held.device)[:, None]
    columns = torch.arange(total, device=held.device)
    return (((columns <= rows) & held[:, None]) | (columns == rows)).unsqueeze(1)
