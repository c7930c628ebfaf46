# SPDX-License-Identifier: Apache-2.0
"""Plots the curves at the end of a detection or segmentation training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..curves import Curve, save_curves

__all__ = ["plot_curves"]


def plot_curves(work_dir: str | Path, path: str | Path) -> None:
    """Losses, learning rate and AP or mIoU over updates, from the logs of a work folder, resumed runs one after the other."""
    update, train, metrics = 0, {}, {}
    for log in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for row in (json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")):  # the last may be cut off
            if "loss" in row:
                update = row["iter"]
                train[update] = row  # a resumed run repeats what was after its checkpoint: the last word counts
            else:  # the logger counts evaluations in epochs or in updates: they belong to the training rows before them
                metrics[update] = row

    def curve(rows: dict[int, dict], key: str, label: str | None = None, **style: Any) -> Curve:
        points = [(update, row[key]) for update, row in sorted(rows.items()) if key in row]
        return Curve([x for x, _ in points], [y for _, y in points], label and label.format(points[-1][1]), **style)

    losses = sorted({key for row in train.values() for key in row if "loss" in key})
    scores = [key for key in ("coco/bbox_mAP", "coco/segm_mAP", "mIoU", "aAcc") if any(key in row for row in metrics.values())]
    panels = {
        "Training loss": [curve(train, key, key, width=1.5 if key == "loss" else 1) for key in losses],
        "Learning rate": [curve(train, "lr")] if train else [],
        "Evaluation": [curve(metrics, key, f"{key}: {{:g}} (final)", marker=".") for key in scores],
    }
    save_curves(path, panels, xlabel="update")
