"""Each example runs as it is from the root, on a CPU, and is short."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import pytest

from helpers import ROOT

EXAMPLES = {  # by the packages that they need
    "timm_train.py": ["timm"],
    "torchvision_detector.py": ["timm", "torchvision"],
    "timm_backbone.py": ["timm", "mmcv", "mmdet", "mmseg"],
}


# A detector begins with the probability 0.01 for each class: alpha (1 - p)^2 (-log p) for the true class of each anchor on an object.
UNTRAINED_FOCAL_LOSS = 0.25 * 0.99**2 * -math.log(0.01)


def run(name: str) -> str:
    for package in EXAMPLES[name]:
        pytest.importorskip(package)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, f"examples/{name}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<=[: ])(?:\d+\.\d+|nan|inf)", text)]


def test_all_are_tested_and_short():
    files = sorted((ROOT / "examples").glob("*.py"))
    assert [file.name for file in files] == sorted(EXAMPLES)
    assert all(len(file.read_text().splitlines()) < 30 for file in files)


@pytest.mark.extra
def test_timm_train():
    losses = numbers(run("timm_train.py"))
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(10), abs=0.2), "ten classes, not yet told apart"
    assert losses[2] < 0.5 * losses[0]


@pytest.mark.extra
def test_torchvision_detector():
    losses, prediction = run("torchvision_detector.py").splitlines()
    assert re.findall(r"'(\w+)'", losses) == ["classification", "bbox_regression"]
    classification, boxes = numbers(losses)
    assert classification == pytest.approx(UNTRAINED_FOCAL_LOSS, rel=0.02) and boxes > 0
    assert re.findall(r"'(\w+)'", prediction) == ["boxes", "scores", "labels"]


@pytest.mark.extra
def test_timm_backbone():
    detector, segmenter = run("timm_backbone.py").splitlines()
    assert re.findall(r"'(\w+)'", detector) == ["loss", "loss_cls", "loss_bbox"]
    loss, classification, boxes = numbers(detector)
    assert classification == pytest.approx(UNTRAINED_FOCAL_LOSS, rel=0.02) and loss == pytest.approx(classification + boxes) and boxes > 0
    assert numbers(segmenter)[0] == pytest.approx(math.log(19), abs=0.5), "nineteen classes, not yet told apart"
