# SPDX-License-Identifier: Apache-2.0
"""The tables of a campaign, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from .kills import KILLS
from .trials import Trial


def tables(trials: list[Trial], skipped: dict[str, str]) -> str:
    groups: dict[tuple[str, str, int], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.fault, trial.task, trial.processes), []).append(trial)
    kills = [
        (task, processes, sum(t.events for t in group), len(group), sum(not t.equal for t in group), sum(not t.resumes for t in group),
         sum(t.lost_steps for t in group), _median(group))
        for (fault, task, processes), group in groups.items() if fault == KILLS.name
    ]  # fmt: skip
    others = [
        (fault, task, len(group), sum(t.problem is None for t in group), sum(t.problem is not None for t in group),
         sum(t.ended == "went on" for t in group), _median(group))
        for (fault, task, _), group in groups.items() if fault != KILLS.name
    ]  # fmt: skip
    parts = []
    if kills:
        heads = "task", "processes", "kills", "runs", "not bit-equal", "cannot resume", "steps lost", "median seconds to recover"
        parts.append(_table(heads, kills))
    if others:
        parts.append(_table(("fault", "task", "tried", "survived", "lost", "went on", "median seconds to recover"), others))
    parts += [f"{fault}: not tried, it {reason}" for fault, reason in skipped.items()]
    return "\n\n".join(parts)


def _table(heads: Iterable[str], rows: list[tuple]) -> str:
    lines = [tuple(heads), ("---",) * len(tuple(heads)), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _median(group: list[Trial]) -> str:
    seconds = [value for trial in group for value in trial.seconds]
    return f"{statistics.median(seconds):.1f}" if seconds else ""
