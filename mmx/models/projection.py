"""The key-value projection: features of one source to its memory.

B rows, S slots, F feature size, L layers with cross-attention, H heads, D head dimension.

Positions are added to the keys only; values depend on content only. The bias of the keys distinguishes sources: within
one source it shifts all scores of a query equally and changes nothing, but after `mmx.cat` it differs by source.
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
    """Position embedding of slots: along a sequence, or the sum of one along rows and one along columns of a grid.

    Args:
        kind: none, learned or sinusoidal.
        dimensions: 1 for a sequence, 2 for a grid.
        num_positions: number of learned positions, for each dimension.
        hidden_size: size of the embedding.
    """

    def __init__(self, kind: str, dimensions: int, num_positions: int, hidden_size: int) -> None:
        super().__init__()
        builders: dict[str, Callable[[], nn.Module]] = {
            "none": NoPositionEmbedding,
            "learned": lambda: LearnedPositionEmbedding(num_positions, hidden_size),
            "sinusoidal": lambda: SinusoidalPositionEmbedding(hidden_size),
        }
        self.max_positions = num_positions if kind == "learned" else None
        self.along = nn.ModuleList(builders[kind]() for _ in range(dimensions))

    def forward(self, features: Features, source: str) -> Tensor | float:
        """Return what is added to features [B, S, F]. Slots before the grid, such as class tokens, get zero."""
        num_slots = features.states.shape[1]
        device = features.states.device
        if len(self.along) == 1:
            self._check_length(num_slots, source)
            return self.along[0](torch.arange(num_slots, device=device))
        rows, columns = features.grid or (0, 0)
        self._check_length(max(rows, columns), source)
        by_row = self.along[0](torch.arange(rows, device=device))
        by_column = self.along[1](torch.arange(columns, device=device))
        if isinstance(by_row, float):
            return 0.0
        cells = (by_row[:, None] + by_column[None]).flatten(0, 1)
        return nn.functional.pad(cells, (0, 0, num_slots - len(cells), 0))

    def _check_length(self, length: int, source: str) -> None:
        if self.max_positions is not None and length > self.max_positions:
            raise EncoderError(
                f"source {source!r} has {length} positions, and its projection has {self.max_positions} learned ones; "
                f"set model.sources.{source}.projection.max_position_embeddings={length} or positions=sinusoidal.",
                code="projection.too_long",
                source=source,
                length=length,
                maximum=self.max_positions,
            )


class KeyValueProjection(nn.Module):
    """Features [B, S, F] to keys and values [L, B, H, S, D].

    Args:
        config: options of the projection.
        target: configuration of the transformer that attends to the memory.
        feature_size: F.
        dimensions: 2 if the features lie on a grid, otherwise 1.
        source: name of the source in the layout of the memory.
        tie_layers: whether all layers share one layer of keys and values (L = 1).
    """

    def __init__(
        self,
        config: ProjectionConfig,
        target: TransformerConfig,
        feature_size: int,
        dimensions: int,
        source: str,
        tie_layers: bool = False,
    ) -> None:
        super().__init__()
        self.source = source
        self.num_heads = target.num_heads
        self.num_layers = 1 if tie_layers else len(target.cross_attention_layers)
        hidden_size = config.hidden_size or feature_size
        output_size = self.num_layers * target.num_heads * target.head_dim
        self.norm = build_norm(config.norm, feature_size)
        self.dropout = Dropout(config.dropout)
        self.bridge = nn.Linear(feature_size, hidden_size) if config.hidden_size else nn.Identity()
        self.positions = KeyPositionEmbedding(config.positions, dimensions, config.max_position_embeddings, hidden_size)
        self.key = nn.Linear(hidden_size, output_size, bias=config.bias)
        self.value = nn.Linear(hidden_size, output_size, bias=config.bias)
        if config.bias:
            nn.init.normal_(self.key.bias, std=0.02)

    def forward(self, features: Features) -> Memory:
        """Return the memory of this source."""
        content = self.bridge(self.dropout(self.norm(features.states)))
        with_positions = content + self.positions(features, self.source)
        keys = self._split_layers(self.key(with_positions.to(content.dtype)))  # sinusoidal positions are float32
        values = self._split_layers(self.value(content))
        segment = Segment(self.source, 0, features.states.shape[1], features.grid)
        windows = None
        if features.window is not None:
            windows = features.window.float()[:, None].expand(-1, features.states.shape[1], -1)
        return Memory(keys, values, features.mask, (segment,), windows=windows)

    def _split_layers(self, x: Tensor) -> Tensor:
        """[B, S, L*H*D] -> [L, B, H, S, D]."""
        by_layer = x.unflatten(-1, (self.num_layers, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # Contiguous keys save a tenth of the time of decoding a token (197 slots, 12 layers), which pays if the memory
        # is read more than once; training reads it once.
        return by_layer if torch.is_grad_enabled() else by_layer.contiguous()
