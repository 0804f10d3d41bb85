"""Position embeddings: learned, sinusoidal, rotary, or none.

Axes: N rows, T positions, E hidden size, H heads, D head dimension.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmx.config.schema import BaseTransformerConfig, RopeScaling


class NoPositionEmbedding(nn.Module):
    """Adds nothing to the token embeddings: positions are rotary, or not encoded at all."""

    def forward(self, positions: Tensor) -> float:
        """Return zero for positions [N, T]."""
        return 0.0


class LearnedPositionEmbedding(nn.Module):
    """One trained vector per position."""

    def __init__(self, num_positions: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_positions, hidden_size) * 0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """positions: int [N, T], less than `num_positions` -> [N, T, E]."""
        return F.embedding(positions, self.weight)


class SinusoidalPositionEmbedding(nn.Module):
    """Fixed sinusoids (Vaswani et al. 2017, section 3.5): all sines, then all cosines."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, positions: Tensor) -> Tensor:
        """positions: int or float [...] -> float32 [..., E]."""
        half = self.hidden_size // 2
        exponents = torch.arange(half, device=positions.device) * (-math.log(10000.0) / max(half - 1, 1))
        angles = positions.float().unsqueeze(-1) * torch.exp(exponents)
        return F.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, self.hidden_size - 2 * half))


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their position, so that scores depend on distances (Su et al. 2021, section 3.4)."""

    def __init__(self, head_dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.scaling = scaling

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [N, H, T, D], positions: [N, T] -> [N, H, T, D]."""
        angles = positions.float().unsqueeze(-1) * self._frequencies(x.device)
        cosine = angles.cos().to(x.dtype).unsqueeze(1)
        sine = angles.sin().to(x.dtype).unsqueeze(1)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)

    def _frequencies(self, device: torch.device) -> Tensor:
        """Radians per position, [D / 2]; with `scaling`, low frequencies are divided by its factor (Llama 3.1)."""
        frequencies = 1.0 / self.theta ** (torch.arange(0, self.head_dim, 2, device=device) / self.head_dim)
        if self.scaling is None:
            return frequencies
        low = self.scaling.low_freq_factor
        high = self.scaling.high_freq_factor
        # Full turns of each frequency within the context length of pretraining.
        turns = self.scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        unscaled = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return unscaled * frequencies + (1 - unscaled) * frequencies / self.scaling.factor


def build_position_embedding(config: BaseTransformerConfig) -> nn.Module:
    """Return the module whose output is added to the token embeddings."""
    modules: dict[str, Callable[[], nn.Module]] = {
        "learned": lambda: LearnedPositionEmbedding(config.max_position_embeddings, config.hidden_size),
        "sinusoidal": lambda: SinusoidalPositionEmbedding(config.hidden_size),
        "rope": NoPositionEmbedding,
        "none": NoPositionEmbedding,
    }
    return modules[config.positions]()


def position_ids_from_mask(mask: Tensor) -> Tensor:
    """Return the position of each token among those that exist, int [N, T]; padding on either side is not counted.

    Args:
        mask: bool [N, T], False for padding.
    """
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
