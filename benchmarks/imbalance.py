# SPDX-License-Identifier: Apache-2.0
"""What class weights and class-balanced sampling do for a data set whose classes differ tenfold in size.

    python benchmarks/imbalance.py --data-path DIR
    python benchmarks/imbalance.py --data-path DIR --seeds 0 1 2 3 4 --cfg classification/configs/litv2-small.yaml --opts TRAIN.EPOCHS 30

DIR holds train/CLASS/IMAGE and val/CLASS/IMAGE. A copy is thinned: every second class, in the order of their names, keeps a tenth of its
training images, the first ones; validation stays as it is. The trainer then runs with each way and seed, from scratch. By default the model
is that of litv2-imagenette.yaml with smaller images, fewer epochs and no moving average.

The balanced accuracy of the last weights, the mean recall of the classes, is listed for each way: its mean over the seeds with a 95 %
t-interval, and that of the differences to "plain" with the same seed. A difference whose interval contains 0 is "undecided". "rare" and
"frequent" are the mean recalls of the thinned classes and of the others. Runs are kept beside --out: the same command goes on where it was
stopped, and more seeds are added to those that are there.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path
from statistics import fmean

from harness import figure, fingerprint, parser, publish, say
from litv2.errors import UserError, run_program
from trainings import RECIPE, interval, judge, train

WAYS = {"plain": [], "weights": ["TRAIN.CLASS_WEIGHTS", "inverse"], "sampling": ["DATA.SAMPLING", "balanced"]}
SMALLER = "DATA.IMG_SIZE 32 TEST.IMG_SIZE 44 TRAIN.EPOCHS 30 TRAIN.WARMUP_EPOCHS 3 TRAIN.EMA_DECAY 0 EVAL_FREQ 30 DATA.NUM_WORKERS 0"


def main() -> None:
    flags = parser(__doc__, "imbalance", threads=False)
    flags.add_argument("--data-path", type=Path, required=True, metavar="DIR")
    flags.add_argument("--cfg", type=Path, default=RECIPE, metavar="FILE")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    flags.add_argument("--opts", nargs="+", default=SMALLER.split(), metavar="KEY VALUE", help=f"of the trainer; default: {SMALLER}")
    args = flags.parse_args()
    if len(args.seeds) < 2:
        raise UserError("an interval needs at least two --seeds")
    folder = args.out.resolve().with_name(f"{args.out.name}-runs") / fingerprint(args.data_path.resolve(), args.cfg.resolve(), args.opts)
    rare = thin(args.data_path, folder / "data")
    found = {way: [run(way, seed, folder, args) for seed in args.seeds] for way in WAYS}
    title = f"balanced accuracy with {len(rare)} classes thinned to a tenth, {len(args.seeds)} seeds"
    publish([row(way, found, rare) for way in WAYS], args.out, title, draw, data=args.data_path.name, opts=" ".join(args.opts))


def thin(source: Path, target: Path) -> set[str]:
    """Copies the data set, thinned, if that has not been done; returns the thinned classes."""
    classes = sorted(path.name for path in (source / "train").glob("*") if path.is_dir())
    rare = set(classes[1::2])
    if not rare:
        raise UserError(f"{source} has no two classes; expected {source}/train/CLASS/IMAGE")

    def left_out(folder: str, names: list[str]) -> list[str]:
        path = Path(folder)
        return sorted(names)[max(1, len(names) // 10) :] if path.parent.name == "train" and path.name in rare else []

    if not target.exists():
        draft = target.with_name("data.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        for split in ("train", "val"):
            shutil.copytree(source / split, draft / split, ignore=left_out)
        draft.rename(target)
    return rare


def run(way: str, seed: int, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Trains, unless that is done; returns the recall of each class."""
    say(f"{way}, seed {seed}")
    run_folder = folder / f"runs/{way}-{seed}"
    train(run_folder, seed, folder / "data", [*args.opts, *WAYS[way]], args.cfg.resolve())
    with open(run_folder / "report/classes.csv", newline="") as file:
        recalls = {line["class"]: 100 * float(line["recall"]) for line in csv.DictReader(file)}
    say(f"  balanced accuracy {fmean(recalls.values()):.2f} %")
    return recalls


def row(way: str, found: dict[str, list[dict[str, float]]], rare: set[str]) -> dict:
    balanced = {name: [fmean(recalls.values()) for recalls in runs] for name, runs in found.items()}
    differences = [a - b for a, b in zip(balanced[way], balanced["plain"])]
    low, high = interval(differences)
    return dict(
        way=way,
        balanced_accuracy=round(fmean(balanced[way]), 2),
        interval="{:.2f} to {:.2f}".format(*interval(balanced[way])),
        over_plain=None if way == "plain" else round(fmean(differences), 2),
        over_plain_interval=None if way == "plain" else f"{low:.2f} to {high:.2f}",
        verdict=None if way == "plain" else judge(differences, "better", "worse"),
        rare=round(fmean(recall for recalls in found[way] for name, recall in recalls.items() if name in rare), 2),
        frequent=round(fmean(recall for recalls in found[way] for name, recall in recalls.items() if name not in rare), 2),
    )


def draw(rows: list[dict], path: Path) -> None:
    with figure(path, size=(6, 3)) as axes:
        for i, kind in enumerate(("rare", "frequent", "balanced_accuracy")):
            places = [x + 0.25 * (i - 1) for x in range(len(rows))]
            axes.bar(places, [row[kind] for row in rows], 0.24, label=kind.replace("_", " "), zorder=2)
        axes.set_xticks(range(len(rows)), [row["way"] for row in rows])
        axes.set_ylabel("%")
        axes.legend()


if __name__ == "__main__":
    raise SystemExit(run_program(main))
