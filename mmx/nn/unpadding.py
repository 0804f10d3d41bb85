"""Linear layers of padded texts without the padding, which is more than half of the positions of a training batch.

Only attention needs texts as rows; the layers that compute each position by itself skip padding, like the function
`unpad_input` of flash-attn.

Axes: N streams, T text positions, M positions that are computed, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Kernels are prepared anew for every new shape, which on a CPU costs more than the step: keep the shapes few.
MULTIPLE = 256
MAX_FRACTION = 0.8  # of all positions; above, copying costs as much as it saves


def unpadded_indices(exists: Tensor) -> Tensor | None:
    """Return the positions of N*T to be computed, int [M]: all that exist, and padding up to a multiple of MULTIPLE.

    Returns None if all positions are to be computed: where there is little padding, and on other devices than a CPU,
    which would have to wait for the count.

    Args:
        exists: bool [N, T], False for padding.
    """
    if exists.device.type != "cpu":
        return None
    flat = exists.flatten()
    count = -(-int(flat.sum()) // MULTIPLE) * MULTIPLE
    if count > MAX_FRACTION * len(flat):
        return None
    return flat.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def apply_unpadded(module: Callable[[Tensor], Tensor], x: Tensor, indices: Tensor | None) -> Tensor:
    """Return module(x) at the positions of `indices` and zeros elsewhere, [N, T, E]; everywhere if `indices` is None.

    Args:
        module: computes each position by itself.
        x: [N, T, any].
        indices: of `unpadded_indices`.
    """
    if indices is None:
        return module(x)
    rows, length, _ = x.shape
    output = module(x.flatten(0, 1).index_select(0, indices))
    padded = output.new_zeros(rows * length, output.shape[-1]).index_copy_(0, indices, output)
    return padded.unflatten(0, (rows, length))
