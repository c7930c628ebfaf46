# SPDX-License-Identifier: Apache-2.0
"""One trial: a run meets a fault, has to end well or to go on, and is resumed; the end must be that of a run which nothing disturbs."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from .mounts import OWN_MOUNTS
from .runs import Hangs, How, Run
from .tasks import Task, first_difference


@dataclass
class Trial:
    """What came of it, as it is kept in the JSON file."""

    fault: str
    task: str
    processes: int
    number: int
    events: int = 1  # faults in this trial: kills of the run
    ended: str = ""  # how the run ended that met the fault
    problem: str | None = None  # None: nothing was lost
    seconds: list[float] = field(default_factory=list)  # from the start of each resumed run until it had made up what was lost
    equal: bool = False  # to the bit
    lost_steps: int = 0  # beyond the checkpoint period

    @property
    def resumes(self) -> bool:
        return "cannot resume" not in (self.problem or "")

    @property
    def key(self) -> tuple[str, str, int]:
        return self.fault, self.task, self.number


@dataclass(frozen=True)
class Whole:
    """The end of a run that nothing disturbs."""

    state: dict
    figures: list[dict]
    seconds: float


class Bad(Exception):
    """Something that must not happen, in one line."""


class Stage:
    """Where a trial takes place: its folder, its random numbers, and the task."""

    def __init__(self, task: Task, folder: Path, rng: random.Random, how: How):
        self.task, self.folder, self.rng, self.how = task, folder, rng, how
        self.out = folder / "out"
        self.out.mkdir(parents=True)
        self.runs: list[Run] = []
        self.mounted = False

    def start(self, prepare: Callable[[], object] = lambda: None, **changes) -> Run:
        """Starts the command, or resumes it: it is the same one."""
        said = self.folder / f"said{len(self.runs)}"
        said.mkdir()
        self.runs.append(Run(self.task, self.out, said, replace(self.how, **changes), prepare))
        return self.runs[-1]

    def reach(self, run: Run, least: int = 1) -> None:
        """Waits for a random step, at least ``least``, and leaves a few steps to come."""
        step = self.rng.randint(least, self.task.updates - 4)
        if not run.wait(lambda: run.done() >= step, pause=0.002):
            raise Bad(f"the run ended before the fault: {run.text()[-300:]}")

    @contextlib.contextmanager
    def disk(self) -> Iterator[Callable[[int], None]]:
        """The results go to a disk of their own. What is yielded fills it but for a number of bytes; in the end it is enlarged."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(self.out)], check=True)
        self.mounted = True

        def fill(leave: int) -> None:
            size = max(1, shutil.disk_usage(self.out).free - leave)
            subprocess.run(["fallocate", "-l", str(size), str(self.out / "other")], check=True)

        yield fill
        (self.out / "other").unlink()

    def checkpoints(self) -> list[Path]:
        """The newest first."""
        return self.task.checkpoints(self.task.folder(self.out))

    def state(self) -> dict:
        """Of the newest checkpoint."""
        return self.task.read(self.checkpoints()[0])

    def figures(self) -> list[dict]:
        return self.task.figures(self.task.folder(self.out))

    def compare(self, expected: Whole, trial: Trial) -> None:
        if where := first_difference(expected.state, self.state()):
            raise Bad(f"the end differs at {where}")
        trial.equal = True

    def check_nothing_lost(self, done: int, run: Run, trial: Trial) -> None:
        """Raises Bad if a run that was resumed after ``done`` steps says that it has gone further back than to the last checkpoint."""
        at = self.task.resumed_at(run.text())
        if at is None and run.done() < 1:
            return  # it was killed before it could say
        lost = done - (at or 0) - self.task.period
        if lost > 0:
            trial.lost_steps += lost
            raise Bad(f"{lost} steps lost beyond the checkpoint period: resumed at {at or 0} after {done}")

    def close(self) -> None:
        for run in self.runs:
            run.kill()
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.out)], check=True)


@dataclass(frozen=True)
class Fault:
    """``act`` makes the fault: it yields the run that has met it, and then repairs what is to be repaired."""

    name: str
    act: Callable[[Stage], Iterator[Run]]
    processes: int = 1
    workers: tuple[int, ...] = (0, 2)  # one of these
    settings: Callable[[Task], tuple[str, ...]] = lambda task: ()
    mounts: bool = False  # needs OWN_MOUNTS
    equal: bool = True  # in the end, since the run has used nothing that was wrong
    keeps: bool = True  # the checkpoints
    drafts: bool = False  # may be left until the run is resumed, as after a kill
    names: tuple[str, ...] = ()  # one of which must be in the line that the run ends with,
    says: bool = False  # and in what it says if it goes on

    def how(self, task: Task, number: int, rng: random.Random) -> How:
        return How(self.processes, rng.choice(self.workers), self.settings(task))

    def why_not(self) -> str | None:
        return "needs a mount namespace of its own" if self.mounts and not OWN_MOUNTS else None

    def happen(self, stage: Stage, expected: Whole, trial: Trial) -> None:
        """Raises Bad if the run does not end well, or is not resumed well."""
        steps = self.act(stage)
        try:
            run = next(steps)
            run.wait()
            trial.ended = ending(run)
            said = trial.ended if trial.ended.startswith("error") else "".join(map(run.text, range(len(run.said)))) if self.says else None
            if said is not None and self.names and not any(name in said for name in self.names):
                raise Bad(f"nothing is said of {' or '.join(self.names)}: {trial.ended}")
            if self.keeps:
                whole(stage, drafts=self.drafts or -signal.SIGKILL in run.codes())
            done = run.done()
            next(steps, None)
            again = stage.start(settings=())
            finished(again)
            trial.seconds.append(round(again.seconds(), 2))
            if self.keeps:
                stage.check_nothing_lost(done, again, trial)
            whole(stage)
            if self.equal:
                stage.compare(expected, trial)
        finally:
            steps.close()


def attempt(fault: Fault, stage: Stage, expected: Whole, trial: Trial) -> None:
    """Runs one trial and notes what came of it."""
    try:
        fault.happen(stage, expected, trial)
    except Hangs as error:
        trial.problem = f"hangs: {error}"
    except Bad as error:
        trial.problem = str(error)
    except Exception:  # of the campaign itself
        trial.problem = traceback.format_exc()
    finally:
        stage.close()


def ending(run: Run) -> str:
    """"went on", "killed", or the line that the run ended with.

    Raises:
        Bad: it ended without one, or with more than one.
    """
    lines = []
    for rank, code in enumerate(run.codes()):
        text = run.text(rank)
        if code == -signal.SIGKILL:
            continue  # by the fault
        if code < 0:
            raise Bad(f"rank {rank} died of signal {-code}: {text[-500:]}")
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        last = text.strip().splitlines()[-1] if text.strip() else ""
        if "Traceback (most recent call last)" in text:
            raise Bad(f"rank {rank} shows a traceback; its last line is {last!r}")
        if code and (len(errors) != 1 or last != errors[0]):
            raise Bad(f"rank {rank} ends with the status {code} and {len(errors)} lines of error; its last line is {last!r}")
        lines += errors[:1]
    return " | ".join(lines) or ("killed" if any(run.codes()) else "went on")


def finished(run: Run) -> None:
    """Waits for the end; raises Bad unless it is a good one."""
    run.wait()
    if any(run.codes()):
        raise Bad(f"cannot resume: statuses {run.codes()}, {run.text()[-500:]}")


def whole(stage: Stage, drafts: bool = False) -> None:
    """Raises Bad unless everything that lies in the run's folder is whole; ``drafts`` may lie there after a kill."""
    folder = stage.task.folder(stage.out)
    for path in folder.rglob("*"):
        try:
            if path.suffix == ".tmp" and not drafts:
                raise Bad("a draft has been left")
            if path.suffix == ".pth":
                stage.task.read(path)
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.name in ("metrics.jsonl", "scalars.json"):
                for row in path.read_text().splitlines():
                    json.loads(row)
        except Exception as error:
            raise Bad(f"{path.relative_to(folder)} is not whole: {error}") from error
