"""Ctrl-C and SIGTERM as requests that the loops see between steps, when everything can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequested(Exception):
    """A signal asked the run to end; it is raised between steps."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request; a second one acts at once.

    Python lets only the main thread handle signals: elsewhere they keep the meaning that the program gave them.
    """

    def __init__(self) -> None:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
