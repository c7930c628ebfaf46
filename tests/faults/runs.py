# SPDX-License-Identifier: Apache-2.0
"""A training in processes of its own, which can be watched, frozen and killed.

Most runs are forked from this process, which has imported everything already and has started no thread: the command's own main function is
called with its arguments. A killed process is as dead as any, and a run takes a second or two instead of ten.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from command_helpers import free_port
from litv2.errors import run_program

from .tasks import Task

PATIENCE = 600  # seconds after which a run hangs; the machine may be busy


class Hangs(Exception):
    """A run neither goes on nor ends."""


@dataclass(frozen=True)
class How:
    """A way to start a task's command."""

    processes: int = 1
    workers: int = 0  # that load data, of each process
    settings: tuple[str, ...] = ()  # KEY=VALUE
    plain: bool = False  # a new interpreter, or torchrun, instead of a fork


class Run:
    """One start of a task's command, with results in ``out``. Each process writes what it says to ``said``/rankN.txt."""

    def __init__(self, task: Task, out: Path, said: Path, how: How, prepare: Callable[[], object] = lambda: None):
        """``prepare`` is called first in each process that is forked."""
        self.plain = how.plain
        self.task, self.said = task, [said / f"rank{rank}.txt" for rank in range(1 if how.plain else how.processes)]
        self.start = time.monotonic()
        words = task.arguments(out, how.processes, how.workers, how.settings)
        if how.plain:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={how.processes}"] if how.processes > 1 else []
            line = [sys.executable, *launcher, str(task.script), *words]
            with open(self.said[0], "wb") as file:
                started = subprocess.Popen(
                    line, cwd=task.script.parent, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                )
            self.pids, self._codes = [started.pid], lambda: [started.poll()]
            return
        group = dict(WORLD_SIZE=how.processes, LOCAL_WORLD_SIZE=how.processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
        ranks = [{**group, "RANK": rank, "LOCAL_RANK": rank} if how.processes > 1 else {} for rank in range(how.processes)]
        fork = multiprocessing.get_context("fork").Process
        forks = [fork(target=_main, args=(task, words, said, env, prepare)) for said, env in zip(self.said, ranks)]
        for process in forks:
            process.start()
        self.pids, self._codes = [process.pid for process in forks], lambda: [process.exitcode for process in forks]

    def codes(self) -> list[int | None]:
        """Of each process its exit status: None while it runs, -N after signal N."""
        return self._codes()

    def text(self, rank: int = 0) -> str:
        return self.said[rank].read_text(errors="replace") if self.said[rank].is_file() else ""

    def done(self) -> int:
        return self.task.done(self.text())

    def wait(self, until: Callable[[], object] = lambda: False, pause: float = 0.01) -> bool:
        """Waits until that is so, or the run has ended; returns whether it has not ended.

        Raises:
            Hangs: neither has come about; the run has been killed.
        """
        deadline = time.monotonic() + PATIENCE
        while any(code is None for code in self.codes()):
            if until():
                return True
            if time.monotonic() > deadline:
                self.kill()
                raise Hangs(f"after {PATIENCE} seconds")
            time.sleep(pause)
        return False

    def seconds(self) -> float:
        return time.monotonic() - self.start

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def kill(self, ranks: list[int] | None = None) -> None:
        """``kill -9`` of these processes, or of all; waits for those."""
        self._signal(signal.SIGKILL, ranks)
        while any(self.codes()[rank] is None for rank in (range(len(self.pids)) if ranks is None else ranks)):
            time.sleep(0.005)

    def _signal(self, number: int, ranks: list[int] | None = None) -> None:
        for rank, pid in enumerate(self.pids):
            if (ranks is None or rank in ranks) and self.codes()[rank] is None:
                for process in (pid, *(children(pid) if self.plain else ())):  # torchrun, and its ranks
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, number)


def children(pid: int) -> list[int]:
    """The processes that this one has started."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _main(task: Task, words: list[str], said: Path, environment: dict[str, object], prepare: Callable[[], object]) -> None:
    """In a forked process, what ``python SCRIPT WORDS`` does."""
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # not those of pytest or others
    os.environ.update({key: str(value) for key, value in environment.items()})
    os.chdir(task.script.parent)
    sys.argv = [task.script.name, *words]
    prepare()
    sys.exit(run_program(task.main))
