"""Plots at the end of a run: its curves, and predictions on validation images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from data.dataset import ImageDataset, collate
from data.transforms import denormalise
from litv2.curves import Curve, save_curves
from litv2.files import atomic_write
from precision import Precision


def plot_curves(rows: list[dict], steps_per_epoch: int, path: Path) -> None:
    """Loss, accuracy and learning rate over epochs, from the rows of metrics.jsonl."""
    train = [row for row in rows if row["kind"] == "train"]
    val = [row for row in rows if row["kind"] == "val"]
    train_epochs = [row["update"] / steps_per_epoch for row in train]
    val_epochs = [row["update"] / steps_per_epoch for row in val]

    def accuracy(key: str, label: str) -> Curve:
        last = f": {val[-1][key]:.2f} % (final)" if val else ""
        return Curve(val_epochs, [row[key] for row in val], label + last, marker=".")

    panels = {
        "Loss": [
            Curve(train_epochs, [row["loss"] for row in train], "training (as augmented)", width=1),
            Curve(val_epochs, [row["loss"] for row in val], "validation", marker="."),
        ],
        "Validation accuracy": [accuracy("top1", "top-1"), accuracy("top5", "top-5")],
        "Learning rate": [Curve(train_epochs, [row["lr"] for row in train])],
    }
    save_curves(path, panels, xlabel="epoch", units={"Validation accuracy": "%"})


@torch.inference_mode()
def plot_predictions(
    model: nn.Module, dataset: ImageDataset, class_names: list[str], config: CfgNode, precision: Precision, path: Path, count: int = 24
) -> None:
    """A grid of validation images with label, prediction and confidence; errors in red."""
    from matplotlib.figure import Figure

    chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().unique().tolist()
    batch = collate([dataset[i] for i in chosen])
    if not len(batch.targets):
        return
    model = precision.for_inference(model).eval()
    logits = model(batch.images.to(precision.device, precision.dtype))
    confidence, predicted = logits.float().softmax(dim=1).cpu().max(dim=1)
    pictures = denormalise(batch.images, config).permute(0, 2, 3, 1)

    columns = 8
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2 * columns, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, target, guess, sure in zip(axes.flat, pictures, batch.targets.tolist(), predicted.tolist(), confidence.tolist()):
        axis.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        right = guess == target
        title = f"{class_names[guess]}  {sure:.0%}" if right else f"{class_names[guess]}  {sure:.0%}\ntrue: {class_names[target]}"
        axis.set_title(title, fontsize=9, color="tab:green" if right else "tab:red")
    with atomic_write(path) as draft:
        figure.savefig(draft, format="png", dpi=100)
