"""Exceptions of mmx. Every message is one sentence: what was given, what was expected, what to type.

Each exception carries a stable `code`, such as `memory.shape`, and `details`: the facts of the message as values, such
as `path`, `line` or `key`. Programs and tests read these; the wording of a message may change. Messages never contain
the text of another library's exception or a memory address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def most_similar(given: str, known: Sequence[str]) -> str | None:
    """Return the known name that is most similar to an unknown one; None if none is similar."""
    return next(iter(get_close_matches(given, known, n=1)), None)


def suggest(given: str, known: Sequence[str]) -> str:
    """Return the end of a sentence about an unknown name: the most similar known name, or all of them."""
    similar = most_similar(given, known)
    return f"did you mean {similar!r}?" if similar is not None else f"known: {', '.join(sorted(known)) or 'none'}."


@contextmanager
def convert_errors(
    error_class: type[MmxError],
    describe: Callable[[BaseException], str],
    *,
    code: str,
    passing: tuple[type[BaseException], ...] = (MmxError, MemoryError),
    **details: object,
) -> Iterator[None]:
    """Convert the exceptions of third-party code, which may be of any class, to `error_class`.

    Args:
        error_class: class of the exception to raise instead.
        describe: returns the message for the exception that was caught.
        code: code of the new exception; `details` are its facts.
        passing: classes of exceptions that are raised unchanged.
    """
    try:
        yield
    except passing:
        raise
    except (Exception, SystemExit) as error:
        raise error_class(describe(error), code=code, **details) from error


def one_line_error(error: BaseException) -> str:
    """Return the class name and message of an exception on one line, at most 200 characters."""
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be read)"
    return one_line(" ".join(f"{type(error).__name__}: {message}".split()), limit=200)


def one_line(text: str, limit: int | None = None) -> str:
    """Return the text as one line that is safe to print: white space becomes a space, other control characters `?`.

    Lone surrogates, which stand for undecodable bytes in file names, are kept: streams and files that are opened with
    `errors="backslashreplace"` escape them. A text longer than `limit` characters is cut and ends with "...".
    """
    line = "".join(_printable(character) for character in text)
    return line if limit is None or len(line) <= limit else f"{line[: limit - 3]}..."


def _printable(character: str) -> str:
    if character.isprintable() or "\ud800" <= character <= "\udfff":
        return character
    return " " if character.isspace() else "?"


def _rebuild(kind: type[MmxError], message: str, code: str, details: dict[str, object]) -> MmxError:
    return kind(message, code=code, **details)
