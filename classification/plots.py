# SPDX-License-Identifier: Apache-2.0
"""Plots at the end of a run: its curves, and predictions on validation images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data.dataset import ImageDataset, collate
from data.transforms import denormalise
from litv2.curves import Curve, save_curves
from litv2.files import atomic_write
from precision import Precision

CAPTION_LINES = 6


def plot_curves(rows: list[dict], steps_per_epoch: int, path: Path, figures: dict[str, str]) -> None:
    """Loss, figures of validation in percent, labelled, and learning rate over epochs, from the rows of metrics.jsonl."""
    train = [row for row in rows if row["kind"] == "train"]
    val = [row for row in rows if row["kind"] == "val"]
    train_epochs = [row["update"] / steps_per_epoch for row in train]
    val_epochs = [row["update"] / steps_per_epoch for row in val]

    def validation(key: str, label: str) -> Curve:
        last = f": {val[-1][key]:.2f} % (final)" if val else ""
        return Curve(val_epochs, [row[key] for row in val], label + last, marker=".")

    panels = {
        "Loss": [
            Curve(train_epochs, [row["loss"] for row in train], "training (as augmented)", width=1),
            Curve(val_epochs, [row["loss"] for row in val], "validation", marker="."),
        ],
        "Validation": [validation(key, label) for key, label in figures.items()],
        "Learning rate": [Curve(train_epochs, [row["lr"] for row in train])],
    }
    save_curves(path, panels, xlabel="epoch", units={"Validation": "%"})


@torch.inference_mode()
def plot_predictions(
    model: nn.Module, dataset: ImageDataset, class_names: list[str], config: CfgNode, precision: Precision, path: Path, count: int = 24
) -> None:
    """A grid of validation images with labels, predictions and confidence; those with errors in red."""
    from matplotlib.figure import Figure

    chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().unique().tolist()
    batch = collate([dataset[i] for i in chosen])
    if not len(batch.targets):
        return
    model = precision.for_inference(model).eval()
    logits = model(batch.images.to(precision.device, precision.dtype)).float().cpu()
    caption = _of_several_classes if config.MODEL.TASK == "multi" else _of_one_class
    pictures = denormalise(batch.images, config).permute(0, 2, 3, 1)

    columns = 8
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2 * columns, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, target, scores in zip(axes.flat, pictures, batch.targets, logits):
        axis.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        title, right = caption(target, scores, class_names)
        axis.set_title(title, fontsize=9, color="tab:green" if right else "tab:red")
    with atomic_write(path) as draft:
        figure.savefig(draft, format="png", dpi=100)


def _of_one_class(target: Tensor, logits: Tensor, class_names: list[str]) -> tuple[str, bool]:
    """Returns the text for an image, and whether the prediction is right."""
    sure, guess = logits.softmax(dim=0).max(dim=0)
    text = f"{class_names[guess]}  {sure:.0%}"
    return (text, True) if guess == target else (f"{text}\ntrue: {class_names[target]}", False)


def _of_several_classes(target: Tensor, logits: Tensor, class_names: list[str]) -> tuple[str, bool]:
    found = logits >= 0
    lines = [f"{class_names[i]}  {logits[i].sigmoid():.0%}" for i in found.nonzero().flatten()]
    lines += [f"missed: {class_names[i]}" for i in (~found & (target > 0)).nonzero().flatten()]
    return "\n".join(lines[:CAPTION_LINES]), bool((found == (target > 0)).all())
