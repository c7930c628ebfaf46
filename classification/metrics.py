"""Machine-readable metrics of a run: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from litv2.files import append_whole, atomic_write
from litv2.outputs import Outputs

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class Metrics:
    """Writes metrics to a run's folder; does nothing unless ``active``, so that only rank 0 writes. What cannot be written is reported
    by ``warn`` and left out."""

    def __init__(self, folder: Path, active: bool = True, warn: Callable[[str], object] = print):
        self.folder, self.active = folder, active
        self._outputs = Outputs(warn)
        self._tensorboard: SummaryWriter | None = None

    def write(self, kind: str, update: int, **values: float | None) -> None:
        """Writes a row of metrics.jsonl and points in TensorBoard. ``kind`` is train or val, ``update`` counts optimizer steps."""
        if not self.active:
            return
        values = {name: value for name, value in values.items() if value is not None}
        with self._outputs.writing(self.folder / METRICS):
            append_whole(self.folder / METRICS, json.dumps(dict(kind=kind, update=update, **values)) + "\n")
        with self._outputs.writing(self.folder / TENSORBOARD):
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                self._tensorboard = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=update)
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, update)

    def forget_after(self, update: int, epoch: int) -> None:
        """Removes the rows that a run resumed after ``update`` steps and ``epoch`` complete epochs will write again."""

        def stays(line: str) -> bool:
            row = json.loads(line) if line.endswith("}") else None  # the last line may be cut off
            return row is not None and row["update"] <= update and not (row["kind"] == "val" and row["epoch"] > epoch)

        path = self.folder / METRICS
        if self.active and path.is_file():
            rows = [line for line in path.read_text(encoding="utf-8").splitlines() if stays(line)]
            with atomic_write(path) as draft:
                draft.write_text("".join(row + "\n" for row in rows), encoding="utf-8")

    def close(self) -> None:
        if self._tensorboard is not None:
            with self._outputs.writing(self.folder / TENSORBOARD):
                self._tensorboard.close()
            self._tensorboard = None


def read_metrics(folder: Path) -> list[dict]:
    """Returns the rows; none if they could not be written."""
    if not (folder / METRICS).is_file():
        return []
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
