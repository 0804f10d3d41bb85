"""Texts for teacher forcing: token ids with the token that should follow each position.

Axes: B memories, K streams, T text positions, S slots. Masks: True = may be attended.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmx.errors import MmxError


@dataclass(frozen=True)
class TextBatch:
    """Texts over B memories, K for each.

    Args:
        tokens: int [B, K, T], prompt and text.
        targets: int [B, K, T], the token that should follow each position; negative where none is measured.
        mask: bool [B, K, T], False where a token is padding; None for no padding.
        visibility: bool [T, S], the slots visible at each position; None for all.

    Raises:
        MmxError: targets do not have the shape of the tokens.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor | None = None
    visibility: Tensor | None = None

    def __post_init__(self) -> None:
        check_same_shape("targets", self.targets, self.tokens)


def check_same_shape(name: str, given: Tensor, tokens: Tensor) -> None:
    """Raise MmxError if a tensor of token properties does not have the shape of the tokens."""
    if given.shape != tokens.shape:
        expected = list(tokens.shape)
        raise MmxError(
            f"{name} have shape {list(given.shape)}; expected [B, K, T] = {expected}, the shape of the tokens.",
            code="interpret.shape",
            name=name,
            given=list(given.shape),
            expected=expected,
        )
