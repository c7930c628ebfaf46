"""What a person sees of a run: a progress bar or plain lines, log.txt, metrics.jsonl and TensorBoard. Rank 0 alone writes."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

METRICS = "metrics.jsonl"


class Logger:
    def __init__(self, folder: Path, active: bool):
        self.folder, self.active = folder, active
        self.terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._tensorboard = None
        if active:
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, message: str) -> None:
        """A line on the terminal and in log.txt."""
        if not self.active:
            return
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
        with open(self.folder / "log.txt", "a") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {message}\n")

    def metrics(self, kind: str, update: int, **values: float) -> None:
        """A row of metrics.jsonl and points in TensorBoard. ``kind`` is train or val, ``update`` counts optimizer steps."""
        if not self.active:
            return
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps(dict(kind=kind, update=update, **values)) + "\n")
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=update)
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, update)

    def forget_after(self, update: int, epoch: int) -> None:
        """Removes rows that a run resumed after ``update`` steps and ``epoch`` complete epochs will write again."""

        def stays(line: str) -> bool:
            row = json.loads(line) if line.endswith("}") else None  # the last line may be cut off
            return row is not None and row["update"] <= update and not (row["kind"] == "val" and row["epoch"] > epoch)

        path = self.folder / METRICS
        if self.active and path.is_file():
            rows = [line for line in path.read_text().splitlines() if stays(line)]
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(row + "\n" for row in rows))
            temporary.replace(path)

    def start_bar(self, title: str, total: int, done: int) -> None:
        if self.active and self.terminal:
            self._bar = tqdm(desc=title, total=total, initial=done, unit="step", dynamic_ncols=True, leave=False)

    def advance_bar(self, steps: int, **values: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(steps)

    def end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        self.end_bar()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
