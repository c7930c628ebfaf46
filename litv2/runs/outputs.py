# SPDX-License-Identifier: Apache-2.0
"""What a run writes beside its checkpoints, log, metrics and curves: if that fails, the run says so once and goes on."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["LogFile", "Outputs"]

_usual_excepthook = threading.excepthook


class Outputs:
    """Tells by ``warn`` what cannot be written, the first time."""

    def __init__(self, warn: Callable[[str], object]):
        self.warn = warn
        self.failed: set[str] = set()
        threading.excepthook = _quiet_writers

    @contextmanager
    def writing(self, what: object) -> Iterator[None]:
        """In this block ``what`` is written; an OSError ends the block, but not the run."""
        try:
            yield
        except OSError as error:
            if str(what) not in self.failed:
                self.failed.add(str(what))
                self.warn(f"{what} cannot be written ({error.strerror or error}); the run goes on without")


def _quiet_writers(args: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread: its OSError shows up at the next point, too, and needs no traceback."""
    if not (issubclass(args.exc_type, OSError) and type(args.thread).__module__.startswith("tensorboard")):
        _usual_excepthook(args)


class LogFile(logging.FileHandler):
    """A log file that may fill its disk: what cannot be written is left out."""

    def __init__(self, filename: str, mode: str = "a"):
        super().__init__(filename, mode, encoding="utf-8")
        self._outputs = Outputs(lambda warning: print(f"warning: {warning}", file=sys.stderr))

    def emit(self, record: logging.LogRecord) -> None:
        with self._outputs.writing(self.baseFilename):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        stream, self.stream = self.stream, None  # the next record opens it again
        if stream is not None:
            with suppress(OSError):
                stream.close()  # with what it could not write
        raise  # to ``emit``

    def close(self) -> None:
        with suppress(OSError):
            super().close()
