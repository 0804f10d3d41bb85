"""KeyValueProjection: the features of one source become its share of a Memory.

Alphabet: B rows, S slots, F feature width, L looking layers, H heads, D head width.

Positions go on the keys (where to look); values stay content (what is handed over). The bias of the keys is the
source's tag: among the keys of one source it moves every score alike and changes nothing, but beside the keys of
another source, after a join, it tells them apart.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmx.config.schema import ProjectionConfig, TransformerConfig
from mmx.errors import EncoderError
from mmx.memory import Memory, Segment
from mmx.nn.features import Features
from mmx.nn.layers import Dropout, build_norm
from mmx.nn.position_embedding import LearnedPositionEmbedding, NoPositionEmbedding, SinusoidalPositionEmbedding


class KeyPositionEmbedding(nn.Module):
    """Where a slot stands: along the sequence, or along the rows and columns of its grid."""

    def __init__(self, kind: str, dimensions: int, count: int, width: int) -> None:
        super().__init__()
        schemes: dict[str, Callable[[], nn.Module]] = {
            "none": NoPositionEmbedding,
            "learned": lambda: LearnedPositionEmbedding(count, width),
            "sinusoidal": lambda: SinusoidalPositionEmbedding(width),
        }
        self.count = count if kind == "learned" else None
        self.along = nn.ModuleList(schemes[kind]() for _ in range(dimensions))

    def forward(self, features: Features, source: str) -> Tensor | float:
        """What is added to the features [B, S, F] before they become keys; slots of the whole input get none."""
        slots, device = features.states.shape[1], features.states.device
        if len(self.along) == 1:
            self._fits(slots, source)
            return self.along[0](torch.arange(slots, device=device))
        rows, columns = features.grid or (0, 0)
        self._fits(max(rows, columns), source)
        by_row, by_column = (scheme(torch.arange(n, device=device)) for scheme, n in zip(self.along, (rows, columns)))
        if isinstance(by_row, float):
            return 0.0
        cells = (by_row[:, None] + by_column[None]).flatten(0, 1)
        return nn.functional.pad(cells, (0, 0, slots - len(cells), 0))

    def _fits(self, needed: int, source: str) -> None:
        if self.count is not None and needed > self.count:
            raise EncoderError(
                f"source {source!r} gave {needed} positions, its projection has {self.count} learned ones; "
                f"set model.sources.{source}.projection.max_position_embeddings={needed} or positions=sinusoidal."
            )


class KeyValueProjection(nn.Module):
    """Features [B, S, F] to keys and values [L, B, H, S, D] (L = 1 with `tie_layers`)."""

    def __init__(
        self,
        config: ProjectionConfig,
        looker: TransformerConfig,
        width: int,
        dimensions: int,
        source: str,
        tie_layers: bool = False,
    ) -> None:
        super().__init__()
        self.source, self.heads = source, looker.num_heads
        self.layers = 1 if tie_layers else len(looker.cross_attention_layers)
        inner = self.layers * looker.num_heads * looker.head_dim
        self.norm, self.dropout = build_norm(config.norm, width), Dropout(config.dropout)
        self.bridge = nn.Linear(width, config.hidden_size) if config.hidden_size else nn.Identity()
        width = config.hidden_size or width
        self.positions = KeyPositionEmbedding(config.positions, dimensions, config.max_position_embeddings, width)
        self.key, self.value = (nn.Linear(width, inner, bias=config.bias) for _ in range(2))
        if config.bias:
            nn.init.normal_(self.key.bias, std=0.02)

    def forward(self, features: Features) -> Memory:
        """Return this source's memory."""
        content = self.bridge(self.dropout(self.norm(features.states)))
        placed = content + self.positions(features, self.source)
        keys = self._by_layer(self.key(placed.to(content.dtype)))  # the waves of sinusoidal positions are float32
        values = self._by_layer(self.value(content))
        segment = Segment(self.source, 0, features.states.shape[1], features.grid)
        return Memory(keys, values, features.mask, (segment,))

    def _by_layer(self, x: Tensor) -> Tensor:
        """[B, S, L*H*D] -> [L, B, H, S, D]."""
        by_layer = x.unflatten(-1, (self.layers, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # What is asked many times is laid out as it will be read: a tenth of a token's time at 197 slots of 12 layers.
        return by_layer if torch.is_grad_enabled() else by_layer.contiguous()
