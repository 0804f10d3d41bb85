"""SIGTERM, which schedulers send before they end a process: recorded at once, obeyed between two training steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class SigtermHandler:
    """Inside the context, SIGTERM only sets `received`; the previous handler is restored at the end."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> SigtermHandler:
        # Python allows only the main thread to set handlers; in another thread SIGTERM is left as it is.
        self._is_installed = threading.current_thread() is threading.main_thread()
        if self._is_installed:
            self._previous = signal.signal(signal.SIGTERM, self._record)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_installed:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = True
