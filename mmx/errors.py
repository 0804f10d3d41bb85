"""Every error mmx raises on purpose: one sentence that says what was given, what was expected and what to type.

`MmxError` and its children never carry another library's text: messages are ours, short, and free of addresses.
The command line prints the sentence and leaves with exit code 2; from Python they are ordinary exceptions.
"""

from difflib import get_close_matches


class MmxError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one sentence for a person."""


class ConfigError(MmxError):
    """A configuration that cannot be used: an unknown key, a wrong type, a contradiction."""


class ImageError(MmxError):
    """A picture that cannot be read. `source` names it, `kind` is a stable word (missing, empty, damaged, ...)."""

    def __init__(self, message: str, *, kind: str, source: str) -> None:
        super().__init__(message)
        self.kind, self.source = kind, source

    def __reduce__(self) -> tuple[object, ...]:
        """Data workers send errors to their parent as pickles, which know nothing of keyword arguments."""
        return _image_error, (str(self), self.kind, self.source)


class AudioError(MmxError):
    """A sound that cannot be read. `source` names it, `kind` is a stable word (missing, empty, damaged, long, ...)."""

    def __init__(self, message: str, *, kind: str, source: str) -> None:
        super().__init__(message)
        self.kind, self.source = kind, source

    def __reduce__(self) -> tuple[object, ...]:
        """As for pictures: an error travels between processes."""
        return _sound_error, (str(self), self.kind, self.source)


class DataError(MmxError):
    """A manifest or data set that cannot be read, named by file and line."""


class EncoderError(MmxError):
    """An encoder that does not exist, cannot be imported, or breaks its contract."""


class CheckpointError(MmxError):
    """A checkpoint folder that is missing, incomplete, or does not fit the model."""


class TrainingError(MmxError):
    """Training that had to stop: a loss that is not finite, too many unreadable samples."""


def _image_error(message: str, kind: str, source: str) -> ImageError:
    return ImageError(message, kind=kind, source=source)


def _sound_error(message: str, kind: str, source: str) -> AudioError:
    return AudioError(message, kind=kind, source=source)


def suggest(given: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them when none is near."""
    near = get_close_matches(given, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'none'}."
