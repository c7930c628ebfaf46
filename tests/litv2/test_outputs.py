# SPDX-License-Identifier: Apache-2.0
"""What a run writes beside its checkpoints does not stop it: it says so once and goes on."""

from __future__ import annotations

import errno
import logging
import os

import pytest

from litv2.runs.outputs import LogFile, Outputs


def test_each_output_is_reported_once():
    warnings: list[str] = []
    outputs = Outputs(warnings.append)
    for what in ("metrics", "metrics", "curves"):
        with outputs.writing(what):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [warning.partition(" ")[0] for warning in warnings] == ["metrics", "curves"] and "No space left" in warnings[0]
    with pytest.raises(ValueError), outputs.writing("metrics"):  # a bug is one
        raise ValueError


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is full")
def test_a_log_on_a_full_disk(tmp_path, capsys):
    """Lines that do not fit are left out; when there is space again, the log goes on."""
    path = tmp_path / "log.txt"
    path.symlink_to("/dev/full")
    handler = LogFile(str(path))
    log = logging.Logger("test")
    log.addHandler(handler)
    log.warning("one")
    log.warning("two")
    path.unlink()
    log.warning("three")
    log.warning("%d", "no number")  # a bug of the caller's is shown as ever
    handler.close()
    said = capsys.readouterr().err
    assert path.read_text() == "three\n"
    assert said.count("cannot be written (No space left on device)") == 1 and said.count("Traceback") == 1 and "%d format" in said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is full")
def test_closing_a_log_on_a_full_disk(tmp_path):
    path = tmp_path / "log.txt"
    path.symlink_to("/dev/full")
    handler = LogFile(str(path))
    handler.stream.write("left")
    handler.close()
