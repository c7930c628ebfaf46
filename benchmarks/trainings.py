# SPDX-License-Identifier: Apache-2.0
"""Trainings that a benchmark compares: runs of the classification trainer, resumed and not repeated, and intervals over their seeds."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from scipy import stats

from harness import ROOT

sys.path.insert(0, str(ROOT / "classification"))  # before this folder, which has a training.py of its own

# Of the trainer.
# isort: split
import main as trainer
from config import load_config
from metrics import read_metrics
from network import Build, build_model

RECIPE = ROOT / "classification/configs/litv2-imagenette.yaml"


def train(
    folder: Path, seed: int, data_path: Path, opts: Sequence[str], cfg: Path = RECIPE, build: Build = build_model
) -> dict[int, float]:
    """Trains, or goes on training, and returns the top-1 accuracy in percent after each evaluated epoch. A finished run is not repeated.

    Args:
        folder: of the run, OUTPUT/NAME/TAG.
        opts: KEY VALUE ... of the trainer.
        build: what makes the model.

    Raises:
        SystemExit: the run was stopped or failed; it has said why.
    """
    epochs = load_config(cfg, list(opts)).TRAIN.EPOCHS
    if epochs not in evaluations(folder):
        output, name, tag = folder.parents[1], folder.parent.name, folder.name
        flags = ["--cfg", cfg, "--data-path", data_path, "--output", output, "--tag", tag, "--seed", seed, "--workers", 0]
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with contextlib.redirect_stdout(sys.stderr):
                status = trainer.main([*map(str, flags), "--opts", *opts, "MODEL.NAME", name], build)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if status:
            sys.exit(status)
    return evaluations(folder)


def evaluations(folder: Path) -> dict[int, float]:
    """Returns the top-1 accuracy in percent by epoch of what a run has evaluated so far."""
    return {row["epoch"]: row["top1"] for row in read_metrics(folder) if row["kind"] == "val"}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns Student's 95 % interval of the mean of at least two values."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def judge(differences: Sequence[float], above: str, below: str) -> str:
    """Returns ``above`` or ``below`` if the interval of the mean lies on that side of 0, else "undecided"."""
    low, high = interval(differences)
    return above if low > 0 else below if high < 0 else "undecided"
