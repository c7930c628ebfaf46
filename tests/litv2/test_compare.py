# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 compare: McNemar's test by hand, a bootstrap of scikit-learn's figures, and tables that follow from the reports."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, recall_score

from command_helpers import run_here
from document_helpers import documented
from litv2 import mean_precision
from litv2.__main__ import main
from litv2.comparison.paired import compare_mean_precision, compare_paired, holm
from multilabel_report import MultiLabelReport
from report import Report, write_csv

CLASSES = ["ant", "bee", "cat"]


def outcomes(both: int, only_first: int, only_second: int, none: int) -> tuple[np.ndarray, np.ndarray]:
    counts = (both, only_first, only_second, none)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 3), (2, 10), (25, 9), (1, 400)])
def test_mcnemar_is_the_binomial_sum(b, c):
    n = b + c
    probabilities = [math.comb(n, k) / 2**n for k in range(n + 1)]
    p = sum(probability for k, probability in enumerate(probabilities) if abs(2 * k - n) >= abs(c - b))
    found = compare_paired(*outcomes(50, b, c, 7))
    assert found.p == pytest.approx(min(1, p), rel=1e-9) and (found.only_first, found.only_second) == (b, c)
    assert found.difference == pytest.approx(100 * (c - b) / (57 + n)) and found.low < found.difference < found.high


def test_intervals_cover_the_true_difference():
    """95 of 100, of runs whose true difference is known."""
    rng, shares = np.random.default_rng(0), (0.6, 0.05, 0.12, 0.23)
    tests = [compare_paired(*outcomes(*rng.multinomial(200, shares))) for _ in range(1000)]
    assert 0.93 < np.mean([test.low < 100 * (shares[2] - shares[1]) < test.high for test in tests]) < 0.98


def test_holm():
    """The first two by hand; adjusted values keep the order, and do not pass 1."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.02]) == [0.02] and holm([]) == []
    assert holm([0.9, 0.8, 0.001]) == pytest.approx([1, 1, 0.003])


def test_differences_of_mean_precision(monkeypatch):
    """Both see the images of each sample, and a sample may lack a class."""
    monkeypatch.setattr(mean_precision, "SAMPLES", 40)
    rng = np.random.default_rng(3)
    targets = rng.random((25, 3)) < [0.5, 0.3, 0.08]
    first, second = (rng.normal(0, 1, (25, 3)).round(1) + targets for _ in range(2))
    differences = []
    for draw in np.random.default_rng(0).multinomial(25, [1 / 25] * 25, size=40):
        rows = np.repeat(np.arange(25), draw)
        seen = targets[rows].any(axis=0)
        before, after = (average_precision_score(targets[rows][:, seen], scores[rows][:, seen]) for scores in (first, second))
        differences.append(100 * (after - before))
    before, after = (average_precision_score(targets, scores) for scores in (first, second))
    shift = 100 * (after - before) - np.mean(differences)
    expected = [100 * (after - before), *(np.percentile(differences, [2.5, 97.5]) + shift)]
    assert compare_mean_precision(targets, first, second) == pytest.approx(expected, abs=1e-3)
    assert compare_mean_precision(targets, first, first) == (0, 0, 0)


def write_run(folder: Path, seed: int, data: str = "/data/val", images: int = 60, epochs: int = 3) -> Path:
    """What the trainer leaves, with predictions that are right in two thirds."""
    rng = np.random.default_rng(seed)
    targets = np.arange(images) % 3
    logits = rng.normal(0, 1, (images, 3)) + 1.2 * np.eye(3)[targets]
    names = [f"{data}/{CLASSES[t]}/{i}.png" for i, t in enumerate(targets)]
    return write_folder(folder, Report(names, targets, logits.astype(np.float32), CLASSES), "top1", epochs)


def write_multi_label_run(folder: Path, seed: int, classes: list[str] = CLASSES) -> Path:
    """The same of images with any number of classes, which may be in another order; none has the last of ``CLASSES``."""
    rng, order = np.random.default_rng(seed), [CLASSES.index(name) for name in classes]
    targets = np.stack([np.arange(40) % 2 == 0, np.arange(40) % 3 == 0, np.zeros(40)], axis=1)
    logits = rng.normal(-0.5, 1, (40, 3)) + targets
    report = MultiLabelReport([f"{i}.png" for i in range(40)], targets[:, order], logits[:, order].astype(np.float32), classes)
    return write_folder(folder, report, "map", 3)


def write_folder(folder: Path, report: Report | MultiLabelReport, accuracy: str, epochs: int) -> Path:
    (folder / "report").mkdir(parents=True)
    (folder / "report/summary.json").write_text(json.dumps(report.summary))
    write_csv(folder / "report/predictions.csv", report.predictions())
    write_csv(folder / "report/classes.csv", report.classes())
    (folder / "config.yaml").write_text(f"TAG: {folder.name}\nSEED: 0\nTRAIN:\n  EPOCHS: {epochs}\n  BETAS: [0.9, 0.99]\n")
    rows: list[dict] = [dict(kind="train", update=u, epoch=(u - 1) // 4, loss=2 / u) for u in range(1, 13)]
    rows += [{"kind": "val", "update": 4 * e, "epoch": e, "loss": 1 / e, accuracy: 20.0 * e} for e in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def recomputed(run: Path) -> dict[str, float]:
    """The recall of each class in per cent."""
    images = rows(run / "report/predictions.csv")
    true, predicted = ([row[key] for row in images] for key in ("true", "predicted"))
    return dict(zip(CLASSES, 100 * recall_score(true, predicted, labels=CLASSES, average=None)))


def test_three_runs(tmp_path, capsys):
    """The data of the second were elsewhere."""
    runs = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, "other/place"), write_run(tmp_path / "c", 2, epochs=5)]
    out = tmp_path / "out"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    recalls = [recomputed(run) for run in runs]
    classes = rows(out / "classes.csv")
    for row in classes:
        own = [recall[row["class"]] for recall in recalls]
        assert [float(row[name]) for name in "abc"] == pytest.approx(own, abs=1e-4)
        assert abs(float(row["difference of recall"])) == pytest.approx(max(abs(recall - own[0]) for recall in own[1:]), abs=2e-4)
    gaps = [abs(float(row["difference of recall"])) for row in classes]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0 and {row["class"] for row in classes} == set(CLASSES)
    assert rows(out / "settings.csv") == [
        {"setting": "TAG", "a": "a", "b": "b", "c": "c"},
        {"setting": "TRAIN.EPOCHS", "a": "3", "b": "3", "c": "5"},
    ]
    summaries = [json.loads((run / "report/summary.json").read_text()) for run in runs]
    top1 = [row for row in rows(out / "figures.csv") if row["figure"] == "top1"]
    assert [float(row["value"]) for row in top1] == [summary["top1"] for summary in summaries]
    assert [float(row["low"]) for row in top1] == [summary["top1_interval"][0] for summary in summaries]
    paired = rows(out / "paired.csv")
    right = [[row["right"] == "1" for row in rows(run / "report/predictions.csv")] for run in runs]
    for row, other in zip(paired, right[1:]):
        assert int(row["only it is right"]) == sum(now and not before for before, now in zip(right[0], other))
        assert int(row["only the other"]) == sum(before and not now for before, now in zip(right[0], other))
    assert [float(row["p (Holm)"]) for row in paired] == pytest.approx(holm([float(row["p (McNemar)"]) for row in paired]))
    assert matplotlib.image.imread(out / "curves.png")[..., :3].std() > 0.03
    assert "p (Holm)" in capsys.readouterr().out


def test_runs_with_any_number_of_classes_per_image(tmp_path, capsys):
    """The second knows the classes in another order."""
    runs = [write_multi_label_run(tmp_path / "a", 0), write_multi_label_run(tmp_path / "b", 1, CLASSES[::-1])]
    out = tmp_path / "out"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    maps, precisions = [], []
    for run in runs:
        images = rows(run / "report/predictions.csv")
        found = [average_precision_score([name in row["true"] for row in images], [float(row[name]) for row in images])
                 for name in CLASSES[:2]]  # fmt: skip
        precisions.append(dict(zip(CLASSES, found)))
        maps.append(100 * np.mean(found))
    assert [float(row["value"]) for row in rows(out / "figures.csv") if row["figure"] == "map"] == pytest.approx(maps)
    (paired,) = rows(out / "paired.csv")
    difference, low, high = (float(paired[key]) for key in ("difference of mAP in %", "low", "high"))
    assert difference == pytest.approx(maps[1] - maps[0]) and low < difference < high < low + 60
    classes = rows(out / "classes.csv")
    assert [row["class"] for row in sorted(classes, key=lambda row: row["class"])] == CLASSES[:2]
    for row in classes:
        own = [100 * known[row["class"]] for known in precisions]
        found = [float(row[key]) for key in ("a", "b", "difference of average precision")]
        assert found == pytest.approx([*own, own[1] - own[0]], abs=1e-3)
    assert matplotlib.image.imread(out / "curves.png")[..., :3].std() > 0.03
    assert "McNemar" not in capsys.readouterr().out


def test_runs_that_were_only_evaluated(tmp_path, capsys):
    runs = [write_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for run in runs:
        (run / "metrics.jsonl").unlink()
        (run / "config.yaml").unlink()
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    notes = capsys.readouterr().err
    assert notes.count("no metrics.jsonl") == notes.count("no config.yaml") == 2


@pytest.mark.parametrize("command", documented("docs/data.md", r"python -m litv2 compare BASELINE RUN"), ids=str)
def test_documented(command, tmp_path, monkeypatch, capsys):
    runs = dict(BASELINE=write_run(tmp_path / "a", 0), RUN=write_run(tmp_path / "b", 1))
    run_here(monkeypatch, command, "--out", tmp_path / "out", files=runs)
    assert "p (McNemar)" in capsys.readouterr().out and (tmp_path / "out/paired.csv").is_file()


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda a, b: [a], "expected two runs or more, each given once"),
        (lambda a, b: [a, a], "expected two runs or more, each given once"),
        (lambda a, b: [a, b / "nowhere"], "nowhere is no folder"),
        (lambda a, b: [a, b / "report"], "there is no .*report/report/summary.json"),
        (lambda a, b: [a, write_run(b.parent / "c", 1, images=57)], "3 of 60 are only in the first, 0 of 57 only in the second"),
        (lambda a, b: change(b / "report/classes.csv", "bee", "wasp"), "know different classes: only one of them has bee, wasp"),
        (lambda a, b: change(b / "report/predictions.csv", "7.png,bee", "7.png,cat"), "different labels for 1 images: bee/7.png"),
        (lambda a, b: change(b / "report/predictions.csv", "image,true", "image,label"), "predictions.csv is not as the trainer writes"),
        (lambda a, b: [a, write_multi_label_run(b.parent / "c", 1)], "a is a run whose images have one class, and those of .*c have any"),
        (lambda a, b: change(b / "report/summary.json", "{", "["), "summary.json is not as the trainer writes it"),
        (lambda a, b: change(b / "config.yaml", "TAG: b", "TAG: ["), "config.yaml is not as the trainer writes it"),
    ],
)
def test_one_line_for_what_cannot_be_compared(breaks, words, tmp_path, capsys):
    a, b = (write_run(tmp_path / name, seed) for seed, name in enumerate("ab"))
    assert main(["compare", *map(str, breaks(a, b) or [a, b]), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{words}", line) and not (tmp_path / "out").exists()
