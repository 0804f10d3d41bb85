"""InputReader: inputs of a model by source, prepared to tensors.

Audio that is longer than its encoder reads is prepared in windows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, cast

from mmx.encoders.contract import PreparedInput, accepts
from mmx.errors import MmxError
from mmx.inference.outputs import ModelInput
from mmx.io.audio import AudioInput, load_audio
from mmx.io.audio_windows import AudioWindow, split_audio
from mmx.models.model import Model
from mmx.models.source import find_source, prepare_inputs

PreparedOrError: TypeAlias = dict[str, PreparedInput] | MmxError
PreparedT = TypeVar("PreparedT")


@dataclass(frozen=True)
class InputWindow:
    """What one row of a memory is made of: an input, or one window of audio.

    Attributes:
        inputs: prepared tensors by source.
        start, end: of a window, in seconds; 0 of an input that has no windows.
        is_silent: whether it is audio without any sound.
        text_start: with what its text begins; None for the option `start`. Only the first window's text has a start.
    """

    inputs: dict[str, PreparedInput]
    start: float = 0.0
    end: float = 0.0
    is_silent: bool = False
    text_start: str | None = None


class InputReader:
    """Reads the inputs of a model."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def accepts(self, path: str) -> bool:
        """Return whether one of the sources reads files of this name."""
        return any(accepts(encoder, name, path) for name, encoder in self.model.encoders.items())

    def by_source(self, image: ModelInput) -> dict[str, object]:
        """Return an input by source name; one without a name goes to the source that reads it.

        Raises:
            MmxError: there is no input, the model has no source of that name, or several sources might be meant.
        """
        if isinstance(image, Mapping):
            named = dict(image)
        elif image is None:
            named = {}
        else:
            named = {find_source(self.model.encoders, _path_as_text(image)): image}
        for name in named:
            self.model.encoder(name)
        if all(raw is None for raw in named.values()):
            raise no_source_error("the input", image, list(self.model.encoders))
        return {name: _path_as_text(raw) for name, raw in named.items()}

    def prepare(self, image: ModelInput) -> dict[str, PreparedInput]:
        """Return the tensors of one input by source name.

        Raises:
            MmxError: the input cannot be read, or the model has no such source.
        """
        return prepare_inputs(self.model.encoders, self.by_source(image))

    def prepare_or_error(self, image: ModelInput | MmxError) -> PreparedOrError:
        """Like `prepare`, but return the error. An input that already is an error stays one."""
        return _or_error(self.prepare, image)

    def prepare_windows(self, image: ModelInput) -> list[InputWindow]:
        """Return the rows whose texts are the text of an input: one, or the windows of long audio.

        Only audio that is the whole input has windows, see `mmx.io.audio_windows`. Raises MmxError as `prepare`.
        """
        named = {name: raw for name, raw in self.by_source(image).items() if raw is not None}
        name = next(iter(named))
        encoder = self.model.encoder(name)
        if len(named) > 1 or encoder.modality != "audio" or encoder.max_audio_seconds is None:
            return [InputWindow(prepare_inputs(self.model.encoders, named))]
        samples = load_audio(cast(AudioInput, named[name]), encoder.sampling_rate)
        windows = split_audio(samples, encoder.sampling_rate, encoder.max_audio_seconds)
        return [self._prepare_window(name, window, encoder.sampling_rate) for window in windows]

    def prepare_windows_or_error(self, image: ModelInput | MmxError) -> list[InputWindow] | MmxError:
        """Like `prepare_windows`, but return the error. An input that already is an error stays one."""
        return _or_error(self.prepare_windows, image)

    def _prepare_window(self, name: str, window: AudioWindow, rate: int) -> InputWindow:
        prepared = prepare_inputs(self.model.encoders, {name: (window.samples, rate)})
        return InputWindow(prepared, window.start, window.end, window.is_silent)


def no_source_error(what: str, raw: object, sources: Sequence[str], **details: object) -> MmxError:
    """The error of an input or row without any source, over which a text would be invented."""
    return MmxError(
        f"{what} has no source: {raw!r}; expected an input for at least one of {', '.join(sources)}, or for a text "
        "without any input the memory unconditional_memory().",
        code="input.no_source",
        sources=list(sources),
        **details,
    )


def _or_error(prepare: Callable[[ModelInput], PreparedT], image: ModelInput | MmxError) -> PreparedT | MmxError:
    """Return what `prepare` returns or raises."""
    if isinstance(image, MmxError):
        return image
    try:
        return prepare(image)
    except MmxError as error:
        return error


def _path_as_text(raw: object) -> object:
    """Encoders receive paths as str."""
    return os.fspath(raw) if isinstance(raw, os.PathLike) else raw
