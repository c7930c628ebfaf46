"""One policy of errors for every program of this repository.

* A user's mistake (a wrong flag, file, value or package) raises :class:`UserError`: one line on stderr, exit status 2.
* So does an ``OSError``: the disk is full, a folder may not be written, a server does not answer.
* Anything else is a bug of ours and keeps its traceback.

Layers and operators (``hilo.py``, ``layers.py``, ``mm_modules``) raise ``ValueError``, like torch's own: their caller is code. A
program that passes a user's values on to them turns that into a ``UserError`` where the values came in.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

__all__ = ["MissingPackage", "UserError", "listed", "run_program"]


class UserError(ValueError):
    """What the user gave cannot be used; the message names the value, what was expected and what to do."""


class MissingPackage(UserError, ImportError):
    """A package that this feature needs is not installed; the message names the command that installs it."""


def run_program(main: Callable[[], int | None]) -> int:
    """Runs ``main`` and returns the exit status: its own result, 2 after a user's mistake, 130 after Ctrl-C."""
    try:
        return main() or 0
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def listed(names: Iterable, limit: int = 10) -> str:
    """The first ``limit`` names, separated by commas, and how many more there are."""
    names = [str(name) for name in names]
    more = f" ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
