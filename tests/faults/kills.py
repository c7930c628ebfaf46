# SPDX-License-Identifier: Apache-2.0
"""``kill -9`` of a run at random moments, some of them while a checkpoint is written, until it is finished."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

from .runs import How, Run
from .tasks import Task, first_difference
from .trials import Bad, Fault, Stage, Trial, Whole, ending, finished, whole


class Kills(Fault):
    """A run is killed up to five times and resumed each time; then it may finish. One in four has two processes, and one in ten is the
    plain command, in a new interpreter."""

    def how(self, task: Task, number: int, rng: random.Random) -> How:
        return How(1 + (number % 4 == 3), rng.choice((0, 2)), (f"{task.wait}=120",), plain=number % 10 == 9)

    def happen(self, stage: Stage, expected: Whole, trial: Trial) -> None:
        trial.events, done = 0, 0  # kills, and steps that a run has reported
        lives = stage.rng.randint(2, 5)
        for life in range(lives + 1):
            run = stage.start()
            killed = _live(stage, run, trial, done, _moment(stage, run, expected.seconds) if life < lives else lambda: False)
            stage.check_nothing_lost(done, run, trial)
            done = max(done, run.done())
            if not killed:
                break
        finished(run)
        whole(stage)
        if where := first_difference(expected.figures, stage.figures(), "figures"):
            raise Bad(f"the end differs at {where}")
        stage.compare(expected, trial)


def _live(stage: Stage, run: Run, trial: Trial, done: int, moment: Callable[[], bool]) -> bool:
    """Watches a run until it is killed, at that moment, or ends; returns whether it was killed. Of two processes one or both are."""
    recovered = not trial.events  # the first run has nothing to make up

    def until() -> bool:
        nonlocal recovered
        if not recovered and run.done() > done:
            recovered = True
            trial.seconds.append(round(run.seconds(), 2))
        return moment()

    if not run.wait(until, pause=0.001):
        return False
    count = len(run.pids)
    run.kill([stage.rng.randrange(count)] if count > 1 and stage.rng.random() < 0.5 else None)
    trial.events += 1
    run.wait()
    ending(run)  # of the other process, if there is one
    return True


def _moment(stage: Stage, run: Run, duration: float) -> Callable[[], bool]:
    """When to kill a run: at a random time, or when it writes a checkpoint after a random step."""
    if stage.rng.random() < 0.7:
        seconds = stage.rng.uniform(0, duration)
        return lambda: run.seconds() > seconds
    step, folder = stage.rng.randrange(stage.task.updates), stage.task.folder(stage.out)

    def writes() -> bool:
        return folder.is_dir() and any(entry.name.endswith(".tmp") for entry in os.scandir(folder)) and run.done() >= step

    return writes


KILLS = Kills("kill -9", act=iter)
