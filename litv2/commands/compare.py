# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 compare RUN RUN...: figures, settings, curves and classes of trainings, and whether they differ by more than chance."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from ..comparison.runs import check_same_images, read_run
from ..comparison.tables import class_table, curves, figure_table, paired_table, setting_table
from ..curves import save_curves
from ..errors import MissingPackage, UserError
from ..files import atomic_write
from . import print_notes, print_table

PRINTED = 20  # classes; the file has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="the trainer's folders OUTPUT/NAME/TAG, the baseline first")
    parser.add_argument("--out", default=Path("compared"), type=Path, metavar="DIR", help="for the tables and curves; default: compared")


def run(args: argparse.Namespace) -> None:
    if len({folder.resolve() for folder in args.runs}) < max(2, len(args.runs)):
        raise UserError(f"expected two runs or more, each given once, got {' '.join(map(str, args.runs))}")
    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise MissingPackage(f"{error}; comparing runs needs: pip install 'litv2[train]'") from error
    runs = [read_run(folder) for folder in args.runs]
    check_same_images(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, table in dict(figures=figure_table, paired=paired_table, settings=setting_table, classes=class_table).items():
        rows = table(runs)
        with atomic_write(args.out / f"{name}.csv") as draft, open(draft, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        shown = rows[: PRINTED + 1] if name == "classes" else rows
        print(f"{name}:")
        print_table([tuple(map(_short, row)) for row in shown])
        print(f"... and {len(rows) - len(shown)} more\n" if len(shown) < len(rows) else "")
    save_curves(args.out / "curves.png", curves(runs), xlabel="epoch", units={"Top-1 accuracy": "%", "mAP": "%"})
    print(f"-> {args.out / 'curves.png'}, and these tables as {args.out / '*.csv'}")
    print_notes([f"{run.folder} has no metrics.jsonl: there is no curve of it" for run in runs if not run.metrics])
    print_notes([f"{run.folder} has no config.yaml: its settings are unknown" for run in runs if not run.settings])


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
