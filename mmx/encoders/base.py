"""The contract of an encoder. Subclass `Encoder`, give it options, a width, `prepare` and `forward`; that is all.

Alphabet: B rows, S slots, F feature width. Masks: True = may be attended.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmx.config import Frozen
from mmx.errors import EncoderError
from mmx.features import Features

__all__ = ["Encoder", "Features", "check_features"]


class Encoder(nn.Module):
    """Raw input -> features.

    A subclass states its `modality` ("image", "text", "audio", ...), nests its own `Options`, sets `self.width` (F) in
    `__init__(self, options)`, and defines `prepare` and `forward`. `dimensions` is 2 where the features lie on a grid.
    With `shares_tokenizer` it is built as `cls(options, tokenizer)` and reads text with the model's own tokens.
    """

    modality: ClassVar[str]
    dimensions: ClassVar[int] = 1
    shares_tokenizer: ClassVar[bool] = False
    width: int

    class Options(Frozen):
        """The encoder's own settings, validated before it is built."""

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        """One raw input to tensors without a batch axis. Runs in data workers: no device, no gradient, no state."""
        raise EncoderError(f"{type(self).__name__} has no prepare(raw); define it to return a dict of tensors.")

    def collate(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Prepared inputs to one batch: stacked; where first axes differ, padded at the end with zeros (False)."""
        return {name: _stack([item[name] for item in prepared], name) for name in prepared[0]}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """A batch as `collate` made it -> Features of its rows."""
        raise EncoderError(f"{type(self).__name__} has no forward(batch); define it to return Features.")

    @classmethod
    def accepts(cls, path: str) -> bool:
        """Whether a file of this name is this encoder's kind of input."""
        return False


def _stack(tensors: list[Tensor], name: str) -> Tensor:
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) == 1:
        return torch.stack(tensors)
    if () in shapes or len({shape[1:] for shape in shapes}) > 1:
        raise EncoderError(f"{name!r} of {sorted(shapes)[:4]} cannot be padded to one; only first axes may differ.")
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def check_features(features: Any, encoder: Encoder, source: str) -> Features:
    """Meet an encoder's mistakes at the door: return the features, or raise EncoderError naming what was given."""

    def refuse(given: str, expected: str) -> EncoderError:
        return EncoderError(f"encoder {type(encoder).__name__} of source {source!r} gave {given}; expected {expected}.")

    if not isinstance(features, tuple) or [isinstance(part, Tensor) for part in features[:2]] != [True, True]:
        raise refuse(_kinds(features), "Features(states, mask, grid)")
    states, mask, grid = Features(*features[:3])
    if states.ndim != 3 or states.shape[-1] != encoder.width:
        raise refuse(f"states {list(states.shape)}", f"[B, S, F] with F = its width {encoder.width}")
    if not states.is_floating_point():
        raise refuse(f"states of {states.dtype}", "floating-point ones")
    if mask.dtype != torch.bool or mask.shape != states.shape[:2]:
        raise refuse(
            f"a mask {mask.dtype} {list(mask.shape)}", f"bool {list(states.shape[:2])}, True = may be attended"
        )
    if mask.device != states.device:
        raise refuse(f"a mask on {mask.device}", f"one on {states.device}, where its states are")
    if (encoder.dimensions == 2 or grid is not None) and not _lies_on(grid, states.shape[1]):
        raise refuse(f"grid {grid} for {states.shape[1]} slots", "(rows, columns) covering its last rows*columns slots")
    return Features(states, mask, None if grid is None else (grid[0], grid[1]))


def _kinds(given: Any) -> str:
    kind = type(given).__name__
    return f"{kind} of ({', '.join(type(part).__name__ for part in given)})" if isinstance(given, tuple) else kind


def _lies_on(grid: Any, slots: int) -> bool:
    """Whether a grid is two whole numbers whose cells are some of the slots."""
    whole = isinstance(grid, Sequence) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)
    return whole and grid[0] * grid[1] <= slots
