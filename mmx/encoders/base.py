"""The encoder contract. A plugin subclasses `Encoder` and defines `modality`, `width`, `prepare` and `forward`.

Axes: B rows, S slots, F feature size. Masks are bool, True = may be attended.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmx.config.schema import FrozenModel
from mmx.errors import EncoderError, MmxError
from mmx.nn.features import Features

__all__ = ["CONTRACT_VERSION", "Encoder", "Features"]

# Of the methods and attributes below. It is raised when an encoder written for them would no longer work.
CONTRACT_VERSION = 1


class Encoder(nn.Module):
    """Base class of encoders: raw input to features [B, S, F].

    A subclass sets these class attributes:

        modality: kind of input, such as "image", "text" or "audio".
        dimensions: 2 if the features lie on a grid over the input, otherwise 1.
        max_audio_seconds: longest audio that it reads, or None. Captions of longer audio are made of windows, which
            it is given as (samples, rate) with `sampling_rate`.
        contract_version: version of this contract that it was written for, `CONTRACT_VERSION` at that time. A version
            of mmx with another one refuses the encoder. Packages should state it; otherwise it is not checked.
        uses_tokenizer: True if it is built as `cls(options, tokenizer)` and reads text as the model's own tokens.
        Options: pydantic model of its options, usually a nested subclass of `FrozenModel`.

    and in `__init__` the attribute `width` (F). `options` must rebuild the encoder without any file or download: the
    weights are loaded from the checkpoint afterwards.
    """

    modality: str
    dimensions: int = 1
    max_audio_seconds: float | None = None
    sampling_rate: int = 16_000
    contract_version: ClassVar[int] = CONTRACT_VERSION
    uses_tokenizer: ClassVar[bool] = False
    width: int
    options: FrozenModel

    class Options(FrozenModel):
        """Options of the encoder; this base class has none."""

    def __init__(self, options: FrozenModel) -> None:
        super().__init__()
        self.options = options

    def prepare(self, raw: object) -> dict[str, Tensor]:
        """Convert one raw input to CPU tensors without a batch axis.

        Runs in data workers: no device, no gradient and no state may be used. Raises an MmxError for an input that
        cannot be read.

        Args:
            raw: depends on the modality. An input must become the same tensors in each of these types:
                - image: a path as str, the bytes of an image file, or a PIL image. In training always an upright RGB
                  PIL image. `mmx.load_image` reads all of them.
                - audio: a path as str, the bytes of an audio file, or (samples, rate). `mmx.load_audio` reads all.
                - text: str.
                - any other: the value that the caller or the manifest gives; a path is a str.
        """
        raise EncoderError(
            f"{type(self).__name__} has no prepare(raw); define it to return a dict of tensors.",
            code="encoder.not_implemented",
            encoder=type(self).__name__,
            method="prepare",
        )

    def collate(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack prepared inputs to a batch. Tensors of different lengths are padded at the end with zeros (False)."""
        batch = {}
        for name in _tensor_names(prepared):
            tensors = [item[name] for item in prepared if name in item]
            if len(tensors) < len(prepared):
                raise EncoderError(
                    f"{type(self).__name__} prepared {name!r} for some inputs only; prepare the same tensors for all.",
                    code="encoder.collate_names",
                    encoder=type(self).__name__,
                    tensor=name,
                )
            batch[name] = _stack(tensors, name)
        return batch

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """Encode a batch, as returned by `collate`, to Features(states [B, S, F], mask [B, S], grid or None)."""
        raise EncoderError(
            f"{type(self).__name__} has no forward(batch); define it to return Features.",
            code="encoder.not_implemented",
            encoder=type(self).__name__,
            method="forward",
        )

    # Optional methods.

    def accepts(self, path: str) -> bool:
        """Return whether a file of this name is an input of this encoder. The command line selects the source by it."""
        return False

    def samples(self) -> Sequence[object]:
        """Return at least three raw inputs, of different lengths if possible, for the conformance kit."""
        return []

    def labels(self, raw: object) -> list[str]:
        """Return a name for each slot of an input, such as the tokens of a text, or [] if slots have no names."""
        return []

    def window(self, raw: object) -> tuple[float, float, float, float]:
        """Return the region of an input that its grid covers: x0, y0, x1, y1 in 0..1 from the top left."""
        return (0.0, 0.0, 1.0, 1.0)

    def save_files(self, folder: Path) -> None:
        """Write files that are neither options nor tensors, such as a vocabulary, to an existing folder.

        The checkpoint keeps the folder only if a file was written.
        """

    def load_files(self, folder: Path) -> None:
        """Read the files of `save_files`. Called after `__init__` and before the weights are loaded."""


def _tensor_names(prepared: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Names of all tensors, in order of first occurrence."""
    names: dict[str, None] = {}
    for item in prepared:
        names.update(dict.fromkeys(item))
    return list(names)


def _stack(tensors: list[Tensor], name: str) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) == 1:
        return torch.stack(tensors)
    trailing_shapes = {shape[1:] for shape in shapes}
    if () in shapes or len(trailing_shapes) > 1:
        raise EncoderError(
            f"{name!r} of shapes {sorted(shapes)[:4]} cannot be padded to one shape; only the first axis may differ.",
            code="encoder.collate_shapes",
            tensor=name,
            shapes=sorted(shapes),
        )
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def check_text_length(length: int, maximum: int) -> None:
    """Raise MmxError (text.too_long) for a text of more than `maximum` tokens, special tokens included."""
    if length > maximum:
        raise MmxError(
            f"the text has {length} tokens, and its encoder reads up to {maximum}; give it in parts, such as its "
            "sentences one by one.",
            code="text.too_long",
            length=length,
            maximum=maximum,
        )
