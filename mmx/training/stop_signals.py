"""SIGTERM, which schedulers send, and SIGINT (Ctrl+C): recorded at once, obeyed between two training steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopSignals:
    """Inside the context, SIGTERM and the first SIGINT only set `received`; the end restores the previous handlers.

    A second SIGINT has its previous handler, which ends the process at once. SIGINT that is ignored stays ignored, as
    in a process that a shell has started in the background.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopSignals:
        # Python allows only the main thread to set handlers; in another thread signals are left as they are.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in list(self._previous):
            self._restore(number)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            self._restore(number)

    def _restore(self, number: int) -> None:
        signal.signal(number, self._previous.pop(number) or signal.SIG_DFL)


def ignore_interrupt(worker: int) -> None:
    """Let a data worker go on after Ctrl+C, which a terminal sends to all processes: the step needs its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
