"""Commands in forked processes: killed at random moments, and several at once."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from mmx.cli import app as cli


def start_run(words: Sequence[str]) -> int:
    """Run the program in a forked process, which has the patches of the test. Returns its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.argv = ["mmx", *words]
            cli.main()
        except SystemExit as exit_error:
            code = exit_error.code or 0
        finally:
            os._exit(code)
    return child


def wait_for(child: int) -> int:
    """Return the exit code of a forked process."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def run_and_kill(words: Sequence[str], progress: Callable[[], int], more: int, pause: float) -> bool:
    """Run the program in a forked process and kill it shortly after its progress has grown by some items.

    Returns whether it was killed before its end.
    """
    before = progress()
    child = start_run(words)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if progress() >= before + more:
            time.sleep(pause)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return os.WIFSIGNALED(status)
        time.sleep(0.001)
    return False
