# SPDX-License-Identifier: Apache-2.0
"""The images of a data set, as the classification trainer finds them: ROOT/SPLIT/CLASS/IMAGE, or ROOT/CLASS/IMAGE."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import MissingPackage, UserError

__all__ = ["TRAIN", "VAL", "WHOLE", "Entry", "Listing", "find_images"]

TRAIN, VAL = "train", "val"  # the trainer's defaults
WHOLE = "all"  # stands for the split of a folder that has none


@dataclass(frozen=True, slots=True)
class Entry:
    path: Path
    split: str
    label: str


@dataclass
class Listing:
    """Attributes:
    entries: in order of split, class and path.
    classes: of each split, sorted; a class may have no images.
    ignored: how many files of each suffix are in the class folders and no images to the trainer.
    """

    root: Path
    entries: list[Entry] = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)

    @property
    def all_classes(self) -> list[str]:
        return sorted(set().union(*self.classes.values()))


def find_images(root: Path, train: str | None = None, val: str | None = None) -> Listing:
    """Lists the images of a data set.

    Args:
        train, val: folders of the splits; by default ``train`` and ``val``, or if neither exists, ``root`` itself holds the classes.

    Raises:
        UserError: there is no such folder, or it holds no class folders or no images.
    """
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise UserError(f"{root} {what}; expected a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or with CLASS/IMAGE")
    splits = {split: root / split for split in (train or TRAIN, val or VAL)}
    if len(splits) < 2:
        raise UserError(f"--train-split and --val-split are both {train}; for images that are not split, give {root / str(train)} alone")
    if train is None and val is None and not any(folder.is_dir() for folder in splits.values()):
        splits = {WHOLE: root}
    listing = Listing(root)
    for split, folder in splits.items():
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; {root} must contain {' and '.join(splits)}, with CLASS/IMAGE in each")
        _list_split(listing, split, folder)
    return listing


def _list_split(listing: Listing, split: str, folder: Path) -> None:
    try:
        from torchvision.datasets.folder import IMG_EXTENSIONS
    except ImportError as error:
        raise MissingPackage(f"{error}; checking data needs: pip install 'litv2[check]'") from error
    listing.classes[split] = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not listing.classes[split]:
        raise UserError(f"{folder} contains no class folders; expected {folder}/CLASS/IMAGE")
    before = len(listing.entries)
    for label in listing.classes[split]:
        for place, _, names in sorted(os.walk(folder / label, followlinks=True)):  # in torchvision's order
            for name in sorted(names):
                if name.lower().endswith(IMG_EXTENSIONS):
                    listing.entries.append(Entry(Path(place) / name, split, label))
                else:
                    listing.ignored[Path(name).suffix.lower() or "without suffix"] += 1
    if len(listing.entries) == before:
        raise UserError(f"{folder} contains no images ({' '.join(IMG_EXTENSIONS)}) in its {len(listing.classes[split])} class folders")
