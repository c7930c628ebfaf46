# SPDX-License-Identifier: Apache-2.0
"""The commands of the segmenters' document, with a tiny model and six generated images, appended as --cfg-options."""

from __future__ import annotations

import re

import pytest

from command_helpers import free_port, run, run_here
from document_helpers import documented
from mm_helpers import SMALL_OPTIONS, assert_drawn, metrics_in, published_project

pytestmark = pytest.mark.extra

DOCUMENT = "segmentation/README.md"
OPTIONS = SMALL_OPTIONS["segmentation"]
TRAINING = [option for option in OPTIONS if "init_cfg" not in option] + ["train_cfg.max_iters=4", "train_cfg.val_interval=4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return published_project("segmentation", tmp_path_factory.mktemp("segmentation"))


@pytest.fixture
def small(files, tmp_path):
    """What is appended to evaluations."""
    return ["--work-dir", tmp_path, "--cfg-options", *OPTIONS, f"data_root={files['DIR']}"]


def check_training(folder, printed):
    """The published backbone was taken, and the folder holds what the document promises."""
    assert "backbone weights from litv2_small" in printed and "mIoU" in printed
    assert (folder / "iter_4.pth").is_file() and (folder / "curves.png").is_file() and list(folder.glob("*/*.log"))


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python tools/train\.py .* --cfg-options data_root=DIR"), ids=str)
def test_train(command, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(files["DIR"].parent))
    run_here(monkeypatch, command, "--work-dir", tmp_path, "--cfg-options", *TRAINING, files=files)
    check_training(tmp_path, capsys.readouterr().out)


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python tools/train\.py .* --options .*"), ids=str)
def test_train_as_the_release(command, files, tmp_path, monkeypatch, capsys):
    weights = files["DIR"].parent / "hub/checkpoints/litv2_s.pth"
    more = ["--work-dir", tmp_path, "--cfg-options", *TRAINING, f"data_root={files['DIR']}"]
    run_here(monkeypatch, command, *more, files={"litv2_s.pth": weights})
    printed = capsys.readouterr().out
    check_training(tmp_path, printed.replace(str(weights), "litv2_small"))
    assert f"backbone weights from {weights}" in printed and "with_cp=True" in printed


@pytest.mark.parametrize("command", documented(DOCUMENT, r"tools/dist_train\.sh .*"), ids=str)
def test_dist_train(command, files, tmp_path):
    """On the CPU, with two processes in the place of eight; synchronised batch norms, which need GPUs, become plain ones."""
    environment = dict(PORT=free_port(), CUDA_VISIBLE_DEVICES="", TORCH_HOME=str(files["DIR"].parent))
    done = run(command, "--work-dir", tmp_path, "--cfg-options", *TRAINING, files=files | {"8": 2}, **environment)
    check_training(tmp_path, done.stdout)
    assert "Iter(val) [3/3]" in done.stdout


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python tools/test\.py .*( --cfg-options data_root=DIR| --aug-test)"), ids=str)
def test_test(command, files, small, tmp_path, monkeypatch):
    run_here(monkeypatch, command, *small, files=files)
    assert metrics_in(tmp_path).keys() >= {"aAcc", "mIoU", "mAcc"}


@pytest.mark.parametrize("command", documented(DOCUMENT, r"tools/dist_test\.sh .*"), ids=str)
def test_dist_test(command, files, small):
    """On the CPU, with two processes in the place of eight."""
    done = run(command, *small, files=files | {"8": 2}, PORT=free_port(), CUDA_VISIBLE_DEVICES="")
    assert re.search(r"Iter\(test\) \[3/3\].* mIoU: ", done.stdout)


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python demo\.py .*"), ids=str)
def test_demo(command, files, tmp_path, monkeypatch):
    run_here(monkeypatch, command, "--cfg-options", *OPTIONS, files=files | {"PICTURE.png": tmp_path / "picture.png"})
    assert_drawn(files["IMAGE"], tmp_path / "picture.png")


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python tools/get_flops\.py .*"), ids=str)
def test_get_flops(command, monkeypatch, capsys):
    run_here(monkeypatch, command)
    rows = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("litv2_")}
    assert len(rows) == 3 and rows["litv2_s_fpn_r50_512x512_80k_ade20k"] == ["31.45", "41.29"]


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python tools/benchmark\.py .* --synthetic"), ids=str)
def test_benchmark(command, monkeypatch, capsys):
    run_here(monkeypatch, command, "--shape", 64, 80, "--max-iter", 10, "--cfg-options", *OPTIONS)
    assert "Overall fps: " in capsys.readouterr().out
