# SPDX-License-Identifier: Apache-2.0
"""The pointing game's count, of planted maps."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT

pytestmark = pytest.mark.extra
pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)

sys.path.append(str(ROOT / "benchmarks"))
BOX = (40.0, 60.0, 80.0, 80.0)  # in a picture of 200 x 100 pixels, of which the model sees columns 50 to 150 as 50 x 50


class Planted:
    """A classifier whose map is given: (64, 64), with padding below and to the right of what is the image."""

    task, names = "classification", ["thing"]

    def view(self):
        from litv2.explain.subjects import View

        return View(torch.zeros(1, 3, 64, 64), Image.new("RGB", (200, 100)), (50.0, 0.0, 150.0, 100.0), (50, 50))

    def scored(self, view):
        return None, None, "thing"


def outcome(monkeypatch, *peaks: tuple[int, int]) -> tuple[list[float], list[float]]:
    """Hits of all ways of pointing, and whether the maps are empty, for a map that is 1 at (row, column) of the tensor and else 0."""
    import pointing

    values = torch.zeros(1, 64, 64)
    for row, column in peaks:
        values[0, row, column] = 1
    monkeypatch.setattr(pointing, "cam", lambda *_: values)
    subject = Planted()
    found = pointing.points(subject, subject.view(), (None, [BOX]))
    return found[: len(pointing.WAYS)], found[len(pointing.WAYS) :]


@pytest.mark.parametrize(
    ("peaks", "hit", "empty"),
    [
        ([(30, 0)], 1.0, 0.0),  # the box is rows 30 to 39 and columns 0 to 14 of the tensor
        ([(39, 14)], 1.0, 0.0),
        ([(29, 0)], 0.0, 0.0),
        ([(39, 15)], 0.0, 0.0),
        ([(35, 5), (0, 0), (0, 1), (0, 2)], 0.25, 0.0),  # of several maxima, the share
        ([], 10 * 15 / 50**2, 1.0),  # of none, as a random position
        ([(35, 60)], 10 * 15 / 50**2, 1.0),  # in the padding, which is not of the image
    ],
)
def test_where_a_map_points(monkeypatch, peaks, hit, empty):
    hits, empties = outcome(monkeypatch, *peaks)
    *of_maps, centre, random = hits
    assert of_maps == pytest.approx([hit] * len(of_maps)) and empties == [empty] * len(of_maps)
    assert centre == 0 and random == pytest.approx(10 * 15 / 50**2)


def test_table():
    """Intervals are of the mean over targets when images are drawn again; differences are paired, so that equal columns differ by 0."""
    import pointing

    methods = len(pointing.METHODS)
    generator = np.random.default_rng(0)
    images = []
    for i in range(40):
        hits = (generator.random(1 + i % 3) < 0.5).astype(float)
        images.append(np.stack([*[hits] * methods, hits, np.full_like(hits, 0.1), *[1 - hits] * methods], axis=1))
    rows = {row["points_at"]: row for row in pointing.rows(images)}
    mean = np.concatenate(images)[:, 0].mean()
    low, high = (float(part.rstrip("%")) / 100 for part in rows["gradcam"]["interval"].split(" to "))
    assert rows["gradcam"]["hits"] == f"{mean:.1%}" and low < mean < high and 0.15 < high - low < 0.35
    assert rows["gradcam"]["over_centre"] == "0.0% to 0.0%" and rows["gradcam"]["empty"] == f"{1 - mean:.1%}"
    assert rows["gradcam"]["over_random"] == f"{low - 0.1:.1%} to {high - 0.1:.1%}"
    assert rows["random"]["hits"] == "10.0%" and rows["centre"]["over_random"] is None
