# SPDX-License-Identifier: Apache-2.0
"""A run of the classification trainer as its folder describes it: settings, metrics and the report of its last evaluation."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import MissingPackage, UserError, listed

__all__ = ["Run", "check_same_images", "read_run"]

T = TypeVar("T")
SEPARATOR = "|"  # between the classes of an image
RECALL, PRECISION = "recall", "average precision"  # what classes are compared by, where an image has one and where any number


@dataclass(frozen=True)
class Run:
    """Attributes:
    summary: figures of the evaluation, and ``FIGURE_interval`` of some.
    classes: rows of classes.csv by class, in its order.
    images: of the evaluation, with the folders that they do not share; sorted.
    true, predicted: (N,) the label of each image, and what was predicted; of any number of classes all, sorted, with | between them.
    scores: (N, classes) of the classes in alphabetical order; (N, 0) of images of one class.
    settings: value by key of the configuration, ``SECTION.KEY``; empty of a folder that was only evaluated into.
    metrics: rows of metrics.jsonl; empty too.
    """

    folder: Path
    summary: dict[str, Any]
    classes: dict[str, dict[str, str]]
    images: list[str]
    true: np.ndarray
    predicted: np.ndarray
    scores: np.ndarray
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def several(self) -> bool:
        """Whether an image has any number of classes."""
        return self.scores.size > 0

    @property
    def right(self) -> np.ndarray:
        """(N,) whether an image's classes were predicted."""
        return self.true == self.predicted

    @property
    def targets(self) -> np.ndarray:
        """(N, classes), whether an image has each of the classes, in alphabetical order."""
        return np.array([np.isin(sorted(self.classes), label.split(SEPARATOR)) for label in self.true])


def read_run(folder: Path) -> Run:
    """Reads OUTPUT/NAME/TAG.

    Raises:
        UserError: there is no report, or a file is damaged; the message names it.
        MissingPackage: the configuration needs PyYAML.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected that of a run, OUTPUT/NAME/TAG")
    summary = _read(folder / "report/summary.json", _json_object)
    one = "top1" in summary  # class per image
    measure = RECALL if one else PRECISION
    classes = _read(folder / "report/classes.csv", lambda text: {row["class"]: row for row in _rows(text, "class", measure, "images")})
    scored = [] if one else sorted(classes)
    images, true, predicted, scores = _read(folder / "report/predictions.csv", lambda text: _predictions(text, scored))
    settings = _read(folder / "config.yaml", _settings) if (folder / "config.yaml").exists() else {}
    metrics = _read(folder / "metrics.jsonl", _metrics) if (folder / "metrics.jsonl").exists() else []
    return Run(folder, summary, classes, images, true, predicted, scores, settings, metrics)


def _read(path: Path, parse: Callable[[str], T]) -> T:
    if not path.is_file():
        raise UserError(f"there is no {path}; the trainer writes it when a run ends, or with --eval")
    try:
        return parse(path.read_text(encoding="utf-8"))
    except MissingPackage:
        raise
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is not as the trainer writes it: {error}") from error


def _json_object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("expected names and values")
    return found


def _metrics(text: str) -> list[dict[str, Any]]:
    return [_json_object(line) for line in text.splitlines() if line.endswith("}")]  # the last line may be cut off


def _rows(text: str, *columns: str) -> list[dict[str, str]]:
    rows = list(csv.DictReader(text.splitlines()))
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise ValueError(f"expected rows with {', '.join(columns)}")
    return rows


def _predictions(text: str, scored: list[str]) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Returns images, labels, predictions, and the scores of these classes; if there are none, an image has one class."""
    rows = _rows(text, "image", "true", "predicted", *scored)
    shared = os.path.commonpath([os.path.dirname(row["image"]) for row in rows])  # the data may have been elsewhere for another run
    for row in rows:
        row["image"] = os.path.relpath(row["image"], shared or ".")
        if scored:  # in the order of the classes, which may be another in another run
            row.update({key: SEPARATOR.join(sorted(row[key].split(SEPARATOR))) for key in ("true", "predicted")})
    rows.sort(key=lambda row: (row["image"], row["true"], row["predicted"]))
    images, true, predicted = ([row[key] for row in rows] for key in ("image", "true", "predicted"))
    return images, np.array(true), np.array(predicted), np.array([[float(row[name]) for name in scored] for row in rows])


def _settings(text: str) -> dict[str, Any]:
    try:
        from ..plain_yaml import parse
    except ImportError as error:
        raise MissingPackage(f"{error}; reading a configuration needs: pip install 'litv2[train]'") from error
    found = parse(text)
    if not isinstance(found, dict):
        raise ValueError("expected keys and values")
    return dict(_flat(found))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_same_images(runs: Sequence[Run]) -> None:
    """Raises UserError unless all were evaluated on the same images with the same labels, for the same classes."""
    first = runs[0]
    for run in runs[1:]:
        if first.several != run.several:
            one, any_number = (run, first) if first.several else (first, run)
            raise UserError(f"{one.folder} is a run whose images have one class, and those of {any_number.folder} have any number "
                            "(MODEL.TASK multi): they cannot be compared")  # fmt: skip
        if alone := sorted(set(first.classes) ^ set(run.classes)):
            raise UserError(f"{first.folder} and {run.folder} know different classes: only one of them has {listed(alone)}")
        if differing := set(first.images) ^ set(run.images):
            only = len(set(first.images) - set(run.images))
            raise UserError(
                f"{first.folder} and {run.folder} were evaluated on different images: {only} of {len(first.images)} are only in the first, "
                f"{len(differing) - only} of {len(run.images)} only in the second, such as {listed(sorted(differing), 3)}"
            )
        if len(first.images) != len(run.images):
            raise UserError(f"{first.folder} and {run.folder} list {len(first.images)} and {len(run.images)} images: some are listed twice")
        if (other := (first.true != run.true)).any():
            names = [first.images[i] for i in np.flatnonzero(other)]
            raise UserError(f"{first.folder} and {run.folder} have different labels for {len(names)} images: {listed(names, 3)}")
