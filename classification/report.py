# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found, in a folder: figures with intervals, classes, confusions, calibration, mistakes and every prediction."""

from __future__ import annotations

import csv
import html
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

import distributed
from data.dataset import ImageDataset
from data.loader import Loaders
from data.transforms import denormalise
from litv2.files import atomic_write
from litv2.pages import page, picture, table
from parquet import write_parquet

if TYPE_CHECKING:
    from robustness import Robustness

REPORT, PAGE = "report", "report.html"  # the folder within a run's, and the page in it
TOP = 5
BINS = 15  # of confidence, as in arXiv 1706.04599
LARGEST_MATRIX = 50  # classes in the picture of the confusion matrix
LISTED = 20  # pairs of confused classes, and mistakes, in the page


@dataclass
class Predictions:
    """The logits of each image of an evaluation; ``engine.evaluate`` adds to it, batch by batch, in each process."""

    names: list[str] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)  # (B,)
    logits: list[Tensor] = field(default_factory=list)  # (B, classes)

    def add(self, names: list[str], targets: Tensor, logits: Tensor) -> None:
        self.names += names
        self.targets.append(targets)
        self.logits.append(logits)

    def of_all_processes(self, gather: Callable[[Any], list] = distributed.gather) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Returns names, targets (N,) and logits (N, classes) in the order of the names, whatever the number of processes.

        Every process must call it. With ``distributed.gather_at_first`` only rank 0 gets them, and the others nothing.
        """
        own = (self.names, *(torch.cat(parts).cpu().numpy() if parts else None for parts in (self.targets, self.logits)))
        parts = [part for part in gather(own) if part[0]] or [([], np.empty(0), np.empty(0))]
        names = [name for part in parts for name in part[0]]
        order = sorted(range(len(names)), key=names.__getitem__)
        return [names[i] for i in order], *(np.concatenate([part[i] for part in parts])[order] for i in (1, 2))


def write_report(
    folder: Path, predictions: Predictions, loaders: Loaders, config: CfgNode, robustness: Robustness | None = None
) -> None:
    """Writes the report of an evaluation with one class per image into ``folder``, with the errors under corruption if they were measured.

    Every process must call it, and rank 0 writes.
    """
    found, class_names = predictions.of_all_processes(distributed.gather_at_first), loaders.class_names
    if distributed.rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(*found, class_names)
    if robustness is not None:
        report.summary["corruptions"] = robustness.summary()
        write_csv(folder / "corruptions.csv", robustness.table())
        robustness.draw(folder / "corruptions.png")
    if loaders.note:
        report.summary["note"] = loaders.note
    write_json(folder / "summary.json", report.summary)
    write_csv(folder / "predictions.csv", report.predictions())
    if config.TEST.PREDICTIONS == "parquet":
        write_parquet(folder / "predictions.parquet", report.predictions())
    write_csv(folder / "classes.csv", report.classes())
    counts = [[name, *row] for name, row in zip(class_names, report.confusion.tolist())]
    write_csv(folder / "confusion.csv", [["true \\ predicted", *class_names], *counts])
    pictures = {"confusion.png": _draw_confusion(report), "calibration.png": _draw_calibration(report)}
    if isinstance(loaders.val.dataset, ImageDataset) and len(report.mistakes):  # a streaming reader cannot be indexed
        pictures["mistakes.png"] = _draw_mistakes(report, loaders.val.dataset, config)
    write_pictures(folder, pictures)
    with atomic_write(folder / PAGE) as draft:
        draft.write_text(_page(report, folder, [*pictures, *(["corruptions.png"] if robustness else [])]), encoding="utf-8")


class Report:
    """The figures of an evaluation.

    Args:
        names: of the images.
        targets: their classes (N,).
        logits: (N, classes).
    """

    def __init__(self, names: list[str], targets: np.ndarray, logits: np.ndarray, class_names: list[str]):
        from scipy.special import softmax
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        self.names, self.targets, self.class_names = names, targets, class_names
        self.logits = logits.astype(np.float64)
        self.probabilities = softmax(self.logits, axis=1)
        self.order = torch.from_numpy(logits).topk(min(TOP, logits.shape[1])).indices.numpy()  # as in engine.evaluate
        self.predicted, self.confidence = self.order[:, 0], self.probabilities.max(axis=1)
        self.right = self.predicted == targets
        labels = np.arange(len(class_names))
        self.confusion = confusion_matrix(targets, self.predicted, labels=labels)
        self.per_class = np.array(precision_recall_fscore_support(targets, self.predicted, labels=labels, zero_division=0))
        self.mistakes = np.flatnonzero(~self.right)
        self.mistakes = self.mistakes[np.argsort(-self.confidence[self.mistakes], kind="stable")]  # the most confident first
        self.temperature = _temperature(self.logits, targets)
        self.summary = self._summary()

    def _summary(self) -> dict[str, Any]:
        from scipy.special import softmax

        top1, top5 = int(self.right.sum()), int((self.order == self.targets[:, None]).any(axis=1).sum())
        present = self.per_class[3] > 0
        recall, support = self.per_class[1][present], self.per_class[3][present].astype(int)
        # Images are drawn anew within each class (a stratified bootstrap): the hits of a class are binomial then.
        balanced = np.random.default_rng(0).binomial(support, recall, size=(2000, len(support))) / support
        cooled = softmax(self.logits / self.temperature, axis=1).max(axis=1)
        return dict(
            images=len(self.names),
            classes=len(self.class_names),
            top1=100 * top1 / len(self.names),
            top1_interval=wilson_interval(top1, len(self.names)),
            top5=100 * top5 / len(self.names),
            top5_interval=wilson_interval(top5, len(self.names)),
            balanced_accuracy=100 * float(recall.mean()),
            balanced_accuracy_interval=[round(100 * float(value), 3) for value in np.percentile(balanced.mean(axis=1), [2.5, 97.5])],
            macro_f1=100 * float(self.per_class[2][present].mean()),
            loss=_loss(self.logits, self.targets),
            calibration_error=100 * calibration_error(self.confidence, self.right),
            temperature=self.temperature,
            calibration_error_at_temperature=100 * calibration_error(cooled, self.right),
        )

    def predictions(self) -> Iterable[list]:
        header = [f"{what}{i + 1}" for i in range(self.order.shape[1]) for what in ("class", "share")]
        yield ["image", "true", "predicted", "right", "confidence", *header]
        for i, name in enumerate(self.names):
            best: list[Any] = [value for j in self.order[i] for value in (self.class_names[j], round(float(self.probabilities[i, j]), 6))]
            yield [name, self.class_names[self.targets[i]], best[0], int(self.right[i]), best[1], *best]

    def classes(self) -> Iterable[list]:
        yield ["class", "precision", "recall", "f1", "images"]
        for name, precision, recall, f1, support in zip(self.class_names, *self.per_class):
            yield [name, f"{precision:.6f}", f"{recall:.6f}", f"{f1:.6f}", int(support)]

    def confused(self) -> list[tuple[str, str, int]]:
        """The pairs (true, predicted) that were confused most often, with how often."""
        errors = self.confusion - np.diag(np.diag(self.confusion))
        pairs = np.argsort(-errors, axis=None, kind="stable")[:LISTED]
        rows = [(*divmod(int(pair), len(self.class_names)), int(errors.flat[pair])) for pair in pairs]
        return [(self.class_names[a], self.class_names[b], count) for a, b, count in rows if count]


def wilson_interval(hits: int, images: int) -> list[float]:
    """The 95 % interval of an accuracy, in percent."""
    from scipy.stats import binomtest

    low, high = binomtest(hits, images).proportion_ci(method="wilson")
    return [round(100 * float(low), 3), round(100 * float(high), 3)]


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error (arXiv 1706.04599, equation 3): by how much confidence and accuracy differ, mean over images."""
    bins = _bins(confidence)
    gaps = [abs(right[bins == i].mean() - confidence[bins == i].mean()) * (bins == i).sum() for i in np.unique(bins)]
    return float(sum(gaps) / len(confidence))


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.minimum((confidence * BINS).astype(int), BINS - 1)


def _loss(logits: np.ndarray, targets: np.ndarray) -> float:
    from scipy.special import log_softmax

    return float(-log_softmax(logits, axis=1)[np.arange(len(targets)), targets].mean())


def _temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The number that logits are best divided by: it gives the least cross-entropy (arXiv 1706.04599, section 4.2)."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(lambda log: _loss(logits / math.exp(log), targets), bounds=(-3, 3), method="bounded", options=dict(xatol=1e-4))
    return math.exp(found.x)


def write_json(path: Path, content: dict) -> None:
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(content, indent=1) + "\n")


def write_pictures(folder: Path, pictures: dict[str, Any]) -> None:
    """Writes figures of matplotlib by the names of their files."""
    for name, figure in pictures.items():
        with atomic_write(folder / name) as draft:
            figure.savefig(draft, format="png", dpi=100)


def write_csv(path: Path, rows: Iterable[list]) -> None:
    with atomic_write(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([f"{value:.6f}" if isinstance(value, float) else value for value in row] for row in rows)


def _draw_confusion(report: Report) -> Any:
    from matplotlib.figure import Figure

    errors = report.confusion.sum(axis=1) + report.confusion.sum(axis=0) - 2 * np.diag(report.confusion)
    chosen = np.sort(np.argsort(-errors, kind="stable")[:LARGEST_MATRIX])
    matrix = report.confusion[np.ix_(chosen, chosen)]
    side = 2.5 + 0.28 * len(chosen)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    shares = matrix / np.maximum(report.confusion[chosen].sum(axis=1, keepdims=True), 1)
    figure.colorbar(axis.imshow(shares, cmap="viridis", vmin=0, vmax=1), label="share of the true class")
    labels = [report.class_names[i] for i in chosen]
    axis.set_xticks(range(len(chosen)), labels, rotation=90, fontsize=7)
    axis.set_yticks(range(len(chosen)), labels, fontsize=7)
    some = len(chosen) < len(report.class_names)
    axis.set(xlabel="predicted", ylabel="true", title=f"the {len(chosen)} classes with most errors" if some else "")
    if len(chosen) <= 20:
        for (i, j), count in np.ndenumerate(matrix):
            if count:
                axis.text(j, i, str(count), ha="center", va="center", fontsize=7, color="black" if shares[i, j] > 0.5 else "white")
    return figure


def _draw_calibration(report: Report) -> Any:
    from matplotlib.figure import Figure

    bins = _bins(report.confidence)
    present = np.unique(bins)
    figure = Figure(figsize=(6, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    points = [(report.confidence[bins == i].mean(), report.right[bins == i].mean()) for i in present]
    upper.plot(*zip(*points), marker="o")
    error, mended = report.summary["calibration_error"], report.summary["calibration_error_at_temperature"]
    title = f"calibration error {error:.2f} %; at temperature {report.temperature:.3f}: {mended:.2f} %"
    upper.set(ylabel="accuracy", ylim=(0, 1.02), title=title)
    lower.hist(report.confidence, bins=np.linspace(0, 1, BINS + 1))
    lower.set(xlabel="confidence", ylabel="images", xlim=(0, 1))
    return figure


def _draw_mistakes(report: Report, images: ImageDataset, config: CfgNode) -> Any:
    names = report.class_names
    captions = {
        report.names[i]: f"{names[report.predicted[i]]}  {report.confidence[i]:.0%}\ntrue: {names[report.targets[i]]}"
        for i in report.mistakes
    }
    return draw_images(captions, images, config)


def draw_images(captions: dict[str, str], images: ImageDataset, config: CfgNode, columns: int = 5) -> Any:
    """Draws the first images of ``captions`` (by name), as the model sees them, with their captions."""
    from matplotlib.figure import Figure

    index = {images.source.filename(i): i for i in range(len(images))}
    chosen = [name for name in captions if name in index][:LISTED]
    rows = max(1, -(-len(chosen) // columns))
    figure = Figure(figsize=(2.4 * columns, 2.9 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, name in zip(axes, chosen):
        image = images[index[name]].image
        if image is not None:
            axis.imshow(denormalise(image[None], config)[0].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(captions[name], fontsize=8, color="tab:red")
    return figure


def _page(report: Report, folder: Path, pictures: list[str]) -> str:
    summary = report.summary
    figures = [
        ["top-1", *with_interval(summary, "top1")],
        ["top-5", *with_interval(summary, "top5")],
        ["balanced accuracy (mean recall of classes)", *with_interval(summary, "balanced_accuracy")],
        ["macro F1", f"{summary['macro_f1']:.2f} %", ""],
        ["cross-entropy", f"{summary['loss']:.4f}", ""],
        ["expected calibration error", f"{summary['calibration_error']:.2f} %", ""],
        ["temperature that would mend it, fitted to these images", f"{summary['temperature']:.3f}", ""],
    ]
    classes = list(report.classes())
    worst = sorted(classes[1:], key=lambda row: float(row[3]))
    titles = {"confusion.png": "Confusion matrix", "calibration.png": "Calibration", "mistakes.png": "Most confident mistakes"}
    titles["corruptions.png"] = "Accuracy on corrupted images"
    parts = [f"<h2>{summary['images']} images of {summary['classes']} classes</h2>", table(["figure", "value", "95 % interval"], figures)]
    parts += [f"<p>{html.escape(summary['note'])}</p>"] if "note" in summary else []
    parts += ["<h2>Confused most often</h2>", table(["true", "predicted", "images"], report.confused())]
    parts += show_pictures(folder, {name: titles[name] for name in pictures})
    parts += ["<h2>Classes, the worst first</h2>", table(classes[0], worst)]
    return page("Evaluation", parts)


def with_interval(summary: dict[str, Any], name: str) -> list[str]:
    """Returns a figure of the summary, in percent, and its interval, for the page's table."""
    low, high = summary[f"{name}_interval"]
    return [f"{summary[name]:.2f} %", f"{low:.2f} to {high:.2f}"]


def show_pictures(folder: Path, titles: dict[str, str]) -> list[str]:
    """Returns a part of the page for each picture in the folder, by the name of its file."""
    return [f"<h2>{title}</h2>{picture((folder / name).read_bytes(), title)}" for name, title in titles.items()]
