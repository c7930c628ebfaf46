# SPDX-License-Identifier: Apache-2.0
"""The flags of tools/test.py that users of the release know, and the benchmark, on a tiny segmenter and six images."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT
from litv2.errors import UserError
from litv2.openmmlab.config import load_config
from litv2.openmmlab.evaluation import draw, select_metrics
from mm_helpers import SMALL_OPTIONS, own_project, run_test, run_tool, save_tiny, tiny_dense_model

pytestmark = pytest.mark.extra

SEMANTIC_FPN = ROOT / "segmentation/configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py"


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = own_project("segmentation", tmp_path_factory.mktemp("segmentation"))
    save_tiny(folder / "mine.py", folder / "tiny.pth")
    return folder


@pytest.fixture
def evaluate(mine, tmp_path, monkeypatch):
    """tools/test.py with flags: predictions and metrics."""
    options = ["--cfg-options", *SMALL_OPTIONS["segmentation"], f"data_root={mine / 'data'}"]

    def run(name: str, *flags, config: str = "mine.py"):
        return run_test(monkeypatch, mine / config, mine / "tiny.pth", tmp_path / name, *options, *flags)

    return run


def test_eval_selects_the_metrics(evaluate):
    metrics = [evaluate(name, "--eval", name)[1] for name in ("mIoU", "mDice")]
    assert metrics[0].keys() >= {"aAcc", "mIoU", "mAcc"} and "mDice" not in metrics[0]
    assert "mDice" in metrics[1] and "mIoU" not in metrics[1]
    with pytest.raises(UserError, match="--eval cityscapes: expected some of mIoU, mDice, mFscore"):
        select_metrics(load_config(SEMANTIC_FPN), ["cityscapes"])


def test_format_only_needs_no_annotations(mine, evaluate, tmp_path, capsys):
    unknown = tmp_path / "unknown"
    shutil.copytree(mine / "data/images", unknown / "images")
    predictions, metrics = evaluate("format", "--format-only", "--cfg-options", f"data_root={unknown}")
    assert metrics.keys() == {"time", "data_time"}
    assert f"predictions are in {tmp_path / 'format/predictions'}/*.png" in capsys.readouterr().out
    assert len(predictions) == 6
    for prediction in predictions:
        name = prediction["img_path"].rpartition("/")[2].removesuffix(".jpg")
        labels = np.asarray(Image.open(tmp_path / f"format/predictions/{name}.png"))
        assert labels.shape == (64, 80) and np.array_equal(labels, prediction["pred_sem_seg"]["data"][0].numpy())


def test_aug_test_averages_the_views(mine, evaluate):
    """Of a configuration without a tta_pipeline: the image and its mirror image, each through the whole model."""
    (mine / "flips.py").write_text((mine / "mine.py").read_text() + "\ntta_pipeline = None\n")
    predictions, metrics = evaluate("flips", "--aug-test", config="flips.py")
    plain, _ = evaluate("plain")
    assert "mIoU" in metrics
    model, differ = tiny_dense_model(mine / "mine.py"), 0
    for prediction, one in zip(predictions, plain):
        image = torch.from_numpy(np.asarray(Image.open(prediction["img_path"]))).permute(2, 0, 1).float()
        mean, std = (getattr(model.data_preprocessor, name) for name in ("mean", "std"))
        views = torch.stack([(image - mean) / std, ((image - mean) / std).flip(-1)])
        with torch.no_grad():
            first, mirrored = model.encode_decode(views, [dict(img_shape=(64, 80))] * 2).softmax(dim=1)
        average = (first + mirrored.flip(-1)) / 2
        agree = prediction["pred_sem_seg"]["data"] == average.argmax(dim=0)
        assert agree.float().mean() > 0.999  # JPEG decoders may round a pixel differently
        differ += (prediction["pred_sem_seg"]["data"] != one["pred_sem_seg"]["data"]).sum()
    assert differ > 0


def test_the_configurations_own_views(evaluate):
    """Six scales, each with its mirror image."""
    pipeline = load_config(SEMANTIC_FPN).tta_pipeline
    assert [len(step) for step in pipeline[-1]["transforms"]] == [6, 2, 1, 1]
    assert "mIoU" in evaluate("views", "--tta")[1]


def test_show_or_write():
    with pytest.raises(UserError, match="there is no display|mmseg either shows or writes the pictures"):
        draw(load_config(SEMANTIC_FPN), "pictures", True, 2.0)


def test_benchmark(mine):
    options = ["--cfg-options", *SMALL_OPTIONS["segmentation"], f"data_root={mine / 'data'}"]
    done = run_tool("segmentation", "tools/benchmark.py", mine / "mine.py", mine / "tiny.pth", "--log-interval", 6, *options)
    assert "Done image [6/200], fps: " in done.stdout and "Overall fps: " in done.stdout
    flags = [mine / "mine.py", "--synthetic", "--shape", 64, 80, "--max-iter", 5, *options]
    done = run_tool("segmentation", "tools/benchmark.py", *flags, check=False)
    words = "error: 5 images are too few: the first 5 are not timed"
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == words
