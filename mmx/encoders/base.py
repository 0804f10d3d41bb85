"""The contract of an encoder. Subclass `Encoder`, give it options, a width, `prepare` and `forward`; that is all.

Alphabet: B rows, S slots, F feature width. Masks: True = may be attended.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmx.config.schema import FrozenModel
from mmx.errors import EncoderError
from mmx.nn.features import Features

__all__ = ["Encoder", "Features"]


class Encoder(nn.Module):
    """Raw input -> features.

    A subclass states its `modality` ("image", "text", "audio", ...), nests its own `Options`, sets `self.width` (F) in
    `__init__(self, options)`, and defines `prepare` and `forward`. `dimensions` is 2 where the features lie on a grid.
    With `uses_tokenizer` it is built as `cls(options, tokenizer)` and reads text with the model's own tokens.
    `self.options` must build it again without fetching anything: its weights lie in the checkpoint by then.
    """

    modality: str
    dimensions: int = 1
    uses_tokenizer: ClassVar[bool] = False
    width: int

    class Options(FrozenModel):
        """The encoder's own settings, validated before it is built."""

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        """One raw input to tensors without a batch axis. Runs in data workers: no device, no gradient, no state."""
        raise EncoderError(f"{type(self).__name__} has no prepare(raw); define it to return a dict of tensors.")

    def collate(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Prepared inputs to one batch: stacked; where first axes differ, padded at the end with zeros (False)."""
        names = {name: None for item in prepared for name in item}
        if lacking := next((name for name in names if any(name not in item for item in prepared)), None):
            raise EncoderError(
                f"{type(self).__name__} prepared {lacking!r} for some inputs only; give the same for all."
            )
        return {name: _stack([item[name] for item in prepared], name) for name in names}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """A batch as `collate` made it -> Features of its rows."""
        raise EncoderError(f"{type(self).__name__} has no forward(batch); define it to return Features.")

    # ---- optional --------------------------------------------------------------------------------------------------

    def accepts(self, path: str) -> bool:
        """Whether a file of this name is this encoder's kind of input; so the command line finds the source."""
        return False

    def samples(self) -> list[Any]:
        """A few raw inputs, of different lengths where lengths differ, for the conformance kit."""
        return []

    def labels(self, raw: Any) -> list[str]:
        """What the slots of an input are called, one after the other (the words of a text), for pictures of attention;
        [] where they have no names."""
        return []

    def window(self, raw: Any) -> tuple[float, float, float, float]:
        """Which part of an input its grid lies on: x0, y0, x1, y1 in 0..1 from the top left; all of it by default."""
        return (0.0, 0.0, 1.0, 1.0)

    def save_files(self, folder: Path) -> None:
        """Write into a folder of its own in the checkpoint what is neither an option nor a tensor: a vocabulary, say.
        The folder is there; it vanishes where it stays empty."""

    def load_files(self, folder: Path) -> None:
        """Read back what `save_files` wrote; called after `__init__` and before the weights are filled in."""


def _stack(tensors: list[Tensor], name: str) -> Tensor:
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) == 1:
        return torch.stack(tensors)
    if () in shapes or len({shape[1:] for shape in shapes}) > 1:
        raise EncoderError(f"{name!r} of {sorted(shapes)[:4]} cannot be padded to one; only first axes may differ.")
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True)
