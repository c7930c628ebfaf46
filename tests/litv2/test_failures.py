# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on the machine is said in one line, which names the processes that do not answer; a bug keeps its traceback."""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import socket
import subprocess
import sys
from multiprocessing import queues
from multiprocessing.connection import Connection

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from command_helpers import free_port
from helpers import ROOT
from litv2.errors import UserError
from litv2.runs.failures import in_one_line, start_worker


class Failing(Dataset):
    """Its only sample fails, in the process of a worker."""

    def __init__(self, failure):
        self.failure = failure

    def __getitem__(self, index: int):
        if isinstance(self.failure, BaseException):
            raise self.failure
        os.kill(os.getpid(), self.failure)

    def __len__(self) -> int:
        return 1


@pytest.mark.extra  # torch waits some seconds for workers of loaders that an error has ended
@pytest.mark.parametrize(
    "failure, line",
    [
        (9, r"the data-loading worker \d+ (is killed by signal: Killed|exited unexpectedly): often memory or file handles ran out.*"),
        (OSError(errno.EACCES, "Permission denied", "a.png"), r"\[Errno 13\] Permission denied: 'a.png'"),
        (OSError(errno.EMFILE, "Too many open files", "a.png"), "Too many open files: raise the limit with ulimit -n.*"),
        (MemoryError("what was asked for"), r"memory ran out \(.*"),
        (UserError("no image at all"), "no image at all"),
    ],
)
def test_failures_of_workers(failure, line):
    with pytest.raises(UserError) as raised, in_one_line():
        list(DataLoader(Failing(failure), num_workers=1))
    (said,) = str(raised.value).splitlines()
    assert re.fullmatch(line, said), said


def without_handles(samples: list) -> torch.Tensor:
    """Uses up the file handles of the worker, which cannot send this batch then."""
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    return torch.zeros(3)


@pytest.mark.extra
def test_a_worker_that_cannot_send_ends():
    """It would only print a traceback, and the loader would wait for ever; the time limit, with another error, is that of this test."""
    line = r"^the data-loading worker \d+ exited unexpectedly: often memory or file handles ran out"
    start = functools.partial(start_worker, None)
    with pytest.raises(UserError, match=line), in_one_line():
        list(DataLoader([0], num_workers=1, timeout=60, collate_fn=without_handles, worker_init_fn=start))


def test_a_worker_that_dies_while_a_file_is_written(tmp_path):
    """torch raises its error in whatever runs, here in torch.save, which raises its own."""

    class File(io.FileIO):
        def write(self, data) -> int:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.raises(UserError, match="^the data-loading worker 7 is killed"), in_one_line(), File(tmp_path / "a.pth", "w") as file:
        torch.save(torch.zeros(3), file)


@pytest.mark.parametrize("sent, line", [(b"", "it sends nothing"), (None, "Connection reset by peer")])
def test_a_worker_that_dies_while_it_sends(sent, line):
    """The rest of a batch comes by a socket: the trainer may be reading from it."""
    ours, theirs = socket.socketpair()
    with ours, pytest.raises(UserError, match=f"^a data-loading worker was killed or has exited .*{line}.*often memory"), in_one_line():
        connection = Connection(ours.detach())
        if sent is None:  # what the worker has not read yet resets its end
            connection.send_bytes(b"a question")
        theirs.close()
        connection.recv_bytes()


@pytest.mark.parametrize("error, shown", [(ConnectionResetError(), ""), (EOFError(), ""), (KeyError("a"), "KeyError: 'a'\n")])
def test_a_worker_whose_trainer_has_ended_shows_no_traceback(error, shown, monkeypatch, capsys):
    monkeypatch.setattr(queues.Queue, "_on_queue_feeder_error", None)
    monkeypatch.setattr(sys, "excepthook", None)
    start_worker(None, 0)
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == shown


def test_a_server_that_ends_is_no_worker():
    with pytest.raises(ConnectionResetError), in_one_line():
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


def test_memory():
    with pytest.raises(UserError, match=r"^memory ran out \(.*allocate"), in_one_line():
        torch.empty(1 << 62, dtype=torch.uint8)


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("shapes"), OSError(errno.ENOSPC, "No space", "a.pth"), UserError("a")])
def test_others_pass(error):
    with pytest.raises(type(error)) as raised, in_one_line():
        raise error
    assert raised.value is error


@pytest.mark.extra
def test_a_bug_in_a_worker_keeps_its_traceback():
    with pytest.raises(KeyError, match="Traceback"), in_one_line():
        list(DataLoader(Failing(KeyError("a")), num_workers=1))


@pytest.mark.extra
@pytest.mark.parametrize("dead", [0, 1])  # rank 0 keeps what the others know of each other
def test_two_of_three_processes_name_the_third(dead):
    program = f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
from litv2.runs.failures import in_one_line, start_worker
dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == {dead}:
    os.kill(os.getpid(), 9)
with in_one_line():
    while True:
        dist.all_reduce(torch.zeros(3))
"""
    group = dict(WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    line = [sys.executable, "-c", program]
    ranks = [subprocess.Popen(line, env={**os.environ, **group, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(3)]
    said = [process.communicate(timeout=240)[1] for process in ranks]
    for rank in {0, 1, 2} - {dead}:
        assert f"UserError: rank {dead} of 3 has ended or hangs (" in said[rank], said[rank]
