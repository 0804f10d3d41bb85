"""Features: what an encoder hands over, before anyone decides what the decoder makes of it.

Alphabet: B rows, S slots, F feature width. Masks: True = may be attended.
"""

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """states [B, S, F]; mask bool [B, S]; grid (rows, columns) where the last rows*columns slots lie on the input."""

    states: Tensor
    mask: Tensor
    grid: tuple[int, int] | None = None
