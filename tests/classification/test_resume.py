# SPDX-License-Identifier: Apache-2.0
"""Killed and resumed runs end in the very bits of the run that was never stopped; shards and batch counts may be uneven."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from functools import cache

import pytest

from helpers import run_ranks, run_trainer, same, start_trainer, write_images
from litv2.weights.reading import read_checkpoint

# Everything random at once: workers, mixup and cutmix, erasing, drop path, EMA, accumulation with a short last group.
OPTS = """TRAIN.EMA_DECAY 0.9 AUG.MIXUP 0.8 AUG.CUTMIX 1.0 AUG.REPROB 0.3 AUG.AUTO_AUGMENT rand-m9-mstd0.5-inc1
MODEL.DROP_PATH_RATE 0.2 MODEL.DROP_RATE 0.1 TRAIN.ACCUMULATION_STEPS 3 DATA.DATASET folder"""


def checkpoint_of(folder):
    return read_checkpoint(folder / "litv2_digits/default/latest.pth")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """100 images: 25 batches of 4, so 8 optimizer steps of 3 batches and one of a single batch."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", {"a": 50, "b": 50}, size=32)
    write_images(root / "val", {"a": 3, "b": 4}, size=32)
    return root


def flags_for(processes: int, images, out) -> list:
    return ["--data-path", images, "--output", out, "--batch-size", 4 // processes, "--workers", 2 // processes]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """Output folders of runs that were never stopped, by number of processes."""

    @cache
    def run(processes: int):
        out = tmp_path_factory.mktemp(f"whole{processes}")
        run_trainer(*flags_for(processes, images, out), opts=OPTS, processes=processes)
        return out

    return run


def kill_after(update: int, number: int, out, processes: int, flags) -> int:
    """Starts a run, sends it the signal once that many optimizer steps are done, returns its exit code."""
    metrics = out / "litv2_digits/default/metrics.jsonl"
    process = start_trainer(*flags, opts=OPTS, processes=processes)
    try:
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= update):
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=90)
        assert "saved at epoch" in output, output
        return process.returncode
    finally:
        process.kill()


@pytest.mark.extra
@pytest.mark.parametrize("processes, number", [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_resume_is_bit_for_bit(processes, number, images, whole, tmp_path):
    flags = flags_for(processes, images, tmp_path)
    code = kill_after(2, number, tmp_path, processes, flags)
    assert code == 128 + number if processes == 1 else code != 0
    stopped = checkpoint_of(tmp_path)["progress"]
    assert 0 < stopped["step"] < 25 and stopped["step"] % 3 == 0, "stopped within an epoch, between optimizer steps"
    run_trainer(*flags, opts=OPTS, processes=processes)
    expected, resumed = checkpoint_of(whole(processes)), checkpoint_of(tmp_path)
    assert expected["progress"]["epoch"] == 2 and expected["progress"]["updates"] == 18
    for key in expected.keys() - {"config", "versions"}:
        same(expected[key], resumed[key], key)
    files = [out / "litv2_digits/default/metrics.jsonl" for out in (whole(processes), tmp_path)]
    updates = [[json.loads(line)["update"] for line in file.read_text().splitlines()] for file in files]
    assert updates[0] == updates[1], "no row twice, none missing"


@pytest.mark.extra
def test_torchrun_restarts_by_itself(images, tmp_path):
    """A rank that dies without a word is started again by torchrun and goes on from the latest checkpoint."""
    process = start_trainer(
        *("--data-path", images, "--batch-size", 2, "--workers", 0, "--output", tmp_path),
        opts="SAVE_STEPS 5 TRAIN.EPOCHS 1 DATA.DATASET folder",
        processes=2,
        launcher=("--max-restarts=2",),
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "litv2_digits/default/latest.pth").is_file():
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.02)
        subprocess.run(["kill", "-9", children_of(process.pid)[-1]], check=True)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-3000:]
        assert re.search(r"resumed at epoch 0, step [1-9]", output), output[-3000:]
        assert checkpoint_of(tmp_path)["progress"]["epoch"] == 1
    finally:
        left = children_of(process.pid)
        process.kill()
        subprocess.run(["kill", "-9", *left], capture_output=True)


def children_of(pid: int) -> list[str]:
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()


@pytest.mark.extra
def test_two_processes_evaluate_as_one(tmp_path):
    """Five images on two ranks: shares of 3 and 2, two batches and one. Same numbers as one process, no hang."""
    root = write_images(tmp_path / "data/train", {"a": 6, "b": 6}).parent
    write_images(root / "val", {"a": 3, "b": 2})
    opts = "DATA.DATASET folder TRAIN.EPOCHS 1"
    flags = ("--data-path", root, "--workers", 1, "--batch-size", 2)
    run_trainer(*flags, "--output", tmp_path / "out", opts=opts)
    best = tmp_path / "out/litv2_digits/default/best.pth"
    lines = []
    for processes in (1, 2):
        done = run_trainer(*flags, "--resume", best, "--eval", "--output", tmp_path / f"eval{processes}", opts=opts, processes=processes)
        lines.append(re.findall(r"INFO (.*Acc@1.*|Accuracy of.*)", done.stdout))
        assert len(list((tmp_path / f"eval{processes}").rglob("log_rank*.txt"))) == processes
    assert lines[0] == lines[1] and lines[0][0].endswith("images 5")


@pytest.mark.extra
def test_streams_of_different_length_do_not_hang():
    """Ranks of a streaming reader with 3 and 5 batches train 3 steps each and end together."""
    code = """
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from data.dataset import Batch
from litv2.runs.unreadable import BadFiles
from engine import Progress, Step, train_one_epoch
from precision import Precision
class Scheduler:
    def step_update(self, update): pass
count = 3 if dist.get_rank() == 0 else 5
loader = [Batch(torch.randn(2, 4), torch.zeros(2, dtype=torch.long), ["x", "y"], []) for _ in range(count)]
model = DistributedDataParallel(nn.Linear(4, 3))
optimizer, progress = torch.optim.SGD(model.parameters(), lr=0.1), Progress()
step = Step(model, optimizer, Scheduler(), nn.CrossEntropyLoss(), Precision(torch.device("cpu")))
train_one_epoch(step, loader, 5, progress, accumulation=2, streaming=True, bad_files=BadFiles(0, print))
assert (progress.step, progress.updates) == (3, 2), progress
"""
    run_ranks(code)
