# SPDX-License-Identifier: Apache-2.0
"""The error policy of every program in this repository.

* A user error (a wrong flag, file, value or package) raises :class:`UserError`: one line on stderr, exit status 2.
* An ``OSError`` (full disk, read-only folder, unreachable server) and a lack of memory are reported in the same way.
* Anything else is a bug in this repository and keeps its traceback.

Layers and operators (``hilo.py``, ``layers.py``, ``mm_modules``) raise ``ValueError``, as torch's do, since they are called by
code. A program that passes user input on to them converts it to a ``UserError`` where the input enters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

__all__ = ["MissingPackage", "UserError", "listed", "printable", "run_program"]


LONGEST_MESSAGE = 2000  # characters


class UserError(ValueError):
    """Invalid user input; the message names the value, what was expected and what to do.

    What it quotes may come from an untrusted file: control characters, which could steer a terminal, are shown as ``\\x1b``, and a long
    message loses its middle.
    """

    def __str__(self) -> str:
        return _shortened(printable(_shortened(super().__str__())))


def printable(text: object) -> str:
    """Returns the text with control characters, and bytes that are no text, as ``\\x1b``."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in str(text))


def _shortened(text: str) -> str:
    half = LONGEST_MESSAGE // 2 - 5
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


class MissingPackage(UserError, ImportError):
    """A package required by a feature is not installed; the message names the command that installs it."""


def run_program(main: Callable[[], int | None]) -> int:
    """Runs ``main`` and returns the exit status: that of ``main``, 2 after a user error, 130 after Ctrl-C."""
    try:
        return main() or 0
    except BrokenPipeError:  # the reader of the pipe, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError, MemoryError) as error:
        print(f"error: {error or 'memory ran out'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def listed(names: Iterable, limit: int = 10) -> str:
    """Joins the first ``limit`` names with commas and appends how many more there are."""
    names = [str(name) for name in names]
    more = f" ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
