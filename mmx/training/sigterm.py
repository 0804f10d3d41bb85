"""SIGTERM, which schedulers send before they take a machine away: noted at once, obeyed between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class SigtermHandler:
    """While entered, SIGTERM only sets `raised`; afterwards it does again what it did before."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> SigtermHandler:
        # Python lets only the main thread set handlers; trained from another one, SIGTERM keeps its meaning.
        self._mine = threading.current_thread() is threading.main_thread()
        if self._mine:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
