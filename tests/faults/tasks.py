# SPDX-License-Identifier: Apache-2.0
"""The three tasks as the campaign trains them: a tiny model and a generated data set, the user's own command, and what its run leaves."""

from __future__ import annotations

import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch

from helpers import FAST, ROOT, write_images
from litv2.weights.reading import read_checkpoint

# Everything random at once: mixup and cutmix, erasing, drop path, EMA, accumulation with a short last group.
CLASSIFIER = """TRAIN.EPOCHS 3 TRAIN.EMA_DECAY 0.9 AUG.MIXUP 0.8 AUG.CUTMIX 1.0 AUG.REPROB 0.3 AUG.AUTO_AUGMENT rand-m9-mstd0.5-inc1
MODEL.DROP_PATH_RATE 0.2 MODEL.DROP_RATE 0.1 TRAIN.ACCUMULATION_STEPS 3 DATA.DATASET folder SAVE_STEPS 2""".split()


class Task(ABC):
    """A training of ``updates`` optimizer steps that saves after each ``period`` of them."""

    name: str
    wait: str  # the setting of how long processes wait for each other
    bad_files: str  # and of how many images may be unreadable
    updates = 12
    period = 2
    main: Callable[[], int | None]  # of the command, in a process that has imported everything
    script: Path

    def __init__(self, data: Path):
        """Writes the data set, in ``data``, and imports what the command needs."""
        self.data = data

    @abstractmethod
    def arguments(self, out: Path, processes: int, workers: int, more: tuple[str, ...] = ()) -> list[str]:
        """The command line behind the script's name; the same one starts and resumes a run. ``more`` are KEY=VALUE settings."""

    @abstractmethod
    def folder(self, out: Path) -> Path:
        """Where a run with this output leaves its files."""

    @abstractmethod
    def images(self) -> list[Path]:
        """Those that are trained on."""

    @abstractmethod
    def done(self, output: str) -> int:
        """The optimizer steps that the command's output has reported, from the beginning of the run on."""

    @abstractmethod
    def resumed_at(self, output: str) -> int | None:
        """The optimizer steps of the checkpoint that the command says it goes on from."""

    @abstractmethod
    def checkpoints(self, folder: Path) -> list[Path]:
        """The checkpoints of a run, the newest first."""

    @abstractmethod
    def read(self, path: Path) -> dict:
        """What must be equal to the bit."""

    def figures(self, folder: Path) -> list[dict]:
        """What a run has logged and a resumed one must log as well, to the bit."""
        return []


class Classification(Task):
    name = "classification"
    wait, bad_files = "DIST_TIMEOUT", "DATA.MAX_BAD_FILES"
    script = ROOT / "classification/main.py"
    counts = {"a": 20, "b": 20}  # training images

    def __init__(self, data: Path):
        super().__init__(data)
        write_images(data / "train", self.counts, size=32)
        write_images(data / "val", {"a": 3, "b": 4}, size=32)
        sys.path.insert(0, str(self.script.parent))
        import torch.utils.tensorboard  # noqa: F401 # what the trainer imports late
        from matplotlib.figure import Figure  # noqa: F401

        from main import main

        self.main = main

    def arguments(self, out: Path, processes: int, workers: int, more: tuple[str, ...] = ()) -> list[str]:
        flags = ["--data-path", self.data, "--output", out, "--batch-size", 4 // processes, "--workers", workers]
        config = self.script.parent / "configs/litv2-digits.yaml"
        settings = [word for setting in more for word in setting.split("=", 1)]
        return ["--cfg", str(config), *map(str, flags), "--opts", *FAST, *CLASSIFIER, *settings]

    def folder(self, out: Path) -> Path:
        return out / "litv2_digits/default"

    def images(self) -> list[Path]:
        return sorted((self.data / "train").rglob("*.png"))

    def done(self, output: str) -> int:
        lines = re.findall(r"Train: \[(\d+)/\d+\]\[(\d+)/(\d+)\]", output)
        epoch, step, steps = map(int, lines[-1]) if lines else (0, 0, 0)
        return epoch * -(-steps // 3) + -(-step // 3)

    def resumed_at(self, output: str) -> int | None:
        found = re.findall(r"resumed at epoch \d+, step \d+, update (\d+)", output)
        return int(found[-1]) if found else None

    def checkpoints(self, folder: Path) -> list[Path]:
        return [path for path in (folder / "latest.pth", folder / "previous.pth") if path.is_file()]

    def read(self, path: Path) -> dict:
        content = read_checkpoint(path)
        return {key: value for key, value in content.items() if key not in ("config", "versions")}

    def figures(self, folder: Path) -> list[dict]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in ("images_per_second", "memory_mb")} for row in rows]


class Dense(Task):
    """Detection and segmentation: three iterations are an epoch."""

    wait, bad_files = "env_cfg.dist_cfg.timeout", "train_cfg.max_bad_files"
    times: list[str]

    def __init__(self, data: Path):
        super().__init__(data)
        import torch.utils.tensorboard  # noqa: F401 # what the command imports late
        from matplotlib.figure import Figure  # noqa: F401
        from mmengine.config import config as mmengine_config

        from litv2.openmmlab.commands import train
        from mm_helpers import own_project

        data.mkdir(parents=True)
        config = own_project(self.name, data) / "mine.py"
        backends = 'visualizer = dict(vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])'
        config.write_text(f"{config.read_text()}\n{backends}\n")
        mmengine_config.FormatCode = lambda text, **_: (text, True)  # formatting each checkpoint's configuration is half of a tiny run
        self.main = train
        self.script = ROOT / self.name / "tools/train.py"

    def arguments(self, out: Path, processes: int, workers: int, more: tuple[str, ...] = ()) -> list[str]:
        from mm_helpers import SMALL_OPTIONS

        own = [
            *("load_from=None", f"data_root={self.data / 'data'}", "randomness.seed=5"),
            *("default_hooks.checkpoint.by_epoch=False", "default_hooks.checkpoint.interval=2", "default_hooks.checkpoint.save_best=None"),
            "default_hooks.checkpoint.max_keep_ckpts=1",
            *(f"train_dataloader.num_workers={workers}", f"train_dataloader.persistent_workers={workers > 0}"),
            f"train_dataloader.batch_size={2 // processes}",
        ]
        options = [*SMALL_OPTIONS[self.name], *self.times, *own, *more]
        return [str(self.data / "mine.py"), "--work-dir", str(out), "--resume", "--cfg-options", *options]

    def folder(self, out: Path) -> Path:
        return out

    def images(self) -> list[Path]:
        return sorted((self.data / "data").glob("train/*.jpg")) or sorted((self.data / "data").glob("images/training/*.jpg"))

    def resumed_at(self, output: str) -> int | None:
        found = re.findall(r"resumed epoch: \d+, iter: (\d+)", output)
        return int(found[-1]) if found else None

    def checkpoints(self, folder: Path) -> list[Path]:
        return sorted(folder.glob("iter_*.pth"), key=lambda path: int(path.stem.removeprefix("iter_")), reverse=True)

    def read(self, path: Path) -> dict:
        from litv2.openmmlab.runner import MMENGINE_CLASSES

        content = read_checkpoint(path, also=MMENGINE_CLASSES)
        return {"iter": content["meta"]["iter"], **{key: content[key] for key in ("state_dict", "optimizer", "param_schedulers")}}


class Detection(Dense):
    name = "detection"
    times = ["train_cfg.max_epochs=4", "train_cfg.val_interval=9"]

    def done(self, output: str) -> int:
        lines = re.findall(r"Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\]", output)
        epoch, step, steps = map(int, lines[-1]) if lines else (1, 0, 0)
        return (epoch - 1) * steps + step


class Segmentation(Dense):
    name = "segmentation"
    times = ["train_cfg.max_iters=12", "train_cfg.val_interval=99"]

    def done(self, output: str) -> int:
        lines = re.findall(r"Iter\(train\)\s+\[\s*(\d+)/\d+\]", output)
        return int(lines[-1]) if lines else 0


TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Detection, Segmentation)}


def first_difference(one: object, other: object, where: str = "state") -> str | None:
    """Where two states differ by a bit, None if they do not."""
    if isinstance(one, torch.Tensor):
        return None if isinstance(other, torch.Tensor) and torch.equal(one, other) else where
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(one[key], other[key], f"{where}.{key}") for key in one]
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = [(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(one, other))]
    else:
        return None if type(one) is type(other) and one == other else where
    return next((found for pair in pairs if (found := first_difference(*pair))), None)
