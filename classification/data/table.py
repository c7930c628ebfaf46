# SPDX-License-Identifier: Apache-2.0
"""Data sets as tables: train.csv and val.csv name the images, and for each its classes or a number per class.

The first line names the columns. ``image`` is a path relative to the folder of the tables. Then there is either a column ``labels`` with
names of classes, separated by ``|`` (further columns are ignored), or a column for each class with numbers in [0, 1].
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from litv2.errors import UserError, listed

IMAGE, LABELS, SEPARATOR = "image", "labels", "|"
PREDICTIONS = (IMAGE, "true", "predicted")  # columns of the table that an evaluation writes, beside one for each of several classes
TOLERANCE = 1e-3  # by which the numbers of an image of one class may miss a sum of 1: they may be rounded


def check_class_names(names: Iterable[str]) -> None:
    """Where an image has several classes.

    Raises:
        UserError: a table of predictions could not tell one of the names from two, or from another column.
    """
    for name in names:
        if SEPARATOR in name or name in PREDICTIONS:
            raise UserError(f"the class {name!r} must be renamed: with MODEL.TASK multi, tables separate classes by {SEPARATOR!r}, "
                            f"and have the columns {', '.join(PREDICTIONS)} beside those of the classes")  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Attributes:
        lines: the line of each row in the file.
        images: paths below the folder of the file.
        labels: classes of each image; None if there is a column per class.
        columns: the classes that have a column, sorted, and their numbers (rows, columns) float32; None if there are labels.
    """

    path: Path
    lines: list[int]
    images: list[str]
    labels: list[list[str]] | None
    columns: tuple[list[str], np.ndarray] | None

    @property
    def class_names(self) -> list[str]:
        return self.columns[0] if self.columns else sorted({name for names in self.labels or () for name in names})

    def of_one_class(self, class_names: list[str]) -> np.ndarray:
        """Returns the class number of each image (rows,), or with a column per class, shares (rows, classes) whose sum is 1.

        Raises:
            UserError: an image has several classes or none, or a class that is not among ``class_names``.
        """
        if self.labels is None:
            shares = self._vectors(class_names)
            for line, total in zip(self.lines, shares.sum(axis=1, dtype=np.float64)):
                if abs(total - 1) > TOLERANCE:
                    raise UserError(f"{self.path}, line {line}: the numbers of the classes must sum to 1, got {total:.6g}; "
                                    "for images of several classes, set MODEL.TASK multi")  # fmt: skip
            return shares
        for line, names in zip(self.lines, self.labels):
            if len(names) != 1:
                raise UserError(f"{self.path}, line {line}: expected one class in {LABELS!r}, got {SEPARATOR.join(names)!r}; "
                                "for images of several classes or none, set MODEL.TASK multi")  # fmt: skip
        number = self._numbers(class_names)
        return np.array([number[name] for (name,) in self.labels])

    def of_several_classes(self, class_names: list[str], certain: bool) -> np.ndarray:
        """Returns a number in [0, 1] for each image and class (rows, classes) float32; with ``certain`` it must be 0 or 1.

        Raises:
            UserError: one is not, an image has a class that is not among ``class_names``, or none has any.
        """
        vectors = self._vectors(class_names)
        if certain and len(places := np.argwhere((vectors != 0) & (vectors != 1))):
            i, j = places[0]
            raise UserError(f"{self.path}, line {self.lines[i]}: an evaluation needs 0 or 1, got {vectors[i, j]:g} for {class_names[j]!r}")
        if not vectors.any():
            raise UserError(f"{self.path}: no image has a class")
        return vectors

    def _numbers(self, class_names: list[str]) -> dict[str, int]:
        if unknown := sorted(set(self.class_names) - set(class_names)):
            raise UserError(f"{self.path} has {len(unknown)} classes that are missing from training or DATA.CLASSES: {listed(unknown, 20)}")
        return {name: i for i, name in enumerate(class_names)}

    def _vectors(self, class_names: list[str]) -> np.ndarray:
        number = self._numbers(class_names)
        vectors = np.zeros((len(self.images), len(class_names)), dtype=np.float32)
        if self.columns:
            names, values = self.columns
            if missing := sorted(set(class_names) - set(names)):
                raise UserError(f"{self.path} has no column for {len(missing)} classes: {listed(missing, 20)}")
            vectors[:, [number[name] for name in names]] = values
        for i, labels in enumerate(self.labels or ()):
            vectors[i, [number[name] for name in labels]] = 1
        return vectors


def read_table(path: Path) -> Table:
    """Reads a file and checks that its images exist, each once, in the folder of the file. Symbolic links in it are followed.

    Raises:
        UserError: the file is missing or empty, or a column, a cell or an image is wrong; the message names the line.
    """
    rows = _rows(path)
    _, header = next(rows, (0, []))
    if not header:
        raise UserError(f"{path} is empty; its first line must name the columns: {IMAGE}, and {LABELS} or one per class")
    if not all(header) or len(set(header)) < len(header):
        raise UserError(f"{path}, line 1: the columns must have names, each once, got {listed(header)}")
    if IMAGE not in header or len(header) == 1:
        raise UserError(f"{path}, line 1: expected the columns {IMAGE}, and {LABELS} or one per class, got {listed(header)}")
    classes = [] if LABELS in header else sorted(set(header) - {IMAGE})
    lines: list[int] = []
    images: list[str] = []
    labels: list[list[str]] = []
    shares: list[list[float]] = []
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}, line {line}: expected {len(header)} cells as in line 1, got {len(row)}")
        entries, where = dict(zip(header, row)), f"{path}, line {line}"
        lines.append(line)
        images.append(_image(entries[IMAGE], where))
        if classes:
            shares.append([_share(entries[name], name, where) for name in classes])
        else:
            labels.append(_names(entries[LABELS], where))
    _check_images(path, lines, images)
    columns = (classes, np.array(shares, dtype=np.float32)) if classes else None
    return Table(path, lines, images, None if classes else labels, columns)


def read_class_names(path: Path) -> list[str]:
    """Returns the lines of a file.

    Raises:
        UserError: there is no such file, or a line is empty or comes twice.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}, which DATA.CLASSES names") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8: {error}") from error
    if not names or not all(names) or len(set(names)) < len(names):
        raise UserError(f"{path}: expected the name of a class in each line, each once, got {listed(names)}")
    return names


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the number and the stripped cells of each line that is not empty."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if row:
                    yield reader.line_num, [cell.strip() for cell in row]
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; DATA.DATASET csv reads a table for each split from --data-path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a table of comma-separated values in UTF-8: {error}") from error


def _image(cell: str, where: str) -> str:
    for path in (PurePosixPath(cell), PureWindowsPath(cell)):
        if path.anchor or ".." in path.parts:
            raise UserError(f"{where}: the path of an image must lead into the folder of the table, got {cell!r}")
    return str(PurePosixPath(cell))


def _share(cell: str, name: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise UserError(f"{where}: expected a number in [0, 1] for {name!r}, got {cell!r}")
    return value


def _names(cell: str, where: str) -> list[str]:
    names = [name.strip() for name in cell.split(SEPARATOR)] if cell else []
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"{where}: expected names of classes separated by {SEPARATOR!r}, each once, got {cell!r}")
    return names


def _check_images(path: Path, lines: list[int], images: list[str]) -> None:
    if not images:
        raise UserError(f"{path} lists no images")
    first: dict[str, int] = {}
    for line, image in zip(lines, images):
        if image in first:
            raise UserError(f"{path}: {image} is in lines {first[image]} and {line}; an image has one line, with all its classes")
        first[image] = line
    if absent := [image for image in images if not (path.parent / image).is_file()]:
        raise UserError(f"{path}: {len(absent)} of {len(images)} images are not in {path.parent}: {listed(absent)}")
