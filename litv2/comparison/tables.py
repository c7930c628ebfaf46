# SPDX-License-Identifier: Apache-2.0
"""The tables of a comparison, each a heading and rows, and its curves."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..curves import Curve
from .paired import compare_mean_precision, compare_paired, holm
from .runs import PRECISION, RECALL, Run

__all__ = ["class_table", "curves", "figure_table", "paired_table", "setting_table", "short_names"]

Table = list[list]


def short_names(runs: Sequence[Run]) -> list[str]:
    """The folders without what they share."""
    shared = os.path.commonpath([run.folder.resolve() for run in runs])
    return [os.path.relpath(run.folder.resolve(), shared) for run in runs]


def figure_table(runs: Sequence[Run]) -> Table:
    """Of each figure of the reports the value in each run, and the 95 % interval where there is one."""
    rows: Table = [["figure", "run", "value", "low", "high"]]
    keys = dict.fromkeys(key for run in runs for key in run.summary if not key.endswith("_interval"))
    for key in keys:
        for name, run in zip(short_names(runs), runs):
            rows.append([key, name, run.summary.get(key, ""), *run.summary.get(f"{key}_interval", ["", ""])])
    return rows


def paired_table(runs: Sequence[Run]) -> Table:
    """Each run against the first on the same images. With more than two runs, p is also adjusted for their number; where images have any
    number of classes there is none."""
    first, *others = short_names(runs)
    if runs[0].several:
        differences = [compare_mean_precision(runs[0].targets, runs[0].scores, run.scores) for run in runs[1:]]
        rows: Table = [["run", "against", "difference of mAP in %", "low", "high"]]
        return rows + [[name, first, *difference] for name, difference in zip(others, differences)]
    tests = [compare_paired(runs[0].right, run.right) for run in runs[1:]]
    rows = [["run", "against", "only it is right", "only the other", "difference in %", "low", "high", "p (McNemar)", "p (Holm)"]]
    for name, test, adjusted in zip(others, tests, holm([test.p for test in tests])):
        rows.append([name, first, test.only_second, test.only_first, test.difference, test.low, test.high, test.p, adjusted])
    return rows


def setting_table(runs: Sequence[Run]) -> Table:
    """The keys of the configuration whose values differ."""
    known = [run for run in runs if run.settings]
    keys = sorted({key for run in known for key in run.settings})
    rows = [[key, *(run.settings.get(key, "") for run in runs)] for key in keys if len({str(run.settings.get(key)) for run in known}) > 1]
    return [["setting", *short_names(runs)], *rows]


def class_table(runs: Sequence[Run]) -> Table:
    """The recall of each class in each run in per cent, or its average precision where images have any number of classes, and how much it
    differs from the first run's at most; the largest first. A class that no image has is left out."""
    measure = PRECISION if runs[0].several else RECALL
    rows: Table = []
    for name, row in runs[0].classes.items():
        if row[measure]:
            values = [100 * float(run.classes[name][measure]) for run in runs]
            rows.append([name, int(row["images"]), *values, max((value - values[0] for value in values[1:]), key=abs)])
    return [["class", "images", *short_names(runs), f"difference of {measure}"], *sorted(rows, key=lambda row: -abs(row[-1]))]


def curves(runs: Sequence[Run]) -> dict[str, list[Curve]]:
    """Panels of curves over epochs, each with one of every run that has metrics."""
    accuracy, key_of_it = ("mAP", "map") if runs[0].several else ("Top-1 accuracy", "top1")
    panels: dict[str, list[Curve]] = {"Training loss": [], "Validation loss": [], accuracy: []}
    for name, run in zip(short_names(runs), runs):
        val = [row for row in run.metrics if row.get("kind") == "val"]
        if not val:
            continue
        per_epoch = val[-1]["update"] / val[-1]["epoch"]
        train = [row for row in run.metrics if row.get("kind") == "train"]
        panels["Training loss"].append(Curve([row["update"] / per_epoch for row in train], [row["loss"] for row in train], name, width=1))
        for title, key in (("Validation loss", "loss"), (accuracy, key_of_it)):
            panels[title].append(Curve([row["epoch"] for row in val], [row[key] for row in val], name, marker="."))
    return panels
