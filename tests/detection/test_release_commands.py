# SPDX-License-Identifier: Apache-2.0
"""The flags of tools/test.py that users of the release know, on a tiny detector and six generated images."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import ROOT
from litv2.errors import UserError
from litv2.openmmlab.config import load_config
from litv2.openmmlab.evaluation import augment, draw, select_metrics
from mm_helpers import SMALL_OPTIONS, own_project, run_test, save_tiny

pytestmark = pytest.mark.extra

RETINANET = ROOT / "detection/configs/litv2/retinanet_litv2_s_fpn_1x_coco.py"
MASK_RCNN = ROOT / "detection/configs/litv2/mask_rcnn_litv2_s_fpn_1x_coco.py"


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = own_project("detection", tmp_path_factory.mktemp("detection"))
    save_tiny(folder / "mine.py", folder / "tiny.pth")
    return folder


@pytest.fixture
def evaluate(mine, tmp_path, monkeypatch):
    """tools/test.py with flags: predictions and metrics."""
    options = ["--cfg-options", *SMALL_OPTIONS["detection"], f"data_root={mine / 'data'}", "model.test_cfg.score_thr=0.0"]

    def run(name: str, *flags, config: str = "mine.py"):
        return run_test(monkeypatch, mine / config, mine / "tiny.pth", tmp_path / name, *options, *flags)

    return run


def test_eval_selects_the_metrics(evaluate):
    metrics = [evaluate(name, "--eval", name)[1] for name in ("bbox", "proposal")]
    assert "coco/bbox_mAP" in metrics[0] and not any("AR@100" in name for name in metrics[0])
    assert "coco/AR@100" in metrics[1] and "coco/bbox_mAP" not in metrics[1]
    config = load_config(MASK_RCNN)
    select_metrics(config, ["bbox", "segm"])
    assert config.test_evaluator.metric == ["bbox", "segm"]


def test_metrics_that_are_not_there():
    for names, words in (
        (["mIoU"], "--eval mIoU: expected some of bbox, segm, proposal, proposal_fast"),
        (["bbox", "segm"], "--eval segm: a RetinaNet predicts boxes without masks"),
    ):
        with pytest.raises(UserError, match=words):
            select_metrics(load_config(RETINANET), names)
    with pytest.raises(UserError, match="evaluates with VOCMetric; change its test_evaluator"):
        select_metrics(load_config(RETINANET, {"test_evaluator.type": "VOCMetric"}), ["mAP"])


def test_format_only_needs_no_annotations(mine, evaluate, tmp_path, capsys):
    content = json.loads((mine / "data/val.json").read_text())
    (mine / "data/unknown.json").write_text(json.dumps(content | dict(annotations=[])))
    file = f"{mine / 'data'}/unknown.json"
    files = [f"test_dataloader.dataset.ann_file={file}", f"test_evaluator.ann_file={file}"]
    predictions, metrics = evaluate("format", "--format-only", "--cfg-options", *files)
    assert metrics.keys() == {"time", "data_time"}
    assert f"predictions are in {tmp_path / 'format/predictions'}.*.json" in capsys.readouterr().out
    boxes = json.loads((tmp_path / "format/predictions.bbox.json").read_text())
    assert len(boxes) == sum(len(image["pred_instances"]["scores"]) for image in predictions) > 0
    assert {box["image_id"] for box in boxes} == set(range(6)) and {box["category_id"] for box in boxes} <= {1, 11}


def test_tta_merges_two_views(mine, evaluate):
    """Of a configuration without a tta_pipeline: the image and its mirror image."""
    (mine / "flips.py").write_text((mine / "mine.py").read_text() + "\ntta_pipeline = tta_model = None\n")
    plain, _ = evaluate("plain")
    merged, metrics = evaluate("tta", "--tta", config="flips.py")
    assert "coco/bbox_mAP" in metrics and len(merged) == len(plain) == 6
    for one, two in zip(plain, merged):
        scores = [result["pred_instances"]["scores"].sort(descending=True).values[:20] for result in (one, two)]
        assert (scores[1] >= scores[0] - 1e-4).all() and not torch.allclose(*scores, atol=1e-4)  # the best boxes of both views


def test_the_configurations_own_views():
    """RetinaNet's, of mmdet: three scales, each with its mirror image."""
    config = load_config(RETINANET)
    augment(config)
    views = config.test_dataloader.dataset.pipeline[-1]
    assert views.type == "TestTimeAug" and [len(step) for step in views.transforms] == [3, 2, 1, 1]
    assert config.model.type == "DetTTAModel" and config.model.module.type == "RetinaNet"


def test_tta_of_masks_is_an_error():
    with pytest.raises(UserError, match="--tta: mmdet merges the boxes of several views but no masks"):
        augment(load_config(MASK_RCNN))


def test_show_without_a_display():
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    with pytest.raises(UserError, match="--show: there is no display; use --show-dir FOLDER"):
        draw(load_config(RETINANET), None, True, 2.0)
