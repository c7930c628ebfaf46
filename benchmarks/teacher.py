# SPDX-License-Identifier: Apache-2.0
"""What a teacher adds to a small student: the trainer with and without DISTILL.TEACHER, on the same seeds.

    python benchmarks/teacher.py DIR --teacher examples/litv2_imagenette.safetensors      # DIR/train/CLASS/IMAGE, DIR/val/CLASS/IMAGE

Both runs of a seed have the same initial weights, order of images, augmentation and mixup: a teacher draws no random numbers. The student
has the recipe of examples/litv2_imagenette.safetensors at half the width, a quarter of the parameters, and images of 48 pixels. A run that
was stopped is resumed by the same command, and a finished one is not repeated. The interval is Student's, of the mean of the differences
between the runs of a seed; if it contains 0, the comparison is undecided.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

from harness import COLOURS, figure, fingerprint, parser, positive, publish, say
from litv2.errors import UserError, run_program
from trainings import interval, judge, train

STUDENT = "MODEL.LIT.EMBED_DIM 16 DATA.IMG_SIZE 48 TEST.IMG_SIZE 64".split()


def main() -> None:
    flags = parser(__doc__, "teacher", threads=False)
    flags.add_argument("data_path", type=Path, metavar="DIR")
    flags.add_argument("--teacher", required=True, metavar="FILE", help="DISTILL.TEACHER")
    flags.add_argument("--seeds", type=positive, default=3, metavar="N", help="at least 2 (default: 3)")
    flags.add_argument("--epochs", type=positive, default=8)
    flags.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="of the trainer, for all runs")
    args = flags.parse_args()
    if args.seeds < 2:
        raise UserError("--seeds 1: an interval needs at least 2")
    settings = ["TRAIN.EPOCHS", str(args.epochs), "TRAIN.WARMUP_EPOCHS", str(args.epochs // 10), "EVAL_FREQ", str(args.epochs), *args.opts]
    rows = []
    runs = args.out.with_name(f"{args.out.name}_runs") / "student"
    ways = {"alone": settings, "taught": [*settings, "DISTILL.TEACHER", args.teacher]}
    for seed in range(args.seeds):
        tags = {way: f"{way}-seed{seed}-{fingerprint(args.data_path.resolve(), opts)}" for way, opts in ways.items()}
        alone, taught = (train(runs / tags[way], seed, args.data_path, [*STUDENT, *ways[way]])[args.epochs] for way in ways)
        rows.append(dict(seed=seed, alone_top1=round(alone, 2), taught_top1=round(taught, 2), difference=round(taught - alone, 2)))
        say(f"seed {seed}: {alone:.2f} % alone, {taught:.2f} % with the teacher")
    publish(rows, args.out, verdict(rows), plot, teacher=args.teacher, epochs=args.epochs, opts=args.opts)


def verdict(rows: list[dict]) -> str:
    alone, taught, difference = ([row[name] for row in rows] for name in ("alone_top1", "taught_top1", "difference"))
    low, high = interval(difference)
    decided = judge(difference, "the teacher helps", "the teacher harms")
    return (
        f"top-1 of a student over {len(rows)} seeds: {fmean(alone):.1f} % alone, {fmean(taught):.1f} % with a teacher, "
        f"difference {fmean(difference):+.1f} ({low:+.1f} to {high:+.1f}): {decided}"
    )


def plot(rows: list[dict], path: Path) -> None:
    with figure(path, size=(5, 3)) as axes:
        for row in rows:
            axes.plot([0, 1], [row["alone_top1"], row["taught_top1"]], "o-", color=COLOURS["ours"])
        axes.set(xticks=[0, 1], xticklabels=["labels alone", "with a teacher"], xlim=(-0.3, 1.3), ylabel="top-1 (%)")


if __name__ == "__main__":
    sys.exit(run_program(main))
