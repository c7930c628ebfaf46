# SPDX-License-Identifier: Apache-2.0
"""The error policy: who sees one line, who a traceback, and which status the program ends with."""

from __future__ import annotations

import pytest

from litv2.errors import MissingPackage, UserError, listed, run_program


def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("error", [UserError("no such value: 7"), MissingPackage("pip install it"), FileNotFoundError("no file here")])
def test_a_users_mistake_is_one_line_and_status_2(error, capsys):
    assert run_program(raises(error)) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("x"), ImportError("y"), RuntimeError("z")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_program(raises(error))


def test_status_of_main_and_of_ctrl_c(capsys):
    assert run_program(lambda: None) == 0
    assert run_program(lambda: 5) == 5
    assert run_program(raises(KeyboardInterrupt())) == 130


def test_errors_are_what_callers_of_the_library_expect():
    assert issubclass(UserError, ValueError) and issubclass(MissingPackage, ImportError) and issubclass(MissingPackage, UserError)


def test_listed():
    assert listed([]) == "" and listed("ab") == "a, b"
    assert listed(range(12), limit=3) == "0, 1, 2 ... and 9 more"
