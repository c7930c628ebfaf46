# SPDX-License-Identifier: Apache-2.0
"""Machine-readable metrics of a run: metrics.jsonl, TensorBoard and the trackers of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from yacs.config import CfgNode

import distributed
from litv2.errors import UserError
from litv2.files import append_whole, atomic_write
from litv2.runs.outputs import Outputs
from trackers import Trackers

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
        self._trackers: Trackers | None = None

    def start_trackers(self, config: CfgNode, resumed: bool, log: Callable[[str], object]) -> None:
        """Starts those of TRACK.TO; every process must call it, and gets the UserError of ``Trackers`` or an OSError as one."""
        problem = None
        if self.active and config.TRACK.TO:
            try:
                self._trackers = Trackers(config, self.folder, resumed, self._outputs.warn, log)
            except (UserError, OSError) as error:
                problem = str(error)
        if config.TRACK.TO and (problem := distributed.gather(problem)[0]):
            raise UserError(problem)

    def write(self, kind: str, update: int, **values: float | None) -> None:
        """Writes a row of metrics.jsonl and points in TensorBoard and the trackers.

        ``kind`` is train or val, ``update`` counts optimizer steps.
        """
        if not self.active:
            return
        known = {name: value for name, value in values.items() if value is not None}
        with self._outputs.writing(self.folder / METRICS):
            append_whole(self.folder / METRICS, json.dumps(dict(kind=kind, update=update, **known)) + "\n")
        with self._outputs.writing(self.folder / TENSORBOARD):
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                self._tensorboard = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=update)
            for name, value in known.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, update)
        if self._trackers is not None:
            self._trackers.write({f"{kind}/{name}": value for name, value in known.items()}, update)

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

    def close(self, complete: bool = True) -> None:
        """``complete`` tells the trackers whether the run has reached its end."""
        if self._trackers is not None:
            self._trackers.close(complete)
            self._trackers = None
        if self._tensorboard is not None:
            with self._outputs.writing(self.folder / TENSORBOARD):
                self._tensorboard.close()
            self._tensorboard = None


def read_metrics(folder: Path) -> list[dict]:
    """Returns the rows; none if they could not be written."""
    if not (folder / METRICS).is_file():
        return []
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
