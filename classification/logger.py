# SPDX-License-Identifier: Apache-2.0
"""The log of a run in the release's format: lines on rank 0's terminal, and log_rank{N}.txt of every process.

    [2022-06-16 12:00:00 litv2_small] (main.py 190): INFO Train: [0/300][10/1251] eta 0:07:02 ...

On a terminal the time and the name are green, the file and the line yellow; there are no colours in files and pipes, or if NO_COLOR
is set.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from termcolor import colored
from tqdm import tqdm

from litv2.runs.outputs import LogFile

LOG = "log_rank{}.txt"
_RUN, _PLACE, _TEXT = "[%(asctime)s %(run)s]", "(%(filename)s %(lineno)d)", ": %(levelname)s %(message)s"


class _AboveTheBar(logging.Handler):
    """Writes to stdout without tearing tqdm's progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def open_log(name: str, folder: Path, rank: int = 0) -> logging.Logger:
    """Opens the logger of the run ``name``; ranks other than 0 print only warnings to the terminal. Close it with ``close_log``."""
    folder.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("litv2.classification")
    close_log(log)  # left by an earlier run in the same process
    log.setLevel(logging.INFO)
    log.propagate = False

    terminal = _AboveTheBar(logging.INFO if rank == 0 else logging.WARNING)
    terminal.setFormatter(_formatter(name, f"{colored(_RUN, 'green')} {colored(_PLACE, 'yellow')}"))
    file = LogFile(str(folder / LOG.format(rank)))
    file.setFormatter(_formatter(name, f"{_RUN} {_PLACE}"))
    for handler in (terminal, file):
        log.addHandler(handler)
    return log


def close_log(log: logging.Logger) -> None:
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


def _formatter(name: str, start: str) -> logging.Formatter:
    return logging.Formatter(start + _TEXT, datefmt="%Y-%m-%d %H:%M:%S", defaults={"run": name})
