"""Features: the output of an encoder and the input of a key-value projection.

Axes: B rows, S slots, F feature size. Masks: True = may be attended.
"""

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """Output of an encoder.

    Attributes:
        states: [B, S, F].
        mask: bool [B, S], the slots that exist.
        grid: (rows, columns) if the last rows * columns slots form a grid over the input, row by row from the top left.
    """

    states: Tensor
    mask: Tensor
    grid: tuple[int, int] | None = None
