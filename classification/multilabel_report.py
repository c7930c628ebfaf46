# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation where an image has any number of classes, in the same folder and form as that of ``report``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

import distributed
import multilabel
from data.dataset import ImageDataset
from data.loader import Loaders
from data.table import PREDICTIONS, SEPARATOR
from litv2.files import atomic_write
from litv2.pages import page, table
from report import PAGE, Predictions, draw_images, show_pictures, with_interval, write_csv, write_json, write_pictures

LARGEST_CHART = 80  # classes in the picture of average precisions


def write_report(folder: Path, predictions: Predictions, loaders: Loaders, config: CfgNode, robustness: None = None) -> None:
    """Writes the report into ``folder``; every process must call it, and rank 0 writes. Corruptions are for images of one class."""
    found = predictions.of_all_processes(distributed.gather_at_first)
    if distributed.rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    report = MultiLabelReport(*found, loaders.class_names)
    write_json(folder / "summary.json", report.summary)
    write_json(folder / "thresholds.json", dict(zip(report.class_names, report.thresholds.tolist())))
    write_csv(folder / "predictions.csv", report.predictions())
    write_csv(folder / "classes.csv", report.classes())
    pictures = {"classes.png": _draw_classes(report)}
    captions = report.mistakes()
    if isinstance(loaders.val.dataset, ImageDataset) and captions:
        pictures["mistakes.png"] = draw_images(captions, loaders.val.dataset, config)
    write_pictures(folder, pictures)
    with atomic_write(folder / PAGE) as draft:
        draft.write_text(_page(report, folder, list(pictures)), encoding="utf-8")


class MultiLabelReport:
    """The figures of an evaluation.

    Args:
        names: of the images.
        targets: (N, classes), 0 or 1.
        logits: (N, classes).
    """

    def __init__(self, names: list[str], targets: np.ndarray, logits: np.ndarray, class_names: list[str]):
        from sklearn.metrics import average_precision_score

        self.names, self.targets, self.logits, self.class_names = names, targets.astype(bool), logits, class_names
        self.scores = multilabel.probabilities(logits)
        self.thresholds = multilabel.best_thresholds(self.targets, self.scores)
        self.predicted: np.ndarray = self.scores >= self.thresholds  # (N, classes)
        self.present = np.any(self.targets, axis=0)
        self.precision = np.full(len(class_names), np.nan)  # of classes that an image has; so are the next two
        self.precision[self.present] = average_precision_score(self.targets[:, self.present], logits[:, self.present], average=None)
        self.chance = np.where(self.present, multilabel.chance(self.targets), np.nan)
        # Precision, recall, F1 and support of each class, at 1/2 and at its threshold.
        self.at_half, self.at_threshold = (multilabel.by_class(self.targets, predicted) for predicted in (logits >= 0, self.predicted))
        self.summary = self._summary()

    def _summary(self) -> dict[str, Any]:
        known = self.targets[:, self.present], self.logits[:, self.present]
        fitted = {f"f1_{name}_at_thresholds": 100 * f1 for name, f1 in multilabel.f1_scores(self.targets, self.predicted).items()}
        return dict(
            images=len(self.names),
            classes=len(self.class_names),
            classes_with_images=int(self.present.sum()),
            classes_per_image=float(self.targets.sum(axis=1).mean()),
            **multilabel.figures(self.targets, self.logits),
            map_interval=multilabel.map_interval(*known),
            map_of_random_order=100 * float(self.chance[self.present].mean()),
            map_of_random_order_interval=multilabel.chance_interval(*known),
            share_of_images=100 * float(self.targets[:, self.present].mean()),
            **fitted,
            note="the thresholds are fitted to these images, so F1 at them is too high for others",
        )

    def predictions(self) -> Iterable[list]:
        yield [*PREDICTIONS, *self.class_names]
        for name, true, predicted, scores in zip(self.names, self.targets, self.predicted, self.scores):
            yield [name, self._joined(true), self._joined(predicted), *(f"{score:.9g}" for score in scores)]

    def classes(self) -> Iterable[list]:
        yield ["class", "average precision", "random order", "precision", "recall", "f1", "threshold",
               "precision at it", "recall at it", "f1 at it", "images"]  # fmt: skip
        for i, name in enumerate(self.class_names):
            known = [f"{value:.6f}" if self.present[i] else "" for value in (self.precision[i], self.chance[i])]
            half, best = ([f"{value:.6f}" for value in part[:3, i]] for part in (self.at_half, self.at_threshold))
            yield [name, *known, *half, repr(float(self.thresholds[i])), *best, int(self.at_half[3, i])]

    def mistakes(self) -> dict[str, str]:
        """What is missed and what is wrong at the thresholds, by image, those with the largest error first."""
        errors = np.abs(self.targets - self.scores).max(axis=1)
        captions = {}
        for i in np.argsort(-errors, kind="stable"):
            missed, wrong = self.targets[i] & ~self.predicted[i], self.predicted[i] & ~self.targets[i]
            lines = [f"{what}: {self._joined(which, ', ')}" for what, which in (("missed", missed), ("wrong", wrong)) if which.any()]
            if lines:
                captions[self.names[i]] = "\n".join(textwrap.fill(line, 36, max_lines=3, placeholder=" ...") for line in lines)
        return captions

    def _joined(self, chosen: np.ndarray, separator: str = SEPARATOR) -> str:
        return separator.join(self.class_names[i] for i in np.flatnonzero(chosen))


def _draw_classes(report: MultiLabelReport) -> Any:
    from matplotlib.figure import Figure

    present = np.flatnonzero(report.present)
    chosen = present[np.argsort(report.precision[present], kind="stable")][:LARGEST_CHART]
    figure = Figure(figsize=(7, 1.2 + 0.2 * len(chosen)), layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(chosen)), report.precision[chosen], color="tab:blue", label="average precision")
    axis.plot(report.chance[chosen], range(len(chosen)), "|", color="black", markersize=9, label="of images in random order")
    labels = [f"{report.class_names[i]} ({int(report.at_half[3, i])})" for i in chosen]
    axis.set_yticks(range(len(chosen)), labels, fontsize=7)
    some = len(chosen) < len(present)
    axis.set(xlim=(0, 1), title=f"the {len(chosen)} classes with the lowest average precision" if some else "")
    axis.legend(loc="lower right")
    return figure


def _page(report: MultiLabelReport, folder: Path, pictures: list[str]) -> str:
    summary = report.summary
    figures = [
        ["mean average precision (mAP)", *with_interval(summary, "map")],
        ["of images in random order", *with_interval(summary, "map_of_random_order")],
        ["macro F1 at 0.5", f"{summary['f1_macro']:.2f} %", ""],
        ["micro F1 at 0.5", f"{summary['f1_micro']:.2f} %", ""],
        ["macro F1 at each class's threshold", f"{summary['f1_macro_at_thresholds']:.2f} %", ""],
        ["micro F1 at each class's threshold", f"{summary['f1_micro_at_thresholds']:.2f} %", ""],
    ]
    titles = {"classes.png": "Average precision, and images of each class", "mistakes.png": "Largest mistakes at the thresholds"}
    header, *rows = report.classes()
    worst = sorted(rows, key=lambda row: float(row[1] or 2))
    without = summary["classes"] - summary["classes_with_images"]
    parts = [
        f"<h2>{summary['images']} images, {summary['classes']} classes, {summary['classes_per_image']:.2f} of them per image</h2>",
        table(["figure", "value", "95 % interval"], figures),
        "<p>The thresholds are those that give each class its largest F1 on these images: on others F1 at them will be lower. "
        f"Means over classes leave out those that no image here has: {without}. The interval is a bootstrap over images.</p>",
        *show_pictures(folder, {name: titles[name] for name in pictures}),
        "<h2>Classes, the worst first</h2>",
        table(header, worst),
    ]
    return page("Evaluation", parts)
