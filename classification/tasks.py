# SPDX-License-Identifier: Apache-2.0
"""What depends on MODEL.TASK, whether an image has one class or any number: the figures of an evaluation, its report, the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from timm.loss import AsymmetricLossMultiLabel, BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from yacs.config import CfgNode

import multilabel_report
import report


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        figures: of an evaluation, with their names in the log and the curves. The first, in percent, decides which weights are the best.
        write_report: as ``report.write_report``.
    """

    figures: dict[str, tuple[str, str]]
    write_report: Callable

    @property
    def best(self) -> str:
        return next(iter(self.figures))

    @property
    def best_name(self) -> str:
        return self.figures[self.best][0]

    def line(self, result: dict) -> str:
        """The figures, for the log."""
        return "  ".join(f"{name} {result[key]:.3f}" for key, (name, _) in self.figures.items())


_TASKS = {
    "single": Task(dict(top1=("Acc@1", "top-1"), top5=("Acc@5", "top-5")), report.write_report),
    "multi": Task(
        dict(map=("mAP", "mAP"), f1_macro=("macro F1", "macro F1 at 0.5"), f1_micro=("micro F1", "micro F1 at 0.5")),
        multilabel_report.write_report,
    ),
}


def task_of(config: CfgNode) -> Task:
    return _TASKS[config.MODEL.TASK]


def build_loss(config: CfgNode, mixed: bool, vectors: bool) -> nn.Module:
    """Returns a function of logits (B, classes) and targets.

    Args:
        mixed: targets come from mixup.
        vectors: targets are vectors without it, too; they are not smoothed yet.
    """
    smoothing = config.MODEL.LABEL_SMOOTHING
    if config.MODEL.TASK == "multi":
        if config.TRAIN.MULTI_LABEL_LOSS == "asymmetric":
            return AsymmetricLossMultiLabel(smoothing=smoothing, reduction="mean")  # over classes, too, as the others
        return BinaryCrossEntropy(smoothing, smooth_dense=True)
    if vectors:
        return nn.CrossEntropyLoss(label_smoothing=smoothing)
    if mixed:  # already smoothed
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()
