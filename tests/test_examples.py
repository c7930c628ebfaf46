# SPDX-License-Identifier: Apache-2.0
"""Each example runs as it is from the root, on a CPU, and is short."""

from __future__ import annotations

import json
import math
import re
import runpy
from importlib.util import find_spec

import pytest
import torch

import command_helpers
from document_helpers import Command, documented, table
from helpers import ROOT
from hilo import HiLo

DOCUMENT = "examples/README.md"
EXAMPLES = {  # with the modules that they need
    "timm_train.py": ["timm"],
    "optuna_search.py": ["timm", "optuna", "yacs", "sklearn"],
    "torchvision_detector.py": ["timm", "torchvision"],
    "timm_backbone.py": ["timm", "mmcv", "mmdet", "mmseg"],
    "transformers_backbone.py": ["timm", "transformers"],
    "smp_encoder.py": ["timm", "segmentation_models_pytorch"],
    "hilo_rtdetr.py": ["transformers"],
    "hilo_yolo.py": ["ultralytics"],
    "hilo_unet.py": [],
    "hilo_restoration.py": [],
    "hilo_fusion.py": [],
}

# A detector begins with the probability 0.01 for each class: alpha (1 - p)^2 (-log p) for the true class of each anchor on an object.
UNTRAINED_FOCAL_LOSS = 0.25 * 0.99**2 * -math.log(0.01)


def require(name: str) -> None:
    missing = [module for module in EXAMPLES[name] if find_spec(module) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; see {DOCUMENT}")


def run(name: str, **environment: str) -> str:
    require(name)
    return command_helpers.run(Command(DOCUMENT, ROOT, f"python examples/{name}"), **environment).stdout


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<=[: ])(?:\d+\.\d+|nan|inf)", text)]


def assert_learns(output: str, trainings: int = 1) -> None:
    """Losses of steps, by what is trained: each falls by more than a fifth."""
    losses: dict[str, list[float]] = {}
    for name, value in re.findall(r"^(.*)step \d+: loss (\S+)$", output, re.M):
        losses.setdefault(name, []).append(float(value))
    assert len(losses) == trainings, output
    for values in losses.values():
        assert len(values) > 3 and values[-1] < 0.8 * values[0], output


def test_all_are_tested_documented_and_short():
    files = sorted((ROOT / "examples").glob("*.py"))
    assert [file.name for file in files] == sorted(EXAMPLES)
    assert sorted(re.match(r"\[(\S+)\]", row["program"])[1] for row in table(DOCUMENT, "program", "what it shows")) == sorted(EXAMPLES)
    assert all(len(file.read_text().splitlines()) < 40 for file in files)


@pytest.mark.extra
def test_timm_train():
    losses = numbers(run("timm_train.py"))
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(10), abs=0.2), "ten classes, not yet told apart"
    assert losses[2] < 0.5 * losses[0]


@pytest.mark.extra
def test_optuna_search(tmp_path):
    """The best trial has the top-1 of its report."""
    require("optuna_search.py")
    command = Command(DOCUMENT, ROOT, f"python examples/optuna_search.py {tmp_path}")
    printed = command_helpers.run(command).stdout
    found = [json.loads((tmp_path / f"litv2_digits/trial{i}/report/summary.json").read_text())["top1"] for i in (0, 1)]
    assert f"best of 2 trials: top-1 {max(found):.1f} % with {{'TRAIN.BASE_LR': " in printed


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


@pytest.mark.extra
@pytest.mark.parametrize("name", ["smp_encoder.py", "hilo_restoration.py", "hilo_fusion.py"])
def test_training(name):
    assert_learns(run(name))


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python \w+\.py"), ids=str)
def test_documented_training(command):
    assert_learns(command_helpers.run(command).stdout)


@pytest.mark.extra
def test_yolo(tmp_path):
    assert_learns(run("hilo_yolo.py", YOLO_OFFLINE="true", YOLO_CONFIG_DIR=str(tmp_path)))  # it would write to the home folder


@pytest.mark.extra
def test_transformers_backbone():
    assert_learns(run("transformers_backbone.py", HF_HUB_OFFLINE="1"), trainings=2)


@pytest.mark.extra
def test_rtdetr(capsys):
    """With all heads global and nothing pooled, HiLo's encoder is RT-DETR's own, positions included."""
    require("hilo_rtdetr.py")
    example = runpy.run_path(str(ROOT / "examples/hilo_rtdetr.py"))
    assert_learns(capsys.readouterr().out)
    config = example["model"].config
    theirs, ours = example["RTDetrAIFILayer"](config).eval(), example["HiLoAIFI"](config).eval()
    ours.layers[0].self_attn = HiLo(config.encoder_hidden_dim, config.encoder_attention_heads, qkv_bias=True, window_size=1)
    weights = {name.replace("q_proj", "l_q").replace("o_proj", "l_proj"): value for name, value in theirs.state_dict().items()}
    for part in ("weight", "bias"):
        key_and_value = [weights.pop(f"layers.0.self_attn.{letter}_proj.{part}") for letter in "kv"]
        weights[f"layers.0.self_attn.l_kv.{part}"] = torch.cat(key_and_value)
    ours.load_state_dict(weights)
    x = torch.randn(2, config.encoder_hidden_dim, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))
