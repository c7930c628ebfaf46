# SPDX-License-Identifier: Apache-2.0
"""A classifier of ImageNet's 1000 classes on folders of some of them: its logits, restricted by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from class_map import imagenet_outputs, keep_outputs
from config import ConfigError, load_config
from data.sources import DataError
from helpers import FAST, ROOT, normal, tiny_model, write_images
from litv2.classes import imagenet_classes
from litv2.preprocess import evaluation_transform
from main import main

CONFIG = str(ROOT / "classification/configs/litv2-small.yaml")
# In the order of their names, which is not that of their outputs: a goldfish, a cowboy hat, a bell cote, and in between.
NUMBERS = ["1", "10", "2", "515", "999"]


def model_of_1000():
    return tiny_model(num_classes=1000, patch_size=2, embed_dim=16, depths=(1, 1, 1, 1)).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "imagenet.pth"
    torch.save(dict(model=model_of_1000().state_dict()), path)
    return path


def evaluate(root: Path, split: str, weights: Path, output: Path) -> Path:
    flags = ["--cfg", CONFIG, "--data-path", str(root), "--class-map", "imagenet", "--resume", str(weights), "--eval"]
    opts = f"DATA.DATASET folder DATA.VAL_SPLIT {split} DATA.IMG_SIZE 32 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0 DEVICE cpu".split()
    assert main([*flags, "--output", str(output), "--opts", *FAST, *opts]) == 0
    return output / "litv2_small/default/report"


@pytest.mark.parametrize("named", ["by WordNet ID", "by number"])
def test_restricted_logits(named, weights, tmp_path):
    """ImageNet-A and -R name their folders by WordNet ID, ImageNet-V2 by number; there are no training images."""
    ids = list(imagenet_classes())
    outputs = {(number if named == "by number" else ids[int(number)]): int(number) for number in NUMBERS}
    write_images(tmp_path / "few", dict.fromkeys(outputs, 3), size=36)
    report = evaluate(tmp_path, "few", weights, tmp_path / "out")
    classes, model, prepare, right = sorted(outputs), model_of_1000(), evaluation_transform(32), []
    kept = [outputs[name] for name in classes]
    with open(report / "predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    for row in rows:
        with torch.inference_mode():
            share = model(prepare(Image.open(row["image"]))[None])[0][kept].softmax(dim=0)
        assert row["predicted"] == classes[share.argmax()]
        assert float(row["confidence"]) == pytest.approx(share.max().item(), abs=2e-5)
        right.append(Path(row["image"]).parent.name == row["predicted"])
    summary = json.loads((report / "summary.json").read_text())
    assert summary["top1"] == pytest.approx(100 * sum(right) / 15) and summary["classes"] == 5


def test_the_outputs_of_folders():
    ids = list(imagenet_classes())
    assert len(ids) == 1000 and ids == sorted(ids)
    assert imagenet_outputs(["n01440764", "n15075141"]) == [0, 999] and imagenet_outputs(["0", "10", "2"]) == [0, 10, 2]
    with pytest.raises(DataError, match="1 folders are no WordNet IDs of ImageNet's 1000 classes: cat"):
        imagenet_outputs(["n01440764", "cat"])
    with pytest.raises(DataError, match="1 folders are no numbers from 0 to 999: 1000"):
        imagenet_outputs(["0", "1000"])


def test_kept_outputs():
    model, images = model_of_1000(), normal(0, 2, 3, 32, 32)
    with torch.inference_mode():
        before = model(images)
        keep_outputs(model, [7, 3, 999])
        torch.testing.assert_close(model(images), before[:, [7, 3, 999]], rtol=0, atol=1e-6)
    assert model.num_classes == 3


def test_what_does_not_fit(weights, tmp_path):
    write_images(tmp_path / "few", {"n01443537": 1, "n01440764": 1})
    state = torch.load(weights)
    torch.save({**state, "class_names": [f"n{i:08}" for i in range(1000)]}, tmp_path / "others.pth")
    with pytest.raises(DataError, match="the classes of the checkpoint .* differ from those of ImageNet"):
        evaluate(tmp_path, "few", tmp_path / "others.pth", tmp_path)
    write_images(tmp_path / "few", {"dog": 1})
    with pytest.raises(DataError, match="1 folders are no WordNet IDs of ImageNet's 1000 classes: dog"):
        evaluate(tmp_path, "few", weights, tmp_path)
    for opts in (["EVAL_MODE", False], ["EVAL_MODE", True, "DATA.DATASET", "cifar"]):
        with pytest.raises(ConfigError, match="DATA.CLASS_MAP is for --eval on folders"):
            load_config(CONFIG, ["DATA.CLASS_MAP", "imagenet", *opts])
