"""The picture that ends a training of detection or segmentation: its curves."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["plot_curves"]


def plot_curves(work_dir: str | Path, path: str | Path) -> None:
    """Losses, learning rate and AP or mIoU over updates, from the logs of a work folder, resumed runs one after the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    update, train, metrics = 0, {}, {}
    for log in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for row in map(json.loads, log.read_text().splitlines()):
            if "loss" in row:
                update = row["iter"]
                train[update] = row  # a resumed run repeats what was after its checkpoint: the last word counts
            else:  # the logger counts evaluations in epochs or in updates: they belong to the training rows before them
                metrics[update] = row
    figure, (loss, rate, metric) = plt.subplots(1, 3, figsize=(15, 4), constrained_layout=True)
    for name in sorted({key for row in train.values() for key in row if "loss" in key}):
        points = [(update, row[name]) for update, row in sorted(train.items()) if name in row]
        loss.plot(*zip(*points), label=name, linewidth=1.5 if name == "loss" else 1)
    rate.plot(sorted(train), [train[update]["lr"] for update in sorted(train)])
    for name in ("coco/bbox_mAP", "coco/segm_mAP", "mIoU", "aAcc"):
        points = [(update, row[name]) for update, row in sorted(metrics.items()) if name in row]
        if points:
            metric.plot(*zip(*points), label=f"{name}: {points[-1][1]:g} at the end", marker=".")
    loss.set(title="Training loss", xlabel="update")
    rate.set(title="Learning rate", xlabel="update")
    metric.set(title="Evaluation", xlabel="update")
    for axis in (loss, rate, metric):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
