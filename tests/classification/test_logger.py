# SPDX-License-Identifier: Apache-2.0
"""The log's form, its colours and its files."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from helpers import ROOT
from logger import close_log, open_log

LINE = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d litv2_small_alpha_0\.9\] \(test_logger\.py \d+\): (\w+) (.*)"


def lines(text: str) -> list[tuple[str, str]]:
    """(level, message) of each line; all have the release's form."""
    return [re.fullmatch(LINE, line).groups() for line in text.splitlines()]


@pytest.mark.parametrize("rank, shown", [(0, ["INFO", "WARNING"]), (1, ["WARNING"])])
def test_lines(rank, shown, tmp_path, capsys):
    log = open_log("litv2_small_alpha_0.9", tmp_path / "run", rank)
    log.debug("too much")
    log.info("Train: [0/300][10/1251] 50 %")
    log.warning("careful")
    close_log(log)
    expected = [("INFO", "Train: [0/300][10/1251] 50 %"), ("WARNING", "careful")]
    assert lines((tmp_path / f"run/log_rank{rank}.txt").read_text()) == expected
    assert lines(capsys.readouterr().out) == [line for line in expected if line[0] in shown], "captured output is no terminal"


def test_a_second_run_goes_to_its_own_file_and_goes_on_in_it(tmp_path):
    for run, count in (("a", 1), ("b", 1), ("b", 2)):
        log = open_log("litv2_small_alpha_0.9", tmp_path / run)
        log.info("once")
        close_log(log)
        assert len(lines((tmp_path / run / "log_rank0.txt").read_text())) == count


@pytest.mark.parametrize("variables, coloured", [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours(variables, coloured, tmp_path):
    """Green and yellow on a terminal, unless it is asked not to; never in the file."""
    pty = pytest.importorskip("pty")
    code = "from pathlib import Path; from logger import open_log; open_log('small', Path('.')).info('hello')"
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "ANSI_COLORS_DISABLED")}
    environment |= {"PYTHONPATH": f"{ROOT / 'classification'}{os.pathsep}{ROOT}", "TERM": "xterm"} | variables
    master, terminal = pty.openpty()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=terminal, check=True)
    os.close(terminal)
    shown = os.read(master, 10_000).decode()
    os.close(master)
    green, yellow, plain = ("\x1b[32m", "\x1b[33m", "\x1b[0m") if coloured else ("", "", "")
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    parts = (green, r"\[" + time + r" small\]", plain, " ", yellow, r"\(<string> 1\)", plain, ": INFO hello\r\n")
    pattern = "".join(part if "\\" in part and "\x1b" not in part else re.escape(part) for part in parts)
    assert re.fullmatch(pattern, shown), repr(shown)
    assert re.fullmatch(rf"\[{time} small\] \(<string> 1\): INFO hello\n", (tmp_path / "log_rank0.txt").read_text())
