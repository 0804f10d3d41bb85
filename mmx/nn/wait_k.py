"""Wait-k masks: text position t may attend the first t + k slots (Ma et al. 2019, "STACL", section 3.2).

Axes: B memories, K streams, T text positions, S slots. Masks: True = may be attended.
"""

import torch
from torch import Tensor

from mmx.nn.relative_position import RelativeDistances


def wait_k_mask(distances: RelativeDistances, k: int) -> Tensor:
    """Return the wait-k mask, bool [B, 1, K*T, S]. The slots of a grid may always be attended."""
    return ((distances.offset < k) | ~distances.ordered)[:, None]


def wait_k_visibility(length: int, num_slots: int, k: int) -> Tensor:
    """Return the wait-k mask of one source as a `visibility`, bool [T, S], for a text that starts at position 0.

    With k = 1 it is monotonic attention: one more slot at each position.
    """
    return torch.arange(num_slots) < torch.arange(length)[:, None] + k
