"""The Hugging Face Hub as it is used here: downloads of public names, and its errors as one sentence.

`HF_ENDPOINT`, a server with the interface of the Hub, and `MMX_CACHE` are read at each call.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import NamedTuple

from mmx.config.environment import cache_folder
from mmx.errors import CheckpointError, MmxError


class HubProblem(NamedTuple):
    """Why a request failed: the code of the error, and the rest of its sentence."""

    code: str
    reason: str


# Exceptions by name: huggingface_hub has changed its HTTP library, whose exceptions it raises.
NOT_REACHED = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "HFValidationError", "TransportError")
FOLDER_ADVICE = "check the name, or give a folder: runs/NAME/best of mmx train, or that of a downloaded model."


def hub_endpoint() -> str | None:
    """Return the address of the Hub, `HF_ENDPOINT`; None: the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def download(name: str, revision: str | None, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """Return the folder in the cache with the files of a public name whose paths match one of the patterns.

    Without a connection, or with HF_HUB_OFFLINE=1, it is the folder of the last download.

    Args:
        name: a public name, `user/name`.
        revision: branch, tag or commit.
        ignored: patterns of paths that are not downloaded.

    Raises CheckpointError if the name does not exist, may not be read, or was never downloaded and cannot be now.
    """
    from huggingface_hub import snapshot_download

    failure = f"{name!r} is no folder here and could not be downloaded"
    with hub_errors(name, failure, FOLDER_ADVICE, revision):
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(ignored),
            cache_dir=cache_folder(),
            endpoint=hub_endpoint(),
        )
    return Path(folder)


@contextmanager
def hub_errors(name: str, failure: str, advice: str, revision: str | None = None) -> Iterator[None]:
    """Convert the exceptions of huggingface_hub about a public name to CheckpointError.

    Args:
        failure: beginning of the sentence.
        advice: end of the sentence if the name does not exist or the Hub is not reached.
    """
    try:
        with _quiet_hub():
            yield
    except (MmxError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        status = _status(error)
        problem = _describe_missing(error, status, advice)
        if status not in (None, 404) or _is_caused_by(error, "RevisionNotFoundError"):
            problem = _describe_refusal(error, status or 404, revision)
        raise CheckpointError(
            f"{failure}: {problem.reason}", code=problem.code, name=name, revision=revision, status=status
        ) from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Let huggingface_hub print no warnings, and draw progress bars on a terminal only."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity = logging.get_verbosity()
    hides_bars = not sys.stderr.isatty() and not are_progress_bars_disabled()
    logging.set_verbosity(ERROR)
    if hides_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hides_bars:
            enable_progress_bars()


def _describe_refusal(error: BaseException, status: int, revision: str | None) -> HubProblem:
    """The problem of a request that the Hub answered with an error."""
    if _is_caused_by(error, "RevisionNotFoundError"):
        return HubProblem(code="hub.revision", reason=f"it has no revision {revision!r}; give a branch, tag or commit.")
    if status in (401, 403):
        reason = (
            f"the Hub refuses access (status {status}), because there is no such name or your token may not use it; "
            "check the name, or log in with: hf auth login."
        )
        return HubProblem(code="hub.unauthorized", reason=reason)
    if status in (409, 412):
        return HubProblem(code="hub.conflict", reason="it was changed at the same time; type the command again.")
    if status == 429 or status >= 500:
        reason = f"the Hub cannot answer now (status {status}); type the command again later."
        return HubProblem(code="hub.unavailable", reason=reason)
    return HubProblem(code="hub.refused", reason=f"the Hub refuses the request (status {status}).")


def _describe_missing(error: BaseException, status: int | None, advice: str) -> HubProblem:
    """The problem of a name that does not exist, of a Hub that did not answer, or of this machine."""
    if status == 404:
        return HubProblem(code="hub.not_found", reason=f"no such name (status 404); {advice}")
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.strerror} ({error.filename}); MMX_CACHE=FOLDER keeps downloads in another folder."
        return HubProblem(code="hub.cache", reason=reason)
    if _is_caused_by(error, *NOT_REACHED):
        reason = f"no such name, no network, or HF_HUB_OFFLINE=1 is set; {advice}"
        return HubProblem(code="hub.not_found", reason=reason)
    return HubProblem(code="hub.failed", reason=f"{type(error).__name__} in huggingface_hub; {advice}")


def _is_caused_by(error: BaseException, *class_names: str) -> bool:
    """Whether the class of an error, or of a cause of it, is one of these or a subclass."""
    found: set[str] = set()
    for cause in _causes(error):
        found.update(base.__name__ for base in type(cause).__mro__)
    return not found.isdisjoint(class_names)


def _status(error: BaseException) -> int | None:
    """The HTTP status of the response that caused an error; None if there was no response."""
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """An error and its causes, the last first."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__
    return found
