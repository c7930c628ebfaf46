# SPDX-License-Identifier: Apache-2.0
"""Long runs, whose memory and file handles stay what they are: python -m tests.faults.long [--steps N] [--passes N] [--only WHAT...]

Each trainer is run as a user runs it, with a tiny model, for N steps; each native form of a model computes N small images, in a process
of its own. Printed are the resident memory and the open files after a quarter of the steps and after the last, and the slope between them,
fitted to all samples. What the process imports before its first step and writes after its last does not count.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from helpers import FAST, trainer_environment  # noqa: E402

__all__ = ["FORMS", "TRAINERS", "long_run", "main"]

PASS = """
import sys, torch
from helpers import normal, tiny_model
from litv2.inference.packed import packed_model
products = None if sys.argv[1] == "float32" else getattr(torch, sys.argv[1])
model = tiny_model().eval().requires_grad_(False)
form = packed_model(model, products) if products else packed_model(model)
images = [normal(i, 1 + i % 2, 3, 32, 32 + 32 * (i % 3)) for i in range(6)]
with torch.inference_mode():
    for number in range(int(sys.argv[2])):
        if number % 100 == 0:
            print("pass", number, flush=True)
        form(images[number % 6])
"""
PROGRESS = re.compile(r"pass \d+|Train: \[|(Epoch|Iter)\(train\)")  # in the output, of each form or trainer


def classification(folder: Path, steps: int) -> list[str]:
    epochs = -(-steps // 359)  # of 1437 digits, four at a time
    options = f"TRAIN.EPOCHS {epochs} TRAIN.WARMUP_EPOCHS 0 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0 EVAL_FREQ 1000".split()
    command = ["classification/main.py", "--cfg", "configs/litv2-digits.yaml", "--output", str(folder)]
    return [*command, "--opts", *FAST[:-6], *options]


def dense(task: str, folder: Path, steps: int) -> list[str]:
    from mm_helpers import SMALL_OPTIONS, own_project

    own_project(task, folder)
    options = [*SMALL_OPTIONS[task], f"data_root={folder / 'data'}", "load_from=None", "default_hooks.logger.interval=100"]
    length = f"train_cfg.max_epochs={-(-steps // 3)}" if task == "detection" else f"train_cfg.max_iters={steps}"
    options += [length, f"train_cfg.val_interval={steps}", f"default_hooks.checkpoint.interval={steps}"]
    command = [f"{task}/tools/train.py", str(folder / "mine.py"), "--work-dir", str(folder / "run")]
    return [*command, "--cfg-options", *options]


TRAINERS = {
    "classification": classification,
    "detection": lambda folder, steps: dense("detection", folder, steps),
    "segmentation": lambda folder, steps: dense("segmentation", folder, steps),
}
FORMS = {f"native form, {products}": products for products in ("float32", "bfloat16", "int8")}


def long_run(name: str, count: int, every: float = 0.2) -> dict[str, Any]:
    """Runs a trainer or a form for ``count`` steps or passes; returns its row of the table."""
    with tempfile.TemporaryDirectory(prefix="long-") as folder:
        if name in FORMS:
            line, place = ["-c", PASS, FORMS[name], str(count)], ROOT
        else:
            script, *arguments = TRAINERS[name](Path(folder), count)
            line, place = [str(ROOT / script), *arguments], ROOT / script.split("/")[0]
        environment = {**trainer_environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONWARNINGS": "ignore"}
        with open(Path(folder) / "log", "w+") as log:
            process = subprocess.Popen([sys.executable, *line], cwd=place, env=environment, stdout=log, stderr=log)
            samples = []  # (lines of progress so far, memory, files)
            while process.poll() is None:
                if sample := _sample(process.pid):
                    samples.append((len(PROGRESS.findall(Path(log.name).read_text())), *sample))
                time.sleep(every)
            log.seek(0)
            output = log.read()
            if process.returncode:
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{output[-3000:]}")
    lines = len(PROGRESS.findall(output))
    values = np.array([sample[1:] for sample in samples if 0 < sample[0] < lines], dtype=float)
    if len(values) < 8:
        raise RuntimeError(f"{name}: {len(values)} samples of {count} steps or passes, expected at least 8; make it longer")
    kept = values[len(values) // 4 :]
    at = np.linspace(0.25 * count, count, len(kept))
    (first, first_files), (last, last_files) = kept[0], kept[-1]
    slope = 1024 * 1000 * np.polyfit(at, kept[:, 0], 1)[0]
    memory = dict(first_mib=round(first, 1), last_mib=round(last, 1), kib_per_1000=round(slope, 1))
    return dict(run=name, count=count, **memory, first_files=int(first_files), last_files=int(last_files))


def _sample(process: int) -> tuple[float, int] | None:
    """The resident memory in MiB and the open files of a process; None if it has just ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(resident.split()[1]) / 1024, len(list(Path(f"/proc/{process}/fd").iterdir()))
    except (OSError, StopIteration):
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.long", description="Memory and file handles of long runs.")
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="of each trainer")
    parser.add_argument("--passes", type=int, default=100_000, metavar="N", help="of each native form")
    names = [*TRAINERS, *FORMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="WHAT", help=f"of {', '.join(names)}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    rows = []
    print("| run | steps or passes | first MiB | last MiB | KiB per 1000 | first files | last files |\n|" + "---|" * 7)
    for name in args.only:
        row = long_run(name, args.passes if name in FORMS else args.steps)
        rows.append(row)
        cells = f"{row['count']:,}", *(row[key] for key in ("first_mib", "last_mib", "kib_per_1000", "first_files", "last_files"))
        print("|", name, "|", " | ".join(map(str, cells)), "|", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
