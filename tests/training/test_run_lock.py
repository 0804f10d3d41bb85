"""One run in a folder at a time, and Ctrl+C."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from toy_runs import RecordingTrainer, child_environment, metrics_lines, number_config, write_numbers

from mmx.config.loader import dump_config
from mmx.config.schema import RunConfig
from mmx.data.batching import Batch
from mmx.errors import TrainingError
from mmx.training.loop import StepResult, train
from mmx.training.run_folder import RunFolderLock
from mmx.training.state import latest_state


def refused(config: RunConfig, resume: bool) -> TrainingError:
    with pytest.raises(TrainingError) as error:
        train(config, resume=resume, quiet=True)
    return error.value


def test_second_run_in_a_folder_is_refused_until_the_first_ends(tmp_path):
    config = number_config(write_numbers(tmp_path), tmp_path / "run", max_steps=4, save_steps=2)
    trainer = RecordingTrainer(config)
    step = trainer._step
    errors = []

    def while_another_starts(batches: Sequence[Batch]) -> StepResult:
        if trainer.progress.step in (1, 3):  # before and after the first save
            errors.extend([refused(config, resume=False), refused(config, resume=True)])
        return step(batches)

    trainer._step = while_another_starts  # type: ignore[method-assign]
    trainer.run()
    assert [error.code for error in errors] == ["training.locked"] * 4
    assert errors[0].details["path"] == str(tmp_path / "run")
    assert [line["step"] for line in metrics_lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert not (tmp_path / "run" / ".lock").exists()
    assert RecordingTrainer(config, resume=True).progress.step == 4


def test_run_that_fails_before_its_first_step_unlocks_the_folder(tmp_path):
    config = number_config(str(tmp_path / "none.jsonl"), tmp_path / "run")
    for _ in range(2):
        with pytest.raises(Exception) as error:
            train(config, quiet=True)
        assert getattr(error.value, "code", "").startswith("data.")


def test_lock_of_a_killed_process_ends_with_it(tmp_path):
    script = f"""
import time
from pathlib import Path
from mmx.training.run_folder import RunFolderLock
lock = RunFolderLock(Path({str(tmp_path / "run")!r}))
print(lock.acquire(), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=child_environment()) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline().strip() == b"True"
            lock = RunFolderLock(tmp_path / "run")
            assert not lock.acquire()
        finally:
            child.kill()
    assert lock.acquire()
    lock.release()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ctrl_c_finishes_the_step_and_saves_the_state(tmp_path, num_workers):
    """The signal goes to all processes of the group, as from a terminal."""
    run = tmp_path / "run"
    config = number_config(
        write_numbers(tmp_path), run, max_steps=100_000, save_steps=100_000, num_workers=num_workers, warmup_steps=0
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "mmx", "train", str(path), "--quiet"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=child_environment(), start_new_session=True) as child:
        try:
            wait_for_steps(run, 3)
            os.killpg(child.pid, signal.SIGINT)
            _, printed = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 2
    lines = printed.decode().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mmx: ")
    assert "--resume" in lines[0]
    state = latest_state(run)
    assert state is not None
    assert int(state.name) == metrics_lines(run)[-1]["step"]
    assert not (run / ".lock").exists()


def wait_for_steps(run: Path, count: int) -> None:
    """Wait until a run has reported so many steps."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("the run did not start")


def test_second_ctrl_c_ends_at_once(tmp_path):
    config = number_config(write_numbers(tmp_path), tmp_path / "run", save_steps=100)
    trainer = RecordingTrainer(config)
    previous = signal.getsignal(signal.SIGINT)

    def interrupted(batches: Sequence[Batch]) -> StepResult:
        os.kill(os.getpid(), signal.SIGINT)
        assert trainer.stop.received
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError

    trainer._step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) == previous
    assert not (tmp_path / "run" / ".lock").exists()


def test_ignored_ctrl_c_stays_ignored(tmp_path):
    """As with nohup, or in a background job of a shell."""
    config = number_config(write_numbers(tmp_path), tmp_path / "run", max_steps=2)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = RecordingTrainer(config)
        step = trainer._step

        def interrupted(batches: Sequence[Batch]) -> StepResult:
            os.kill(os.getpid(), signal.SIGINT)
            return step(batches)

        trainer._step = interrupted  # type: ignore[method-assign]
        trainer.run()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert trainer.progress.step == 2
