# SPDX-License-Identifier: Apache-2.0
"""Files appear whole or not at all, and one process at a time has a shared one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from helpers import ROOT
from litv2.errors import UserError
from litv2.files import atomic_write, one_process, remove_drafts


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as draft:
        draft.write_text("new")
        assert draft.parent == tmp_path and not path.exists()
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="there nobody can ask whether a process lives")
def test_drafts_of_killed_processes_are_removed_and_of_living_ones_are_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive = tmp_path / f"a.txt.{ended.pid}.tmp", tmp_path / f"a.txt.{os.getppid()}.tmp"
    others = tmp_path / f"b.txt.{ended.pid}.tmp"
    for draft in (dead, alive, others):
        draft.write_text("half")
    with atomic_write(tmp_path / "a.txt") as draft:
        draft.write_text("new")
    assert not dead.exists() and alive.exists() and others.exists()
    remove_drafts(tmp_path)
    assert alive.exists() and not others.exists() and (tmp_path / "a.txt").exists()


@pytest.mark.skipif(os.name == "nt", reason="there is no RLIMIT_FSIZE")
def test_what_does_not_fit_on_the_disk_leaves_nothing(tmp_path):
    """Files of at most 100 kB: half of a line, and a part of a checkpoint, fit. The errors name the files."""
    line, checkpoint = tmp_path / "lines", tmp_path / "latest.pth"
    line.write_bytes(b"x" * 99_990)
    program = f"""
import resource, sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from litv2.files import append_whole, atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
append_whole({str(line)!r}, "five\\n")
try:
    append_whole({str(line)!r}, "longer\\n")
except OSError as error:
    print(error)
try:
    with atomic_write({str(checkpoint)!r}) as draft, open(draft, "wb") as file:
        torch.save(torch.zeros(100_000), file)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert [out.endswith(repr(str(path))) for out, path in zip(done.stdout.splitlines(), (line, checkpoint))] == [True, True], done
    assert line.read_bytes() == b"x" * 99_990 + b"five\n" and list(tmp_path.iterdir()) == [line]


def test_one_process_at_a_time(tmp_path):
    """Two processes add 1 to a number fifty times each: none is lost."""
    path = tmp_path / "n"
    path.write_text("0")
    program = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from litv2.files import one_process
path = Path({str(path)!r})
for _ in range(50):
    with one_process(path):
        n = int(path.read_text()); time.sleep(0.001); path.write_text(str(n + 1))
"""
    both = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    with one_process(path):
        assert path.read_text() == "100"


def test_a_user_error_says_all_by_itself(tmp_path):
    """Also one that comes of an error of the system, such as a connection to a worker that has died: that is no failed write."""
    with pytest.raises(UserError, match="why"), atomic_write(tmp_path / "a"):
        try:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        except OSError as error:
            raise UserError("why") from error
    assert list(tmp_path.iterdir()) == []
