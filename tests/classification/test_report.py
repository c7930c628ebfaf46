# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation: scikit-learn's numbers, and the same for any number of processes."""

from __future__ import annotations

import csv
import json
import re
import sys

import matplotlib.image
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn import metrics

from config import load_config
from helpers import ROOT, run_trainer, write_images
from litv2.errors import MissingPackage
from report import BINS, Report, calibration_error


def planted(images: int, classes: int, temperature: float = 1.0, absent: int | None = None) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Logits, and targets that are drawn from them, so that they are calibrated at this temperature."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (images, classes))
    if absent is not None:
        logits[:, absent] -= 50
    targets = (rng.random((images, 1)) > softmax(logits / temperature, axis=1).cumsum(axis=1)).sum(axis=1)
    return [f"{i}.png" for i in range(images)], targets.clip(max=classes - 1), logits.astype(np.float32)


def test_figures_are_those_of_scikit_learn():
    names, targets, logits = planted(300, 7, absent=2)
    assert 2 not in targets
    report = Report(names, targets, logits, list("abcdefg"))
    predicted, present, summary = logits.argmax(axis=1), sorted(set(targets)), report.summary
    assert summary["top1"] == pytest.approx(100 * metrics.accuracy_score(targets, predicted))
    assert summary["top5"] == pytest.approx(100 * metrics.top_k_accuracy_score(targets, logits, k=5, labels=range(7)))
    assert summary["balanced_accuracy"] == pytest.approx(100 * metrics.balanced_accuracy_score(targets, predicted))
    assert summary["macro_f1"] == pytest.approx(100 * metrics.f1_score(targets, predicted, labels=present, average="macro"))
    assert summary["loss"] == pytest.approx(metrics.log_loss(targets, softmax(logits.astype(float), axis=1), labels=range(7)))
    for figure in ("top1", "top5", "balanced_accuracy"):
        low, high = summary[f"{figure}_interval"]
        assert low < summary[figure] < high and high - low < 25
    true, guess, count = report.confused()[0]
    pairs = [("abcdefg"[a], "abcdefg"[b]) for a, b in zip(targets, predicted) if a != b]
    assert pairs.count((true, guess)) == count == max(map(pairs.count, pairs))
    sure = [softmax(logits[i].astype(float)).max() for i in report.mistakes]
    assert sure == sorted(sure, reverse=True) and len(sure) == (predicted != targets).sum()


def test_calibration():
    confidence, right = np.array([0.1, 0.2, 0.25, 0.9, 0.95, 1.0]), np.array([0, 1, 0, 1, 1, 0], dtype=bool)
    slow = 0.0
    for i in range(BINS):
        inside = [j for j, value in enumerate(confidence) if int(min(value * BINS, BINS - 1)) == i]
        if inside:
            slow += len(inside) / 6 * abs(np.mean([right[j] for j in inside]) - np.mean([confidence[j] for j in inside]))
    assert calibration_error(confidence, right) == pytest.approx(slow)
    names, targets, logits = planted(20_000, 5, temperature=2.0)
    report = Report(names, targets, logits, list("abcde"))
    assert report.temperature == pytest.approx(2, rel=0.05)
    assert report.summary["calibration_error_at_temperature"] < 2 < 10 < report.summary["calibration_error"]

    def loss(temperature: float) -> float:
        return -log_softmax(logits.astype(float) / temperature, axis=1)[np.arange(len(targets)), targets].mean()

    assert loss(report.temperature) <= min(loss(report.temperature * factor) for factor in (0.98, 1.02))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a training, whose end writes a report, and reports of 2 and 3 processes that evaluate its weights."""
    root = tmp_path_factory.mktemp("report")
    write_images(root / "images/train", {"a": 8, "b": 8}, size=32)
    write_images(root / "images/val", {"a": 9, "b": 4}, size=32)
    flags = ["--data-path", root / "images", "--batch-size", 4, "--workers", 0]
    run_trainer(*flags, "--output", root / "1", opts="DATA.DATASET folder")
    folders = [root / "1/litv2_digits/default"]
    for processes in (2, 3):
        out = root / str(processes)
        best = folders[0] / "latest.pth"
        opts = "DATA.DATASET folder TEST.PREDICTIONS parquet"
        run_trainer(*flags, "--output", out, "--resume", best, "--eval", opts=opts, processes=processes)
        folders.append(out / "litv2_digits/default")
    return [folder / "report" for folder in folders]


def rows(path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.extra
def test_any_number_of_processes(runs):
    alone = rows(runs[0] / "predictions.csv")
    assert len(alone) == 13
    for report in runs[1:]:
        others = rows(report / "predictions.csv")
        assert [row["image"] for row in others] == [row["image"] for row in alone]
        assert [row["predicted"] for row in others] == [row["predicted"] for row in alone]
        assert all(abs(float(a["confidence"]) - float(b["confidence"])) < 2e-5 for a, b in zip(others, alone))
        assert (report / "confusion.csv").read_text() == (runs[0] / "confusion.csv").read_text()


@pytest.mark.extra
def test_files_agree(runs):
    """The figures follow from the table of predictions; the page holds its pictures, and needs nothing else."""
    summary, images = json.loads((runs[0] / "summary.json").read_text()), rows(runs[0] / "predictions.csv")
    right = [row["true"] == row["predicted"] for row in images]
    assert summary["images"] == 13 and summary["top1"] == pytest.approx(100 * np.mean(right))
    assert [row["right"] for row in images] == [str(int(value)) for value in right]
    recalls = [np.mean([value for value, row in zip(right, images) if row["true"] == name]) for name in "ab"]
    assert [float(row["recall"]) for row in rows(runs[0] / "classes.csv")] == pytest.approx(recalls, abs=1e-6)
    assert summary["balanced_accuracy"] == pytest.approx(100 * np.mean(recalls))
    page = (runs[0] / "report.html").read_text()
    pictures = sorted(path.name for path in runs[0].glob("*.png"))
    assert pictures == ["calibration.png", "confusion.png", *(["mistakes.png"] if summary["top1"] < 100 else [])]
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r"""(?:src|href)=["'](?!data:)|https?://""", page)
    for name in pictures:
        assert matplotlib.image.imread(runs[0] / name)[..., :3].std() > 0.03, f"{name} is blank"


@pytest.mark.extra
def test_parquet(runs):
    """The same table, with numbers as numbers."""
    parquet = pytest.importorskip("pyarrow.parquet")
    assert not (runs[0] / "predictions.parquet").exists()  # it was not asked for
    for report in runs[1:]:
        found = parquet.read_table(report / "predictions.parquet").to_pylist()
        assert [type(found[0][name]) for name in ("image", "right", "confidence")] == [str, int, float]
        as_text = [{name: f"{value:.6f}" if isinstance(value, float) else str(value) for name, value in row.items()} for row in found]
        assert as_text == rows(report / "predictions.csv")


def test_parquet_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackage, match="Parquet needs pyarrow"):
        load_config(ROOT / "classification/configs/litv2-digits.yaml", ["TEST.PREDICTIONS", "parquet"])
