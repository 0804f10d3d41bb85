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
        window: [B, 4], the region of each input that its grid covers, in 0..1 of the input; it may exceed the input by
            padding. None for the whole input.
    """

    states: Tensor
    mask: Tensor
    grid: tuple[int, int] | None = None
    window: Tensor | None = None
