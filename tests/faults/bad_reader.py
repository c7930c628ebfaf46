# SPDX-License-Identifier: Apache-2.0
"""A reader that does what no reader may do: what the fuzzer must find. It works in new processes, as the others do."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from litv2.errors import UserError
from tests.faults import fuzz
from tests.faults.fuzz_readers import READERS, Reader

LETTERS = b"_abcdefgh"  # the inputs, in their order
OUTSIDE = Path(__file__).parents[2] / "outside"

_work = fuzz._work  # a test puts the following function in its place


def work(*arguments) -> None:
    """The process of the reader."""
    inputs = {f"0 bad {number}": bytes([letter]) for number, letter in enumerate(LETTERS)}
    prepared = [b"_"], lambda random, seeds: inputs[random], misbehave
    fuzz.Random = str
    READERS["bad"] = Reader(1, 64, "input", lambda folder: prepared)
    _work(*arguments)


def misbehave(path: Path) -> None:
    """Does what the letter in the file says."""
    letter = path.read_text()
    if letter == "a":
        raise UserError("one line")
    if letter == "b":
        raise KeyError("bare")
    if letter == "c":
        os.kill(os.getpid(), signal.SIGABRT)
    if letter == "d":
        while True:
            pass
    if letter == "e":
        os.system("true")
    if letter == "f":
        bytearray(200 << 20)
    if letter == "g":
        OUTSIDE.write_text("")
    if letter == "h":
        eval("1 + 1")
