# SPDX-License-Identifier: Apache-2.0
"""Turns Ctrl-C and SIGTERM into requests that the loops check between steps, when everything can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequested(Exception):
    """A signal asked the run to stop; raised between steps."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request; a second one takes effect at once.

    Python handles signals in the main thread only; in other threads this does nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
