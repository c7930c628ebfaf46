# SPDX-License-Identifier: Apache-2.0
"""Faults by the thousand: trainings that are killed, run out of disk, lose a process ..., and are resumed. From the repository's root:

    python -m tests.faults --times 20 --json output/faults.json
    python -m tests.faults --only "kill -9" --task classification --times 200 --json output/faults.json

A run that meets a fault has to go on or to end with one clear line; what it leaves is whole; and the same command resumes it, to the very
bits of the run that nothing has disturbed. Each trial is kept in the JSON file: an interrupted campaign goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # runs are forked, which a process with threads cannot do
sys.path[:0] = [str(Path(__file__).parents[1])]  # what the tests share
from . import mounts  # noqa: E402, F401, I001 # first: the process must not have started a thread

from litv2.errors import run_program  # noqa: E402
from litv2.files import atomic_write  # noqa: E402

from .faults import FAULTS  # noqa: E402
from .kills import KILLS  # noqa: E402
from .own_data import OWN_DATA  # noqa: E402
from .runs import How  # noqa: E402
from .tables import tables  # noqa: E402
from .tasks import TASKS, Task, first_difference  # noqa: E402
from .trials import Fault, Stage, Trial, Whole, attempt, finished  # noqa: E402


class Campaign:
    def __init__(self, seed: int, folder: Path, file: Path | None, processes: int | None):
        self.seed, self.folder, self.file, self.processes = seed, folder, file, processes
        self.trials: list[Trial] = []
        self.skipped: dict[str, str] = {}
        self._tasks: dict[str, Task] = {}
        self._whole: dict[tuple[str, int, bool], Whole] = {}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        if file is not None and file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            self.trials = [Trial(**trial) for trial in content["trials"]]

    def run(self, fault: Fault, name: str, times: int, deadline: float) -> None:
        """Makes the fault happen that many times, less those that have been kept."""
        if reason := fault.why_not():
            self.skipped[fault.name] = reason
            return
        number = 0
        while self._count(fault, name) < times and time.monotonic() < deadline:
            number += 1
            if (fault.name, name, number) not in {trial.key for trial in self.trials}:
                trial = self._try(fault, self._task(name), number)
                self.trials.append(trial)
                self._keep()
                print(f"{fault.name}, {name}, number {number}: {trial.problem or trial.ended}", file=sys.stderr, flush=True)

    def _count(self, fault: Fault, name: str) -> int:
        return sum(trial.events for trial in self.trials if (trial.fault, trial.task) == (fault.name, name))

    def _try(self, fault: Fault, task: Task, number: int) -> Trial:
        rng = random.Random(f"{self.seed}, {fault.name}, {task.name}, {number}")
        how = fault.how(task, number, rng)
        if fault is KILLS and self.processes:
            how = replace(how, processes=self.processes)
        folder = self.folder / task.name / f"{fault.name} {number}".replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        trial = Trial(fault.name, task.name, how.processes, number)
        attempt(fault, Stage(task, folder, rng, how), self._whole_run(task, how), trial)
        if trial.problem is None:
            shutil.rmtree(folder)
        return trial

    def _task(self, name: str) -> Task:
        if name not in self._tasks:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            self._tasks[name] = {**TASKS, **OWN_DATA}[name](self.folder / name / "data")
        return self._tasks[name]

    def _whole_run(self, task: Task, how: How) -> Whole:
        """Of a run that nothing disturbs."""
        key = task.name, how.processes, how.plain
        if key not in self._whole:
            folder = self.folder / task.name / f"whole-{how.processes}{'-plain' * how.plain}"
            stage = Stage(task, folder, random.Random(0), How(how.processes, plain=how.plain))
            run = stage.start()
            finished(run)
            self._whole[key] = Whole(stage.state(), stage.figures(), run.seconds())
            assert first_difference(self._whole_run(task, How(how.processes)).state, stage.state()) is None, "a fork is not the command"
        return self._whole[key]

    def _keep(self) -> None:
        if self.file is not None:
            with atomic_write(self.file) as draft:
                content = dict(seed=self.seed, trials=[asdict(trial) for trial in self.trials], skipped=self.skipped)
                draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__, formatter_class=as_written)
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--times", type=int, default=20, metavar="N", help="how often each happens to each task; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=names, metavar="FAULT", default=names, help=f"of: {', '.join(names)}")
    tasks = f"default: {', '.join(TASKS)}; the classifier with settings for own data: {', '.join(OWN_DATA)}"
    parser.add_argument("--task", nargs="+", choices=[*TASKS, *OWN_DATA], metavar="TASK", default=list(TASKS), help=tasks)
    parser.add_argument("--processes", type=int, choices=[1, 2], help="of runs that are killed; default: in one of four 2, otherwise 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no trial starts later")
    parser.add_argument("--json", type=Path, metavar="FILE", help="each trial is kept in it; those that it has are not run again")
    parser.add_argument("--folder", type=Path, help="for data and runs, those that failed are left; default: a temporary one")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    folder = args.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    campaign = Campaign(args.seed, folder.resolve(), args.json, args.processes)
    for name in args.task:
        for fault in FAULTS:
            if fault.name in args.only:
                campaign.run(fault, name, args.times, deadline)
    print(tables(campaign.trials, campaign.skipped))
    lost = [trial for trial in campaign.trials if trial.problem]
    for trial in lost:
        print(f"{trial.fault}, {trial.task}, number {trial.number}: {trial.problem}", file=sys.stderr)
    if not lost and not args.folder:
        shutil.rmtree(folder)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(run_program(main))
