# SPDX-License-Identifier: Apache-2.0
"""What a check found, as numbers, as rows of tables and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import listed
from .duplicates import Group
from .labels import Suspicion
from .listing import Listing
from .reading import Reading

__all__ = ["Findings"]

LEAKS, SEVERAL, WITHIN = "The same picture in both splits", "The same picture under several classes", "Duplicates within a class"


@dataclass
class Findings:
    """Attributes:
    readings: one per entry of the listing; images are their numbers.
    groups: of duplicates.
    suspicions: None if no model looked at the labels.
    """

    listing: Listing
    readings: list[Reading]
    groups: list[Group] = field(default_factory=list)
    suspicions: list[Suspicion] | None = None

    def name(self, image: int) -> str:
        """The path of an image from the root of the data."""
        return self.readings[image].entry.path.relative_to(self.listing.root).as_posix()

    @cached_property
    def unreadable(self) -> list[tuple[str, str]]:
        """Name and reason."""
        return [(self.name(i), reading.problem) for i, reading in enumerate(self.readings) if reading.problem is not None]

    @cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """Images by split and class."""
        found = Counter((reading.entry.split, reading.entry.label) for reading in self.readings)
        return {split: {name: found[split, name] for name in names} for split, names in self.listing.classes.items()}

    @cached_property
    def class_problems(self) -> list[str]:
        """Classes without images, and those that only one of the splits has."""
        problems = []
        for split, counts in self.counts.items():
            if empty := [name for name, count in counts.items() if not count]:
                problems.append(f"classes without images in {split}: {listed(empty)}")
            for other in set(self.counts) - {split}:
                if alone := [name for name in counts if name not in self.counts[other]]:
                    problems.append(f"classes of {split} that are missing in {other}: {listed(alone)}")
        return problems

    @cached_property
    def topics(self) -> dict[str, list[Group]]:
        """The groups of duplicates by what is worst about them."""
        found: dict[str, list[Group]] = {LEAKS: [], SEVERAL: [], WITHIN: []}
        for group in self.groups:
            splits, labels = ({getattr(self.readings[i].entry, key) for i in group.members} for key in ("split", "label"))
            found[LEAKS if len(splits) > 1 else SEVERAL if len(labels) > 1 else WITHIN].append(group)
        return found

    @cached_property
    def kinds(self) -> dict[str, list[str]]:
        """The faults of each kind, a line each."""
        found = {"Problems of classes": self.class_problems, "Unreadable images": [f"{name}: {why}" for name, why in self.unreadable]}
        for topic, groups in self.topics.items():
            found[topic] = [f"{'exact' if group.exact else 'near'}: {listed(map(self.name, group.members), 5)}" for group in groups]
        if self.suspicions is not None:
            found["Suspicious labels"] = [f"{self.name(suspicion.image)}: {suspicion}" for suspicion in self.suspicions]
        return found

    @cached_property
    def sizes(self) -> dict[str, list[float]]:
        """Smallest, median and largest width, height and ratio of the two; empty if no image can be read."""
        good = np.array([(reading.width, reading.height) for reading in self.readings if reading.problem is None]).reshape(-1, 2)
        if not len(good):
            return {}
        spreads = {"width": good[:, 0], "height": good[:, 1], "width / height": good[:, 0] / good[:, 1]}
        return {name: [round(float(f(values)), 2) for f in (np.min, np.median, np.max)] for name, values in spreads.items()}

    @cached_property
    def modes(self) -> dict[str, int]:
        return dict(Counter(reading.mode for reading in self.readings if reading.problem is None).most_common())

    @cached_property
    def turned(self) -> int:
        return sum(reading.turned for reading in self.readings)

    def class_table(self) -> list[list]:
        """A heading, and rows of a class and its images per split, in order of their number."""
        rows: list[list] = [[name, *(counts.get(name, 0) for counts in self.counts.values())] for name in self.listing.all_classes]
        return [["class", *self.counts], *sorted(rows, key=lambda row: -row[1])]

    def overview(self) -> list[list]:
        """Rows of a name and values: images, balance, sizes, modes."""
        rows: list[list] = [[split, _summary(counts)] for split, counts in self.counts.items()]
        rows += [[name, f"{low:g} to {high:g}, median {middle:g}"] for name, (low, middle, high) in self.sizes.items()]
        rows.append(["modes", ", ".join(f"{mode} {count}" for mode, count in self.modes.items())])
        if self.turned:
            rows.append(["EXIF", f"asks to turn or mirror {self.turned} images, which training does not"])
        if self.listing.ignored:
            rows.append(["no images", ", ".join(f"{suffix} {count}" for suffix, count in self.listing.ignored.most_common())])
        return rows

    def to_dict(self) -> dict[str, Any]:
        duplicates = [
            {"topic": topic, "exact": group.exact, "images": [self.name(i) for i in group.members], "bits": group.bits}
            for topic, groups in self.topics.items()
            for group in groups
        ]
        labels = None
        if self.suspicions is not None:
            labels = [{**asdict(s), "image": self.name(s.image), "label": self.readings[s.image].entry.label} for s in self.suspicions]
        return {
            "folder": str(self.listing.root),
            "found": {kind: len(lines) for kind, lines in self.kinds.items()},
            "classes": self.counts,
            "sizes": self.sizes,
            "modes": self.modes,
            "turned by EXIF": self.turned,
            "ignored files": dict(self.listing.ignored),
            "problems of classes": self.class_problems,
            "unreadable": [{"image": name, "reason": reason} for name, reason in self.unreadable],
            "duplicates": duplicates,
            "suspicious labels": labels,
        }


def _summary(counts: dict[str, int]) -> str:
    largest, smallest = max(counts.values()), min(counts.values())
    balance = f"{largest} : {smallest}" + (f" = {largest / smallest:.1f}" if smallest else "")
    return f"{sum(counts.values())} images of {len(counts)} classes, largest to smallest {balance}"
