"""The folder of a run: the state to resume from, and the files that a run begins with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from mmx.config.loader import dump_config
from mmx.config.schema import RunConfig
from mmx.errors import TrainingError
from mmx.io.atomic import atomic_write_text
from mmx.io.file_lock import open_locked
from mmx.training.config_changes import CONFIG_FILE, ConfigChange, list_changes
from mmx.training.metrics_log import MetricsLog
from mmx.training.state import latest_state

LOCK_FILE = ".lock"


class RunFolderLock:
    """Keeps other processes from training in a run folder, from `acquire` to `release` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        """Lock the folder, which is made if it is missing; return False if another process trains in it.

        Raises:
            TrainingError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open_locked(self.folder / LOCK_FILE)
        except OSError as error:
            raise _write_error(self.folder, error) from error
        return self._file is not None

    def release(self) -> None:
        """Unlock the folder if this process has locked it."""
        if self._file is not None:
            with suppress(OSError):  # Windows does not remove an open file
                (self.folder / LOCK_FILE).unlink()
            self._file.close()
            self._file = None

    def __enter__(self) -> RunFolderLock:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def find_saved_state(folder: Path, resume: bool) -> Path | None:
    """Return the state to resume from, None for a new run.

    Raises:
        TrainingError: there is nothing to resume, or a new run would overwrite an older one.
    """
    saved_state = latest_state(folder)
    if resume and saved_state is None:
        raise TrainingError(
            f"there is nothing to resume in {folder}; leave --resume out to start.",
            code="training.nothing_to_resume",
            path=str(folder),
        )
    if not resume and saved_state is not None:
        raise TrainingError(
            f"{folder} already holds a run; add --resume to continue it, or output_dir=ANOTHER_FOLDER.",
            code="training.run_exists",
            path=str(folder),
        )
    return saved_state


def open_run_folder(folder: Path, config: RunConfig, metrics_log: MetricsLog, first_step: int) -> None:
    """Write the resolved configuration, and remove metrics of steps that will be trained again.

    Raises:
        TrainingError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / CONFIG_FILE, dump_config(config))
        metrics_log.truncate(first_step)
    except OSError as error:
        raise _write_error(folder, error) from error


def print_changes(changes: Sequence[ConfigChange]) -> None:
    """Print what a resumed run has changed in its configuration."""
    if changes:
        print(f"changed since the run was started: {list_changes(changes)}", file=sys.stderr)


def locked_error(folder: Path) -> TrainingError:
    """Return the error of a run in a folder in which another process trains."""
    return TrainingError(
        f"another process is training in {folder}; wait for it, or set output_dir to another folder.",
        code="training.locked",
        path=str(folder),
    )


def _write_error(folder: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{folder} cannot be written: {error.strerror}; set output_dir to another folder.",
        code="training.write",
        path=str(folder),
    )
