# SPDX-License-Identifier: Apache-2.0
"""Images of any number of classes: scikit-learn's figures, the losses of the papers, and a run from its table to ``predict``."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn import metrics
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

import multilabel
from config import load_config
from data.mixup import build_mixup
from helpers import FAST, ROOT, generator, run_trainer, same
from litv2 import mean_precision
from litv2.__main__ import main as litv2
from litv2.classes import thresholds
from litv2.errors import UserError, run_program
from litv2.weights.reading import read_checkpoint
from main import main
from multilabel_report import MultiLabelReport
from tasks import build_loss

DIGITS = str(ROOT / "classification/configs/litv2-digits.yaml")
NAMES = [*"abcde"]


def planted(images: int = 80, digits: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Targets and logits that know something of them; no image has the class 3. ``digits`` rounds logits, so that some are equal."""
    rng = np.random.default_rng(0)
    targets = (rng.random((images, 5)) < [0.5, 0.3, 0.1, 0, 0.2]).astype(np.float32)
    logits = rng.normal(-0.5, 1, (images, 5)) + targets
    return targets, (logits if digits is None else logits.round(digits)).astype(np.float32)


def test_figures_are_those_of_scikit_learn():
    targets, logits = planted(digits=1)
    present, predicted = [0, 1, 2, 4], logits >= 0
    figures = multilabel.figures(targets, logits)
    precisions = [metrics.average_precision_score(targets[:, i], logits[:, i]) for i in present]
    assert figures["map"] == pytest.approx(100 * np.mean(precisions))
    assert figures["f1_macro"] == pytest.approx(100 * np.mean([metrics.f1_score(targets[:, i], predicted[:, i]) for i in present]))
    assert figures["f1_micro"] == pytest.approx(100 * metrics.f1_score(targets.ravel(), predicted.ravel()))
    assert figures["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(*map(torch.tensor, (logits, targets))).item(), rel=1e-6)
    assert np.allclose(multilabel.probabilities(logits), torch.tensor(logits).sigmoid())
    for chosen in ([0], [0, 3], [2, 3]):  # of one column scikit-learn's averages are those of having it and not
        f1 = [metrics.f1_score(targets[:, i], predicted[:, i]) for i in chosen if i != 3]
        few = multilabel.figures(targets[:, chosen], logits[:, chosen])
        assert few["f1_macro"] == pytest.approx(100 * np.mean(f1))
        assert few["f1_micro"] == pytest.approx(100 * metrics.f1_score(targets[:, chosen].ravel(), predicted[:, chosen].ravel()))
        both = np.array([metrics.precision_recall_fscore_support(targets[:, i], predicted[:, i], zero_division=0, average="binary")[:3]
                         for i in chosen])  # fmt: skip
        assert pytest.approx(both) == multilabel.by_class(targets[:, chosen], predicted[:, chosen])[:3].T
    with pytest.raises(UserError, match="nothing to measure"):
        multilabel.figures(np.zeros_like(targets), logits)
    with pytest.raises(UserError, match="not finite"):
        multilabel.figures(targets, np.full_like(logits, np.nan))


def test_interval_is_a_bootstrap_over_images(monkeypatch):
    monkeypatch.setattr(mean_precision, "SAMPLES", 40)
    targets, logits = (part[:, [0, 1, 2, 4]] for part in planted(30, digits=1))
    draws = np.random.default_rng(0).multinomial(30, [1 / 30] * 30, size=40)
    samples = []
    for draw in draws:
        rows = np.repeat(np.arange(30), draw)
        columns = [i for i in range(4) if targets[rows, i].any()]
        samples.append(100 * metrics.average_precision_score(targets[rows][:, columns], logits[rows][:, columns]))
    assert min(targets[np.repeat(np.arange(30), draw), 2].sum() for draw in draws) == 0, "a sample should lack a class"
    shift = multilabel.figures(targets, logits)["map"] - np.mean(samples)
    assert multilabel.map_interval(targets, logits) == pytest.approx(np.percentile(samples, [2.5, 97.5]) + shift, abs=1e-3)


def test_interval_of_random_orders(monkeypatch):
    monkeypatch.setattr(mean_precision, "SAMPLES", 40)
    monkeypatch.setattr(mean_precision, "PARTS", 2)
    targets, logits = (part[:, [0, 1, 2, 4]] for part in planted(30, digits=1))
    rng = np.random.default_rng(0)
    orders = [order for _ in range(2) for order in rng.permuted(np.tile(np.arange(30), (20, 1)), axis=1)]
    samples = [100 * metrics.average_precision_score(targets[order], logits) for order in orders]
    assert multilabel.chance_interval(targets, logits) == pytest.approx(np.percentile(samples, [2.5, 97.5]), abs=1e-3)


def test_chance_is_the_mean_over_all_orders():
    scores = np.arange(6.0)
    for positives in range(1, 7):
        orders = [np.isin(np.arange(6), places).astype(int) for places in itertools.combinations(range(6), positives)]
        exact = np.mean([metrics.average_precision_score(order, scores) for order in orders])
        assert multilabel.chance(np.array(orders[0])[:, None]) == pytest.approx([exact])


@pytest.mark.parametrize("images, opposite", [(9, False), (80, False), (9, True)])
def test_thresholds_give_the_largest_f1(images, opposite):
    """Where the scores say the opposite, it is best to accept almost all images."""
    targets, logits = planted(images, digits=1)
    targets = 1 - targets if opposite else targets
    scores = multilabel.probabilities(logits)
    found = multilabel.best_thresholds(targets, scores)
    for i in range(5):
        if not targets[:, i].any():
            assert found[i] == 0.5
            continue
        levels = np.unique(scores[:, i])
        f1 = [metrics.f1_score(targets[:, i], scores[:, i] >= level) for level in levels]
        best = max(level for level, value in zip(levels, f1) if value == max(f1))  # the highest of the best
        below = max([0, *levels[levels < best]])
        assert found[i] == pytest.approx((best + below) / 2)


def test_report_is_that_of_scikit_learn():
    targets, logits = planted()
    report = MultiLabelReport([f"{i}.png" for i in range(80)], targets, logits, NAMES)
    header, *rows = report.classes()
    for i, row in enumerate(rows):
        cells = dict(zip(header, row))
        for suffix, predicted in (("", logits[:, i] >= 0), (" at it", multilabel.probabilities(logits[:, i]) >= float(cells["threshold"]))):
            expected = metrics.precision_recall_fscore_support(targets[:, i], predicted, average="binary", zero_division=0)[:3]
            assert [float(cells[name + suffix]) for name in ("precision", "recall", "f1")] == pytest.approx(expected, abs=1e-6)
        assert cells["images"] == targets[:, i].sum()
        if i != 3:
            precision = metrics.average_precision_score(targets[:, i], logits[:, i])
            assert float(cells["average precision"]) == pytest.approx(precision, abs=1e-6)
    assert rows[3][1:3] == ["", ""] and report.summary["classes_with_images"] == 4
    low, high = report.summary["map_interval"]
    assert low < report.summary["map"] < high < low + 40 and low > report.summary["map_of_random_order"]
    scores = multilabel.probabilities(logits)
    _, *predictions = report.predictions()
    assert [row[3:] for row in predictions] == [[f"{score:.9g}" for score in row] for row in scores]
    for column, found in ((1, targets), (2, scores >= report.thresholds)):
        assert [row[column] for row in predictions] == ["|".join(name for name, on in zip(NAMES, row) if on) for row in found]
    assert report.summary["classes_per_image"] == pytest.approx(targets.sum() / 80)
    assert report.summary["map_of_random_order"] == pytest.approx(100 * multilabel.chance(targets[:, [0, 1, 2, 4]]).mean())
    mistakes = report.mistakes()
    errors = np.abs(targets - scores).max(axis=1)[[int(name.removesuffix(".png")) for name in mistakes]]
    assert len(errors) > 10 and (np.diff(errors) <= 0).all(), "the largest first"
    name, caption = next(iter(mistakes.items()))
    image = int(name.removesuffix(".png"))
    missed = [NAMES[i] for i in range(5) if targets[image, i] and not report.predicted[image, i]]
    assert f"missed: {', '.join(missed)}" in caption if missed else "missed" not in caption


def settings(*overrides):
    return load_config(DIGITS, ["DATA.DATASET", "csv", *overrides])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses(smoothing):
    targets, logits = (torch.tensor(part) for part in planted(6))

    def loss(*overrides) -> float:
        config = settings("MODEL.LABEL_SMOOTHING", smoothing, *overrides)
        return build_loss(config, mixed=False, vectors=True)(logits, targets).item()

    crossed = asymmetric = 0.0
    for x, y in zip(logits.flatten().tolist(), targets.flatten().tolist()):
        y, p = (1 - smoothing) * y + smoothing / 2, 1 / (1 + math.exp(-x))
        crossed -= (y * math.log(p) + (1 - y) * math.log(1 - p)) / logits.numel()
        shifted = max(p - 0.05, 0)  # arXiv 2009.14119, equations 5 to 7, with timm's focusing 1 and 4
        asymmetric -= (y * (1 - p) * math.log(p) + (1 - y) * shifted**4 * math.log(1 - shifted)) / logits.numel()
    assert loss("MODEL.TASK", "multi") == pytest.approx(crossed, rel=1e-5)
    if smoothing == 0:  # of a target between 0 and 1, timm focuses by a power between the two
        assert loss("MODEL.TASK", "multi", "TRAIN.MULTI_LABEL_LOSS", "asymmetric") == pytest.approx(asymmetric, rel=1e-5)
    targets = targets + 0.1
    targets = targets / targets.sum(dim=1, keepdim=True)
    assert loss() == pytest.approx(SoftTargetCrossEntropy()(logits, targets * (1 - smoothing) + smoothing / 5).item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("batch", [1, 5, 8])
def test_mixup_of_vectors(mode, batch):
    """Those of one class each are mixed as its number is, and the loss then smooths as mixup does."""
    config = settings("AUG.MIXUP", 0.8, "AUG.CUTMIX", 1.0, "AUG.MIXUP_MODE", mode)
    classes = torch.arange(batch) % 5

    def mixed(targets: Tensor) -> tuple[Tensor, Tensor]:
        random.seed(0)
        np.random.seed(0)
        images = torch.arange(batch, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()
        return build_mixup(config, 5, vectors=targets.ndim == 2)(images, targets)

    (images, numbers), (same_images, vectors) = mixed(classes), mixed(torch.eye(5)[classes])
    assert torch.equal(images, same_images) and torch.allclose(0.9 * vectors + 0.1 / 5, numbers)
    several = mixed(torch.ones(batch, 5))[1]
    assert torch.allclose(several, torch.ones(batch, 5))


OPTS = """DATA.DATASET csv MODEL.TASK multi MODEL.LABEL_SMOOTHING 0.05 TRAIN.ACCUMULATION_STEPS 2 AUG.MIXUP 0.8 AUG.MIXUP_PROB 0.3
SAVE_FREQ 4 TRAIN.EPOCHS 8 TRAIN.EMA_DECAY 0.5 EVAL_FREQ 4 AUG.COLOR_JITTER 0"""


def trainer(*flags, opts: str = "") -> int:
    """The exit status of the program, run in this process."""
    return run_program(lambda: main(["--cfg", DIGITS, *map(str, flags), "--workers", "0", "--opts", *FAST, *OPTS.split(), *opts.split()]))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images whose classes are the colour channels that are bright; some have none."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 48), ("val", 21)):
        lines = ["image,labels"]
        for i in range(count):
            rng = generator(1000 * count + i)
            bright = rng.random(3) < 0.4
            pixels = rng.integers(0, 90, (32, 32, 3)) + 110 * bright
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"{split}{i}.png")
            lines.append(f"{split}{i}.png,{'|'.join(name for name, on in zip(('red', 'green', 'blue'), bright) if on)}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert trainer("--data-path", data, "--output", out, "--batch-size", 8) == 0
    return out / "litv2_digits/default"


def rows(path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_report(report, data) -> dict:
    """The summary follows from the table of predictions and the data's own table; returns it."""
    summary, images, truth = json.loads((report / "summary.json").read_text()), rows(report / "predictions.csv"), rows(data / "val.csv")
    names, thresholds = ["blue", "green", "red"], json.loads((report / "thresholds.json").read_text())
    assert list(thresholds) == names and [row["image"] for row in images] == sorted(row["image"] for row in truth)
    labels = {row["image"]: set(filter(None, row["labels"].split("|"))) for row in truth}
    targets = np.array([[name in labels[row["image"]] for name in names] for row in images])
    scores = np.array([[float(row[name]) for name in names] for row in images])
    assert summary["map"] == pytest.approx(100 * metrics.average_precision_score(targets, scores))
    for key, predicted in (("", scores >= 0.5), ("_at_thresholds", scores >= list(thresholds.values()))):
        for average in ("macro", "micro"):
            assert summary[f"f1_{average}{key}"] == pytest.approx(100 * metrics.f1_score(targets, predicted, average=average))
    chosen = ["|".join(name for name in names if float(row[name]) >= thresholds[name]) for row in images]
    assert [row["predicted"] for row in images] == chosen
    return summary


def test_a_run(finished, data):
    summary, state = check_report(finished / "report", data), read_checkpoint(finished / "latest.pth")
    assert summary["images"] == 21 and summary["map"] > 85 > summary["map_of_random_order"], "it should have learnt what is bright"
    assert state["thresholds"] == list(json.loads((finished / "report/thresholds.json").read_text()).values())
    best = [row for row in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "val"]
    assert state["progress"]["best"] == max(row["map"] for row in best) and best[-1]["map"] == pytest.approx(summary["map"])
    page = (finished / "report/report.html").read_text()
    assert "classes.png" in {path.name for path in (finished / "report").glob("*.png")}
    assert not re.search(r"""(?:src|href)=["'](?!data:)|https?://""", page) and "mean average precision" in page
    for picture in ("report/classes.png", "curves.png", "predictions.png"):
        assert matplotlib.image.imread(finished / picture)[..., :3].std() > 0.03, f"{picture} is blank"


def test_resumed_in_the_middle_it_ends_in_the_same_bits(finished, data, tmp_path):
    assert trainer("--data-path", data, "--output", tmp_path, "--batch-size", 8, "--resume", finished / "epoch-0004.pth") == 0
    whole, resumed = (read_checkpoint(folder / "latest.pth") for folder in (finished, tmp_path / "litv2_digits/default"))
    for key in whole.keys() - {"config"}:
        same(whole[key], resumed[key], key)


def test_predict_finds_what_the_report_says(finished, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    expected = {row["image"]: set(filter(None, row["predicted"].split("|"))) for row in rows(finished / "report/predictions.csv")}
    assert litv2(["convert", str(finished / "latest.pth"), "slim.safetensors"]) == 0
    capsys.readouterr()
    assert litv2(["predict", *(str(data / name) for name in expected), "--checkpoint", "slim.safetensors"]) == 0
    parts = re.split(r"^\S*?(\w+\.png) -> .*$", capsys.readouterr().out, flags=re.M)[1:]
    assert {name: set(re.findall(r"% +(\w+)$", found, re.M)) for name, found in zip(parts[::2], parts[1::2])} == expected
    assert any(len(found) > 1 for found in expected.values())


def test_the_task_must_be_that_of_the_checkpoint(finished, data, tmp_path, capsys):
    table = "image,labels\n" + "".join(f"train{i}.png,{'red' if i % 2 else 'blue'}\n" for i in range(8))
    for split in ("train", "val"):
        (data / f"one_{split}.csv").write_text(table)
    opts = "MODEL.TASK single DATA.TRAIN_SPLIT one_train DATA.VAL_SPLIT one_val"
    assert trainer("--data-path", data, "--output", tmp_path, "--resume", finished / "best.pth", "--eval", opts=opts) == 2
    assert "the checkpoint is of MODEL.TASK multi, and cannot be used with MODEL.TASK single" in capsys.readouterr().err


def test_what_a_checkpoint_says_of_thresholds():
    several = dict(config=dict(MODEL=dict(TASK="multi")))
    assert thresholds({}, 2) is thresholds(dict(config="a text"), 2) is None
    assert thresholds(several, 2) == [0.5, 0.5] and thresholds(several | dict(thresholds=[0.0, 1.0]), 2) == [0.0, 1.0]
    for wrong in ([0.5], [0.5, 2.0], [0.5, math.nan], "ab", [0.5, True]):
        with pytest.raises(UserError, match="thresholds must be 2 numbers"):
            thresholds(several | dict(thresholds=wrong), 2)
    with pytest.raises(UserError, match="TASK must be single or multi, got 'both'"):
        thresholds(dict(config=dict(MODEL=dict(TASK="both"))), 2)


@pytest.mark.extra
def test_any_number_of_processes(finished, data, tmp_path):
    """Of 21 images, one has none of the last batch's: shares of 11 and 10, or 7 each."""
    alone, summary = rows(finished / "report/predictions.csv"), json.loads((finished / "report/summary.json").read_text())
    for processes in (2, 3):
        flags = ["--data-path", data, "--output", tmp_path / str(processes), "--resume", finished / "latest.pth", "--eval", "--workers", 0]
        done = run_trainer(*flags, "--batch-size", 4, opts=OPTS, processes=processes)
        assert f"mAP {summary['map']:.3f}" in done.stdout
        report = tmp_path / f"{processes}/litv2_digits/default/report"
        check_report(report, data)
        for row, other in zip(rows(report / "predictions.csv"), alone, strict=True):
            assert [row[key] for key in ("image", "true", "predicted")] == [other[key] for key in ("image", "true", "predicted")]
            assert all(abs(float(row[name]) - float(other[name])) < 2e-5 for name in ("red", "green", "blue"))
