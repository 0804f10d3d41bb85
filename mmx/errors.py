"""Exceptions of mmx. Every message is one sentence: what was given, what was expected, what to type.

Each exception carries a stable `code`, such as `memory.shape`, and `details`: the facts of the message as values, such as
`path`, `line` or `key`. Programs and tests read these; the wording of a message may change. Messages never contain the
text of another library's exception or a memory address.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import ClassVar


class MmxError(Exception):
    """Base of all exceptions that mmx raises on purpose.

    Args:
        message: one sentence.
        code: stable identifier, `part.reason` in lower case; defaults to the class's own `default_code`.
        details: facts of the message by name; picklable, because data workers send exceptions to their parent.
    """

    default_code: ClassVar[str] = "error"

    def __init__(self, message: str, *, code: str | None = None, **details: object) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.details = details

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the keyword arguments too, which BaseException leaves out."""
        return _rebuild, (type(self), str(self), self.code, self.details)


class ConfigError(MmxError):
    """A configuration that cannot be used: an unknown key, a wrong type, a contradiction."""

    default_code = "config"


class InputError(MmxError):
    """An input that cannot be read. `details["source"]` names it; `code` is `image.REASON` or `audio.REASON`."""

    default_code = "input"


class ImageError(InputError):
    """An image that cannot be read, for a reason such as image.missing, image.empty or image.damaged."""

    default_code = "image"


class AudioError(InputError):
    """Audio that cannot be read, for a reason such as audio.missing, audio.empty or audio.damaged."""

    default_code = "audio"


class DataError(MmxError):
    """A data set that cannot be read. `details` name the file and the line."""

    default_code = "data"


class EncoderError(MmxError):
    """An encoder that does not exist, cannot be imported, or breaks its contract."""

    default_code = "encoder"


class CheckpointError(MmxError):
    """A checkpoint folder that is missing, incomplete, or does not fit the model."""

    default_code = "checkpoint"


class TrainingError(MmxError):
    """Training that had to stop: a loss that is not finite, too many unreadable examples, a request to stop."""

    default_code = "training"


def suggest(given: str, known: list[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known name, or all of them if none is near."""
    near = get_close_matches(given, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'none'}."


def _rebuild(kind: type[MmxError], message: str, code: str, details: dict[str, object]) -> MmxError:
    return kind(message, code=code, **details)
