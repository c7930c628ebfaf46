# SPDX-License-Identifier: Apache-2.0
"""Compares a training step of LITv2-S with Swin-T and ConvNeXt-T, in interleaved runs: time and peak memory.

    python benchmarks/training.py --threads 2
    python benchmarks/training.py --models litv2_small --modes eager --dtypes float32 --processes 1 2
    python benchmarks/training.py --device cuda --batch-size 128 --dtypes bfloat16

The step is the trainer's own (``classification/engine.py``): forward under autocast, cross-entropy, backward, clipping of the gradient
norm to 5.0, AdamW. Models and images are channels-last, drop path is 0.2, weights and images are random. LITv2 is also run with gradient
checkpointing. --processes 2 starts two processes that share the batch and the threads, with DistributedDataParallel (gloo on a CPU, NCCL
on GPUs). Memory is the peak of one process during a step minus what it held before: it includes activations, gradients and buffers, but
not the weights and the optimizer state; nor, with several processes, the gradients, for which DDP keeps its buffers. On a GPU,
``synchronisations`` counts how often a step waits for it. Compiling takes minutes per model on a CPU. On a CPU without bfloat16
instructions, torch emulates them twenty times slower than float32: allow an hour with --rounds 1 --warm-up 1. LITv2's eager blocks multiply
in float32 there (litv2/ops/block_forward/bfloat16.py).
Writes JSON, CSV and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from harness import (
    COLOURS,
    device_name,
    figure,
    milliseconds,
    parser,
    peak_memory,
    positive,
    publish,
    samples,
    say,
    synchronisations,
)
from litv2.errors import UserError, run_program
from models import CANDIDATES
from training_step import KNOWN, PRECISIONS, known_model, random_batch, training_step

# Modules of the trainer, which the harness makes importable.
# isort: split
import distributed

Case = tuple[str, str, str, str]  # model, mode, dtype, gradient checkpointing


def main() -> None:
    flags = parser(__doc__, "training")
    flags.add_argument("--models", nargs="+", default=["litv2_small", "swin_tiny_patch4_window7_224", "convnext_tiny"], choices=KNOWN)
    flags.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    flags.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=PRECISIONS)
    flags.add_argument("--grad-checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"], help="for LITv2; others: off")
    flags.add_argument(
        "--processes", nargs="+", type=positive, default=[1], metavar="N", help="numbers of processes, each with 1/N of the batch"
    )
    flags.add_argument("--batch-size", type=positive, default=16, help="total batch size of all processes")
    flags.add_argument("--img-size", type=positive, default=224)
    flags.add_argument("--device", type=device_name, default="cpu")
    args = flags.parse_args()
    if "compiled" in args.modes and not args.warm_up:
        flags.error("--warm-up 0 would time the first round, in which steps are compiled; use at least 1, or --modes eager")
    rows = [row for processes in args.processes for row in measured(processes, args)]
    title = f"training steps, batch {args.batch_size}, {args.img_size} x {args.img_size}, medians of {args.rounds} interleaved rounds"
    publish(rows, args.out, title, plot, device=args.device, batch_size=args.batch_size, img_size=args.img_size)


def measured(processes: int, args: argparse.Namespace) -> list[dict]:
    """Returns the rows for one number of processes."""
    if args.batch_size % processes:
        raise UserError(f"a batch of {args.batch_size} cannot be split evenly among {processes} processes")
    if processes == 1:
        return run(0, 1, args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(in_group, (processes, args, port, Path(folder) / "rows.json"), nprocs=processes)
        return json.loads((Path(folder) / "rows.json").read_text())


def in_group(rank: int, processes: int, args: argparse.Namespace, port: int, result: Path) -> None:
    """Runs one of several processes; the first one writes its measurements, since a step ends for all at the same time."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init(distributed.pick_device(args.device))
    try:
        rows = run(rank, processes, args)
        if rank == 0:
            result.write_text(json.dumps(rows))
    finally:
        distributed.shutdown()


def run(rank: int, processes: int, args: argparse.Namespace) -> list[dict]:
    warnings.filterwarnings("ignore")
    device = distributed.pick_device(args.device)
    threads = max(1, args.threads // processes)
    torch.set_num_threads(threads)
    torch.manual_seed(rank)
    batch = random_batch(args.batch_size // processes, args.img_size)
    steps: dict[Case, Callable[[], None]] = {}
    for name in args.models:
        for checkpointing in args.grad_checkpointing if name.startswith("litv2") else ["off"]:
            for mode in args.modes:
                step = training_step(known_model(name, checkpointing == "on"), batch, device, mode == "compiled")
                steps |= {(KNOWN[name].name, mode, dtype, checkpointing): partial(step, PRECISIONS[dtype]) for dtype in args.dtypes}
    if rank == 0:
        say(f"{processes} process(es): {args.warm_up} + {args.rounds} rounds of {len(steps)} steps; each is compiled in its first")
    seconds = samples(steps, args.rounds, args.warm_up, device=device)
    facts = {
        case: dict(memory_MiB=round(peak_memory(step, device) / 2**20), synchronisations=synchronisations(step, device))
        for case, step in steps.items()
    }
    return [row(case, processes, threads, values, args.batch_size) | facts[case] for case, values in seconds.items()]


def row(case: Case, processes: int, threads: int, seconds: list[float], batch_size: int) -> dict:
    """Returns a row of the table; threads and memory are per process."""
    return dict(zip(("model", "mode", "dtype", "checkpointing"), case)) | dict(
        processes=processes,
        threads=threads,
        **milliseconds(seconds),
        images_per_s=round(batch_size / statistics.median(seconds), 2),
    )


def plot(rows: list[dict], path: Path) -> None:
    """Plots the speed, with the range from p10 to p90, and the memory, with a bar per row of the table."""
    groups = {candidate.name: candidate.group for candidate in CANDIDATES}
    labels = [", ".join(row[key] for key in ("model", "mode", "dtype")) for row in rows]
    labels = [label + (", checkpointing" if row["checkpointing"] == "on" else "") for label, row in zip(labels, rows)]
    labels = [label + (f", {row['processes']} processes" if row["processes"] > 1 else "") for label, row in zip(labels, rows)]
    places, colours = [-i for i in range(len(rows))], [COLOURS[groups[row["model"]]] for row in rows]
    with figure(path, columns=2, size=(10, 1.2 + 0.28 * len(rows))) as (speed, memory):
        values = [row["images_per_s"] for row in rows]
        spans = [[row["images_per_s"] * (1 - row["ms"] / row["p90_ms"]) for row in rows]]
        spans += [[row["images_per_s"] * (row["ms"] / row["p10_ms"] - 1) for row in rows]]
        speed.barh(places, values, xerr=spans, color=colours, height=0.7, zorder=2, error_kw=dict(elinewidth=1))
        speed.set_yticks(places, labels)
        speed.set_xlabel("images/s, with p10 to p90")
        memory.barh(places, [row["memory_MiB"] for row in rows], color=colours, height=0.7, zorder=2)
        memory.set_yticks(places, [])
        memory.set_xlabel("peak memory of a step, MiB per process")


if __name__ == "__main__":
    sys.exit(run_program(main))
