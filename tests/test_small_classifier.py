# SPDX-License-Identifier: Apache-2.0
"""What is published beside the small classifier of the examples agrees: card, log, report, documents and weights."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from command_helpers import run_here
from document_helpers import documented, documents, project_files, table
from helpers import FAST, ROOT, shared, write_images
from litv2.commands.convert import PATHS
from litv2.factory import load_model

DOCUMENT = "examples/litv2_imagenette/README.md"
FOLDER = (ROOT / DOCUMENT).parent
WEIGHTS = ROOT / "examples/litv2_imagenette.safetensors"
SMALLER = [*FAST, *"DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0 DEVICE cpu DATA.IMG_SIZE 32 TEST.IMG_SIZE 32".split()]
MENTIONS = [  # of the accuracy, in the other documents
    ("README.md", r"([\d.]+) % top-1 of 500 others"),
    ("docs/explain.md", r"accuracy is ([\d.]+) % of 500 other photographs"),
    ("docs/many-images.md", r"own head has ([\d.]+) % top-1"),
    ("docs/data.md", r"classifies (\d+) % of the 500 right"),
    ("classification/README.md", r"The teacher has ([\d.]+) % of the same 500"),
    ("classification/README.md", r"\| none \| ([\d.]+) \("),
]


def summary() -> dict:
    return json.loads((FOLDER / "report/summary.json").read_text())


def rows(name: str, folder: Path = FOLDER / "report") -> list[dict[str, str]]:
    with open(folder / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def evaluations() -> list[dict]:
    lines = (FOLDER / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "val"]


def wilson(hits: int, images: int) -> tuple[float, float]:
    """The textbook's formula, in percent."""
    z, share = 1.959964, hits / images
    middle = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    return 100 * (middle - half), 100 * (middle + half)


def test_the_report_is_that_of_its_predictions():
    """Counted anew from the table of every image."""
    found, images = summary(), rows("predictions.csv")
    assert len({row["image"] for row in images}) == len(images) == found["images"] == 500
    for key, hits in (
        ("top1", sum(row["true"] == row["predicted"] for row in images)),
        ("top5", sum(row["true"] in [row[f"class{i}"] for i in range(1, 6)] for row in images)),
    ):
        assert found[key] == pytest.approx(100 * hits / 500) and found[f"{key}_interval"] == pytest.approx(wilson(hits, 500), abs=1e-3)
    recalls = []
    for row in rows("classes.csv"):
        own = [image for image in images if image["true"] == row["class"]]
        recalls.append(sum(image["predicted"] == row["class"] for image in own) / len(own))
        assert int(row["images"]) == len(own) == 50 and float(row["recall"]) == pytest.approx(recalls[-1])
        confused = next(line for line in rows("confusion.csv") if line["true \\ predicted"] == row["class"])
        assert int(confused[row["class"]]) == round(50 * recalls[-1])
    assert found["balanced_accuracy"] == pytest.approx(100 * sum(recalls) / 10)


def test_the_card_has_the_figures_of_the_report():
    found = summary()
    keys = {"top-1": "top1", "top-5": "top5", "balanced accuracy": "balanced_accuracy"}
    printed = {row["figure"]: row for row in table(DOCUMENT, "figure", "value", "95 % interval")}
    for name, key in keys.items():
        low, high = found[f"{key}_interval"]
        assert (printed[name]["value"], printed[name]["95 % interval"]) == (f"{found[key]:.1f} %", f"{low:.1f} to {high:.1f} %")
    assert printed["cross-entropy"]["value"] == f"{found['loss']:.3f}"
    assert printed["calibration error"]["value"] == f"{found['calibration_error']:.1f} %"
    recall = {row["class"]: 100 * float(row["recall"]) for row in rows("classes.csv")}
    card = " ".join(documents()[DOCUMENT].split())
    saws, pumps = recall["n03000684"], recall["n03425413"]
    assert f"Chain saws are recognised in {saws:.0f} % of their photographs, gas pumps in {pumps:.0f} %." in card
    mended = f"dividing its logits by {found['temperature']:.2f} would bring the calibration error to "
    assert f"{mended}{found['calibration_error_at_temperature']:.1f} %" in card


def test_the_log_has_the_figures_of_the_card():
    """Log and metrics are of one training; the weights are those of its end, and the card says how the best evaluation compares."""
    log, curve = (FOLDER / "log.txt").read_text(), evaluations()
    lines = re.findall(r"epoch (\d+)/70  Acc@1 ([\d.]+)  Acc@5 ([\d.]+)  val loss ([\d.]+)", log)
    assert [tuple(map(float, line)) for line in lines] == [
        (row["epoch"], round(row["top1"], 3), round(row["top5"], 3), round(row["loss"], 4)) for row in curve
    ]
    assert [row["epoch"] for row in curve] == list(range(5, 71, 5)) and all(row["images"] == 500 for row in curve)
    best, last = max(curve, key=lambda row: row["top1"]), curve[-1]
    (top1, epoch) = re.search(r"best Acc@1  ([\d.]+) %  after epoch (\d+)", log).groups()
    assert (float(top1), int(epoch)) == (round(best["top1"], 3), best["epoch"])
    card = " ".join(documents()[DOCUMENT].split())
    assert f"after the last epoch, {last['epoch']}, which had {last['top1']:.1f} % before" in card
    assert f"best of the {len(curve)} evaluations, after epoch {best['epoch']}, had {best['top1']:.1f} %" in card
    assert summary()["top1"] == pytest.approx(last["top1"], abs=0.2 + 1e-9), "rounding to float16 may turn an image over"


@pytest.mark.parametrize("document, pattern", MENTIONS)
def test_other_documents_have_the_accuracy(document, pattern):
    (printed,) = re.findall(pattern, " ".join(documents()[document].split()))
    decimals = len(printed.partition(".")[2])
    assert printed == f"{summary()['top1']:.{decimals}f}"


def test_the_configuration_is_that_of_the_weights():
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(WEIGHTS, "pt") as file:
        kept = file.metadata()
        assert {file.get_tensor(name).dtype for name in list(file.keys())} <= {torch.float16, torch.int64}
    published = yaml.safe_load((FOLDER / "config.yaml").read_text())
    for *sections, key in PATHS:  # which conversion leaves out
        section = published
        for name in sections:
            section = section[name]
        assert section.pop(key) in ("", [], "DIR", "output")
    assert published == json.loads(kept["config"])
    assert json.loads(kept["class_names"]) == [row["class"] for row in rows("classes.csv")]


def test_what_is_published_is_small_and_names_no_machine():
    files = [ROOT / name for name in project_files(f"{FOLDER.relative_to(ROOT).as_posix()}/*")]
    assert WEIGHTS.stat().st_size < 10e6 and sum(file.stat().st_size for file in files) < 1e6
    for content in [WEIGHTS.read_bytes()[:20_000], *(file.read_bytes() for file in files if file.suffix != ".png")]:
        assert not re.search(rb"(?<![\w.])/(home|root|tmp|work|mnt|data|Users|usr|opt)/", content)


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* --data-path DIR"), ids=str)
def test_documented_training_and_conversion(command, tmp_path, monkeypatch, capsys):
    """Of a smaller network, on noise; what conversion writes is what predict reads."""
    names = [row["class"] for row in rows("classes.csv")]
    for split in ("train", "val"):
        write_images(tmp_path / "images" / split, dict.fromkeys(names, 2), size=32)
    run_here(monkeypatch, command, "--opts", "OUTPUT", tmp_path, *SMALLER, files=dict(DIR=tmp_path / "images"))
    (conversion,) = documented(DOCUMENT, r"python -m litv2 convert .*")
    source, target = conversion.words[4:6]
    files = {source: tmp_path / source.removeprefix("classification/output/"), target: tmp_path / "small.safetensors"}
    assert conversion.folder / target == WEIGHTS
    run_here(monkeypatch, conversion, files=files)
    assert load_model(tmp_path / "small.safetensors").content["class_names"] == names
    assert str(tmp_path) not in (tmp_path / "small.safetensors").read_bytes().decode("latin-1")


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* --eval .*"), ids=str)
def test_documented_evaluation(command, tmp_path, monkeypatch):
    """Of the published weights, where the photographs are at hand: each has the class and the confidence of the report."""
    data = shared("data/imagenette_mini")
    run_here(monkeypatch, command, "--output", tmp_path, "--opts", "DATA.NUM_WORKERS", "0", "DEVICE", "cpu", files=dict(DIR=data))
    folder = tmp_path / "litv2_imagenette/published/report"
    found, published = json.loads((folder / "summary.json").read_text()), summary()
    before, after = rows("predictions.csv"), rows("predictions.csv", folder)
    assert [row["image"].removeprefix(str(data)) for row in after] == [row["image"].removeprefix("DIR") for row in before]
    shares = np.array([[[float(row[f"share{i}"]) for i in range(1, 6)] for row in images] for images in (before, after)])
    assert np.abs(shares[1] - shares[0]).max() < 1e-3
    close = np.count_nonzero(shares[0, :, 0] - shares[0, :, 1] < 2e-3)
    assert abs(found["top1"] - published["top1"]) <= 100 * close / 500 + 1e-9, "only a tie could turn"
    assert found["loss"] == pytest.approx(published["loss"], abs=1e-3)
