# SPDX-License-Identifier: Apache-2.0
"""What the trainers of others keep when they are killed, beside ours (``python -m tests.faults --only "kill -9"``).

    python benchmarks/kills.py --kills 20
    python benchmarks/kills.py --trainers timm mmengine

Hugging Face's Trainer, timm's parts (CheckpointSaver, resume_checkpoint and its recovery files, put together as in its training script) and
mmengine's Runner train the same small network with dropout on the same random images for 48 steps of 6 epochs, saving every 4 steps. Each
run is killed with ``kill -9`` after a random step, once to three times, and resumed as the trainer's documents say, with its newest
checkpoint. Then its weights are compared with those of a run that was not killed; that two such runs are equal is checked first.

A run is "stuck" if it cannot be resumed. "repeated" are steps after the last kill that were trained again although a checkpoint after them
had been due, "skipped" those that no process has trained.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from harness import parser, publish, say

EPOCHS, BATCHES, BATCH, PERIOD = 6, 8, 4, 4
STEPS = EPOCHS * BATCHES
TRAINERS = ["transformers", "timm", "mmengine"]


class Images(Dataset):
    """Random images, with noise as their augmentation."""

    def __len__(self) -> int:
        return BATCHES * BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return dict(inputs=image + 0.1 * torch.randn(3, 32, 32), labels=torch.tensor(index % 10))


def network() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 256, 8, 4), nn.GELU(), nn.Dropout(0.2), nn.Flatten())
    return nn.Sequential(stem, nn.Linear(256 * 49, 256), nn.GELU(), nn.Linear(256, 10))


def done(step: int) -> None:
    """A step is done; the process that kills reads it."""
    print(f"step {step}", flush=True)
    time.sleep(0.02)


def train_transformers(folder: Path) -> nn.Module:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return dict(loss=F.cross_entropy(self.network(inputs), labels))

    class Report(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            done(state.global_step)

    steps = dict(max_steps=STEPS, save_steps=PERIOD, per_device_train_batch_size=BATCH)
    arguments = TrainingArguments(str(folder), **steps, report_to=[], disable_tqdm=True, use_cpu=True, seed=0)
    trainer = Trainer(Model(), arguments, train_dataset=Images(), callbacks=[Report()])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    return trainer.model


def train_timm(folder: Path) -> nn.Module:
    from timm.models import resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import CheckpointSaver, random_seed

    random_seed(0, 0)
    model = network()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, t_initial=STEPS, t_in_epochs=False)
    options = argparse.Namespace(model="network")
    saver = CheckpointSaver(model, optimizer, args=options, checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=2)
    newest = max(folder.glob("*.pth.tar"), key=lambda path: path.stat().st_mtime, default=None)
    first = resume_checkpoint(model, str(newest), optimizer) if newest else 0
    for epoch in range(first, EPOCHS):
        for number, batch in enumerate(DataLoader(Images(), BATCH, shuffle=True)):
            step = epoch * BATCHES + number + 1
            optimizer.zero_grad()
            F.cross_entropy(model(batch["inputs"]), batch["labels"]).backward()
            optimizer.step()
            scheduler.step_update(step)
            if step % PERIOD == 0:
                saver.save_recovery(epoch, batch_idx=number)
            done(step)
        saver.save_checkpoint(epoch, metric=0.0)
    return model


def train_mmengine(folder: Path) -> nn.Module:
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, inputs: Tensor, labels: Tensor, mode: str) -> dict[str, Tensor]:
            return dict(loss=F.cross_entropy(self.network(inputs), labels))

    class Report(Hook):
        priority = "LOWEST"

        def after_train_iter(self, runner, **_) -> None:
            done(runner.iter + 1)

    sampler, collate = dict(type="DefaultSampler", shuffle=True), dict(type="default_collate")
    runner = Runner(
        Model(),
        str(folder),
        train_dataloader=dict(dataset=Images(), batch_size=BATCH, num_workers=0, sampler=sampler, collate_fn=collate),
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-3)),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=PERIOD)),
        custom_hooks=[Report()],
        randomness=dict(seed=0, deterministic=True),
        resume=(folder / "last_checkpoint").is_file(),
    )
    runner.train()
    return runner.model


def life(trainer: str, folder: Path, kill_at: int | None) -> tuple[list[int], int, str]:
    """Trains in a process of its own, killed when that step is done; returns the steps, its exit status, and its last line."""
    command = [sys.executable, __file__, "--trainers", trainer, "--train-in", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    steps, last = [], ""
    for line in process.stdout:
        last = line.strip() or last
        if line.startswith("step "):
            steps.append(int(line.split()[1]))
            if steps[-1] == kill_at:
                time.sleep(random.uniform(0, 0.05))  # in the next step, or while a checkpoint is written
                process.kill()
    return steps, process.wait(), last


def survive(trainer: str, folder: Path, kills: int) -> dict[str, int]:
    """One run, killed so often; see the table's columns."""
    row = dict(kills=0, stuck=0, repeated=0, skipped=0)
    reached = 0
    for _ in range(kills):
        steps, status, last = life(trainer, folder, random.randint(reached + 1, STEPS - 1))
        if status > 0:
            break
        row["kills"] += 1
        reached = max([reached, *steps])
        if reached >= STEPS - 1:
            break
    steps, status, last = life(trainer, folder, None)
    if status != 0:
        say(f"{trainer} cannot resume: {last}")
        return row | dict(stuck=1)
    first = steps[0] if steps else STEPS + 1
    return row | dict(repeated=max(0, reached // PERIOD * PERIOD - first + 1), skipped=max(0, first - reached - 1))


def main() -> None:
    args = parser(__doc__, "kills", threads=False)
    args.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    args.add_argument("--kills", type=int, default=20, help="at least so many of each trainer; default: %(default)s")
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--train-in", type=Path, help=argparse.SUPPRESS)
    options = args.parse_args()
    torch.set_num_threads(1)
    if options.train_in is not None:
        torch.manual_seed(0)
        model = globals()[f"train_{options.trainers[0]}"](options.train_in)
        torch.save([value.detach() for value in model.parameters()], options.train_in / "final.pt")
        return
    random.seed(options.seed)
    rows = []
    for trainer in options.trainers:
        with tempfile.TemporaryDirectory(prefix="kills-") as folder:

            def fresh(name: str, folder=folder) -> Path:
                path = Path(folder) / name
                path.mkdir()
                return path

            def weights(path: Path) -> list[Tensor]:
                return torch.load(path / "final.pt", weights_only=True)

            whole, again = fresh("whole"), fresh("again")
            for path in (whole, again):
                assert life(trainer, path, None)[1] == 0, f"{trainer} does not train"
            expected = weights(whole)
            assert all(torch.equal(a, b) for a, b in zip(expected, weights(again), strict=True)), f"{trainer} is not repeatable"
            row = dict(trainer=trainer, runs=0, kills=0, equal=0, stuck=0, repeated=0, skipped=0)
            while row["kills"] < options.kills:
                path = fresh(f"run{row['runs']}")
                result = survive(trainer, path, random.randint(1, 3))
                equal = not result["stuck"] and all(torch.equal(a, b) for a, b in zip(expected, weights(path), strict=True))
                for key, value in dict(result, runs=1, equal=int(equal)).items():
                    row[key] += value
            rows.append(row)
    publish(rows, options.out, f"{STEPS} steps, a checkpoint every {PERIOD}, kill -9")


if __name__ == "__main__":
    main()
