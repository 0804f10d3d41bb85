"""The folder of a run: the state to resume from, and the files that a run begins with."""

from __future__ import annotations

from pathlib import Path

from mmx.config.loader import dump_config
from mmx.config.schema import RunConfig
from mmx.errors import TrainingError
from mmx.training.metrics_log import MetricsLog
from mmx.training.state import latest_state


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


def open_run_folder(folder: Path, config: RunConfig, metrics_log: MetricsLog, first_step: int, is_new: bool) -> None:
    """Write the resolved configuration of a new run, and remove metrics of steps that will be trained again.

    Raises:
        TrainingError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_new:
            (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        metrics_log.truncate(first_step)
    except OSError as error:
        raise TrainingError(
            f"{folder} cannot be written: {error.strerror}; set output_dir to another folder.",
            code="training.write",
            path=str(folder),
        ) from error
