# SPDX-License-Identifier: Apache-2.0
"""What can go wrong in a training, made to happen for real: by the kernel where it can be had without rights."""

from __future__ import annotations

import builtins
import ctypes
import errno
import fnmatch
import io
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from .kills import KILLS
from .runs import Run, children
from .tasks import Task
from .trials import Fault, Stage

TIMEOUT = 10  # seconds that processes wait for each other, where one hangs


class FullDisk:
    """Writes to files whose names match have no space left, from the signal SIGUSR1 on; other files are as ever.

    The kernel says so: the files become /dev/full.
    """

    def __init__(self, *patterns: str):
        self.patterns, self.full = patterns, False

    def __call__(self) -> None:
        """In the process of the run."""
        self.device, self.files, self.open = os.open("/dev/full", os.O_WRONLY), [], builtins.open
        builtins.open = io.open = self._open
        signal.signal(signal.SIGUSR1, self._fill)

    def _open(self, path, mode="r", *args, **kwargs):
        writes = not isinstance(path, int) and set(mode) & set("wax+")
        if not (writes and any(fnmatch.fnmatch(os.path.basename(os.fsdecode(path)), pattern) for pattern in self.patterns)):
            return self.open(path, mode, *args, **kwargs)
        file = self.open("/dev/full" if self.full else path, mode, *args, **kwargs)
        self.files.append(file)
        return file

    def _fill(self, *_) -> None:
        self.full = True
        for file in self.files:
            if not file.closed:
                os.dup2(self.device, file.fileno())


def full_for(*patterns: str, least: int = 1):
    def act(stage: Stage) -> Iterator[Run]:
        run = stage.start(prepare=FullDisk(*patterns))
        stage.reach(run, least)
        os.kill(run.pids[0], signal.SIGUSR1)
        yield run

    return act


def disk_full(stage: Stage) -> Iterator[Run]:
    """While a checkpoint is written: some bytes of it fit."""
    with stage.disk() as fill:
        run = stage.start()
        stage.reach(run, least=stage.task.period)
        run.wait(stage.checkpoints)
        with run.frozen():
            size = stage.checkpoints()[0].stat().st_size
            fill(stage.rng.randrange(size))
        yield run


def folder_removed(stage: Stage) -> Iterator[Run]:
    run = stage.start()
    stage.reach(run)
    with run.frozen():
        shutil.rmtree(stage.task.folder(stage.out))
    yield run


def permission_lost(stage: Stage) -> Iterator[Run]:
    run = stage.start(prepare=obey_permissions)
    stage.reach(run)
    folders = [path for path in (stage.out, *stage.out.rglob("*")) if path.is_dir()]
    with run.frozen():
        for folder in folders:
            folder.chmod(0o555)
    yield run
    for folder in folders:
        folder.chmod(0o755)


def obey_permissions() -> None:
    """For root: without the capabilities CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH it is refused as others are."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the interface's version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable of capabilities 0 to 31, then of the others
    if libc.capget(header, sets) == 0:
        for i in range(3):
            sets[i] &= ~0b110
        libc.capset(header, sets)


def worker_killed(stage: Stage) -> Iterator[Run]:
    run = stage.start()
    stage.reach(run)
    with run.frozen():
        os.kill(stage.rng.choice(children(run.pids[0])), signal.SIGKILL)
    yield run


def rank_killed(stage: Stage) -> Iterator[Run]:
    run = stage.start()
    stage.reach(run)
    run.kill([stage.rng.randrange(2)])
    yield run


def rank_hangs(stage: Stage) -> Iterator[Run]:
    """The other one must not wait longer than it was told to."""
    run, rank = stage.start(), stage.rng.randrange(2)
    stage.reach(run)

    def other_ended() -> bool:
        os.kill(run.pids[rank], signal.SIGSTOP)  # again and again: who pauses a whole machine wakes it, too
        return run.codes()[1 - rank] is not None

    run.wait(other_ended)
    run.kill([rank])
    yield run


def clock_jumps(stage: Stage) -> Iterator[Run]:
    """In every run by days, back and forth; the files of a killed run have any time."""
    run = stage.start(prepare=Clock(stage.rng.random()))
    stage.reach(run, least=stage.task.period)
    run.wait(stage.checkpoints)
    run.kill()
    files = [path for path in stage.out.rglob("*") if path.is_file()]
    for path in files:
        moment = time.time() + stage.rng.uniform(-2, 2) * 86400
        os.utime(path, (moment, moment))
    yield run


class Clock:
    def __init__(self, seed: float):
        self.rng = random.Random(seed)

    def __call__(self) -> None:
        now = time.time
        time.time = lambda: now() + self.rng.choice([-1, 0, 0, 0, 1]) * 86400


def too_many_files(stage: Stage) -> Iterator[Run]:
    run = stage.start()
    stage.reach(run)
    with run.frozen():
        for pid in (run.pids[0], *children(run.pids[0])):
            number = len(os.listdir(f"/proc/{pid}/fd")) + stage.rng.randrange(3)
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (number, hard))  # as ulimit -Sn
    yield run


def memory_refused(stage: Stage) -> Iterator[Run]:
    """Some more is had, for a moment."""
    run = stage.start()
    stage.reach(run)
    with run.frozen():
        for pid in (run.pids[0], *children(run.pids[0])):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
            size = pages * resource.getpagesize() + stage.rng.randrange(4 << 20)
            resource.prlimit(pid, resource.RLIMIT_AS, (size, size))
    yield run


def data_changed(stage: Stage) -> Iterator[Run]:
    """An image is removed, cut off or overwritten."""
    run = stage.start()
    stage.reach(run)
    image = stage.rng.choice(stage.task.images())
    before = image.read_bytes()
    try:
        with run.frozen():
            image.unlink()
            if content := stage.rng.choice([b"", before[:40], b"no image"]):
                image.write_bytes(content)
        yield run
    finally:
        image.write_bytes(before)


def brief_waits(task: Task) -> tuple[str, ...]:
    return (f"{task.wait}={TIMEOUT}",)


def no_bad_files(task: Task) -> tuple[str, ...]:
    return (f"{task.bad_files}=0",)


SPACE, NO_FILE = (os.strerror(errno.ENOSPC),), (os.strerror(errno.ENOENT),)

FAULTS: list[Fault] = [
    KILLS,
    Fault("disk full: checkpoint", disk_full, mounts=True, names=SPACE),
    Fault("disk full: log line", full_for("log_rank*.txt", "*.log"), names=SPACE, says=True),
    Fault("disk full: metrics", full_for("metrics.jsonl", "scalars.json", "2*.json"), names=SPACE, says=True),
    Fault("disk full: TensorBoard event", full_for("events.out.tfevents*"), names=SPACE, says=True),
    Fault("disk full: picture", full_for("*.png*"), names=SPACE, says=True),
    Fault("folder removed", folder_removed, keeps=False, names=NO_FILE),
    Fault("permission lost", permission_lost, drafts=True, names=(os.strerror(errno.EACCES),)),  # removing one needs it, too
    Fault("worker killed", worker_killed, workers=(2,), names=("data-loading worker",)),
    Fault("rank killed", rank_killed, processes=2, names=("rank 0", "rank 1")),
    Fault("rank hangs", rank_hangs, processes=2, settings=brief_waits, names=("rank 0", "rank 1")),
    Fault("clock jumps", clock_jumps),
    Fault("open-file limit", too_many_files, names=(os.strerror(errno.EMFILE), "file handles")),
    Fault("memory refused", memory_refused, names=("memory",)),
    Fault("image gone or damaged", data_changed, equal=False),
    Fault("image gone or damaged, none allowed", data_changed, settings=no_bad_files, names=("unreadable",)),
]
