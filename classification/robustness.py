# SPDX-License-Identifier: Apache-2.0
"""The errors of a classifier on corrupted images: of each kind and severity, in a table, a picture and two means."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn
from torchvision.transforms import Compose
from yacs.config import CfgNode

import engine
from data.corruption import GROUPS, KINDS, SEVERITIES, Corruption, corruption_kinds
from data.loader import Loaders, with_transform
from data.transforms import evaluation_steps
from litv2.classes import imagenet_classes
from litv2.curves import Curve, save_curves
from litv2.runs.unreadable import BadFiles
from precision import Precision
from report import wilson_interval

__all__ = ["Robustness", "measure_robustness"]

# AlexNet's top-1 errors in percent, each the mean over the five severities, by which the authors divide a network's
# (https://github.com/hendrycks/robustness).
ALEXNET = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640,
    "defocus_blur": 81.9880, "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360,
    "snow": 86.6816, "frost": 82.6572, "fog": 81.9324, "brightness": 56.4592,
    "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840, "jpeg_compression": 60.6500,
}  # fmt: skip


@dataclass(frozen=True)
class Robustness:
    """What ``measure_robustness`` found.

    Args:
        clean: top-1 in percent without corruption.
        results: (kind, severity) -> number of images, top-1 in percent.
        imagenet: the classes are ImageNet's 1000.
    """

    clean: float
    results: dict[tuple[str, int], tuple[int, float]]
    imagenet: bool

    def errors(self) -> dict[str, float]:
        """The top-1 error in percent of each kind, the mean over the severities."""
        kinds = dict.fromkeys(kind for kind, _ in self.results)
        return {kind: float(np.mean([100 - top1 for (k, _), (_, top1) in self.results.items() if k == kind])) for kind in kinds}

    def mean_error(self) -> float:
        """The mean over the kinds: the mean corruption error that is not normalised."""
        return float(np.mean(list(self.errors().values())))

    def mce(self) -> float | None:
        """The mean corruption error in percent of AlexNet's, as published; None unless everything was measured on ImageNet's classes."""
        if not self.imagenet or self.results.keys() != {(kind, severity) for kind in KINDS for severity in SEVERITIES}:
            return None
        return 100 * float(np.mean([error / ALEXNET[kind] for kind, error in self.errors().items()]))

    def summary(self) -> dict[str, Any]:
        severities = sorted({severity for _, severity in self.results})
        return dict(mean_error=self.mean_error(), mce=self.mce(), severities=severities, errors=self.errors())

    def table(self) -> Iterable[list]:
        yield ["kind", "severity", "images", "top1", "low", "high"]  # with the 95 % interval
        for (kind, severity), (images, top1) in self.results.items():
            interval = wilson_interval(round(top1 * images / 100), images)
            yield [kind, severity, images, *(f"{value:.3f}" for value in (top1, *interval))]

    def draw(self, path: Path) -> None:
        panels: dict[str, list[Curve]] = {}
        for title, kinds in GROUPS.items():
            for kind in kinds:
                points = {0: self.clean} | {severity: top1 for (k, severity), (_, top1) in self.results.items() if k == kind}
                if len(points) > 1:
                    panels.setdefault(title, []).append(Curve(list(points), list(points.values()), kind.replace("_", " "), marker="."))
        save_curves(path, panels, xlabel="severity", units=dict.fromkeys(panels, "top-1 (%)"))


def measure_robustness(
    model: nn.Module,
    loaders: Loaders,
    precision: Precision,
    config: CfgNode,
    *,
    clean: float,
    seconds: float,
    log: Callable[[str], None],
) -> Robustness:
    """Evaluates the model on the validation images under TEST.CORRUPTIONS of TEST.SEVERITIES, which are applied after the crop.

    Args:
        clean: top-1 in percent without corruption.
        seconds: how long that evaluation took, for the estimate of the time in the log.
    """
    kinds, severities = corruption_kinds(config.TEST.CORRUPTIONS), sorted(set(config.TEST.SEVERITIES))
    passes = len(kinds) * len(severities)
    log(f"corruptions: {len(kinds)} kinds x {len(severities)} severities, at least {_minutes(passes * seconds)}")
    resize, crop, *finish = evaluation_steps(config).transforms
    results: dict[tuple[str, int], tuple[int, float]] = {}
    start = time.perf_counter()
    if "glass_blur" in kinds:  # numba compiles it here, once, for all workers that are forked from this process
        Corruption("glass_blur", severities[0], config.SEED)(Image.new("RGB", (32, 32)))
    for kind in kinds:
        for severity in severities:
            loader = with_transform(loaders.val, Compose([resize, crop, Corruption(kind, severity, config.SEED), *finish]))
            bad_files = BadFiles(config.DATA.MAX_BAD_FILES, log=lambda line: None)  # the evaluation before has named them
            result = engine.evaluate(model, loader, precision, expected=loaders.val_size, bad_files=bad_files, log=lambda line: None)
            results[kind, severity] = int(result["images"]), result["top1"]
        left = (time.perf_counter() - start) / len(results) * (passes - len(results))
        accuracies = "  ".join(f"{results[kind, severity][1]:.2f}" for severity in severities)
        log(f"{kind}: top-1 {accuracies} at severities {', '.join(map(str, severities))}; about {_minutes(left)} left")
    imagenet = loaders.class_names == list(imagenet_classes())
    found = Robustness(clean, results, imagenet)
    mce = found.mce()
    relative = "" if mce is None else f", {mce:.2f} % of AlexNet's (mCE)"
    log(f"mean top-1 error under corruption {found.mean_error():.2f} % (without {100 - clean:.2f} %){relative}")
    return found


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
