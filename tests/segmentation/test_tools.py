# SPDX-License-Identifier: Apache-2.0
"""The commands of segmentation/, as a user runs them: the README's own configuration on six generated images, and bad input."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from PIL import Image

from gpu_helpers import on_gpu
from helpers import ROOT
from litv2 import LITv2
from litv2.openmmlab.config import adapt_to_device, load_config
from litv2.openmmlab.runner import StrictRunner, load_checkpoint
from mm_helpers import SMALL_OPTIONS, own_project, run_tool, tiny_config, tiny_dense_model

pytestmark = pytest.mark.extra

SEMANTIC_FPN = ROOT / "segmentation/configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py"
SMALL = SMALL_OPTIONS["segmentation"]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with the README's configuration, pointed at the repository, and a generated data set."""
    return own_project("segmentation", tmp_path_factory.mktemp("segmentation"))


@pytest.fixture(scope="module")
def trained(mine):
    """Four updates of the README's configuration, with two keys of the release; returns the options of the run."""
    options = [*SMALL, f"data_root={mine / 'data'}", "train_cfg.max_iters=4", "train_cfg.val_interval=2"]
    options += ["default_hooks.checkpoint.interval=2"]
    torch.save(dict(model=LITv2(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)).state_dict()), mine / "litv2_s.pth")
    release = [f"model.pretrained={mine / 'litv2_s.pth'}", "model.backbone.use_checkpoint=True"]
    flags = ["--work-dir", mine / "run", "--amp", "--options", *options, *release]
    done = run_tool("segmentation", "tools/train.py", mine / "mine.py", *flags)
    assert f"backbone weights from {mine / 'litv2_s.pth'}" in done.stdout and "with_cp=True" in done.stdout
    assert ("training in float32" in done.stdout) == (not torch.cuda.is_available())  # --amp needs a GPU
    assert "mIoU" in done.stdout and "background" in done.stdout and "road" in done.stdout
    assert Image.open(mine / "run/curves.png").size == (1800, 480)
    losses = [float(loss) for loss in re.findall(r" loss: ([\d.]+)", done.stdout)]
    assert len(losses) == 4 and all(np.isfinite(losses))
    return options


def test_labels_are_those_of_the_files(mine):
    """Label 0 is the first class: nothing is shifted, as ADE20K's labels are."""
    config = tiny_config(mine / "mine.py", data_root=str(mine / "data"), load_from=None)
    config.train_dataloader.update(num_workers=0, persistent_workers=False)
    init_default_scope("mmseg")
    dataset = StrictRunner.build_dataloader(config.train_dataloader).dataset
    labels = dataset[0]["data_samples"].gt_sem_seg.data.unique().tolist()
    assert set(labels) <= {0, 1, 255} and 1 in labels and len(dataset) == 6


@on_gpu
def test_mixed_precision(mine, trained):
    """Where there is a GPU, ``trained`` has trained with --amp."""
    assert load_config(mine / "run/mine.py").optim_wrapper.type == "AmpOptimWrapper"


def test_resume(mine, trained):
    options = [option for option in trained if "max_iters" not in option] + ["train_cfg.max_iters=6"]
    done = run_tool("segmentation", "tools/train.py", mine / "mine.py", "--work-dir", mine / "run", "--resume", "--cfg-options", *options)
    assert "resumed epoch: 0, iter: 4" in done.stdout
    assert "Iter(train) [6/6]" in done.stdout and "Iter(train) [4/6]" not in done.stdout


def test_evaluation_and_pictures(mine, trained):
    checkpoint = mine / "run/iter_4.pth"
    flags = ["--work-dir", mine / "test", "--show-dir", mine / "pictures"]
    done = run_tool("segmentation", "tools/test.py", mine / "mine.py", checkpoint, *flags, "--cfg-options", *trained)
    assert "mIoU" in done.stdout and len(list((mine / "pictures").rglob("*.png"))) == 6

    flags = ["--config", mine / "mine.py", "--checkpoint", checkpoint, "--out", mine / "demo.png"]
    run_tool("segmentation", "demo.py", mine / "data/images/validation/0.jpg", *flags, "--cfg-options", *trained)
    original = np.asarray(Image.open(mine / "data/images/validation/0.jpg").convert("RGB")).astype(int)
    picture = np.asarray(Image.open(mine / "demo.png").convert("RGB")).astype(int)
    assert original.shape == picture.shape and np.abs(original - picture).mean() > 5  # the overlay


def test_export_and_reload_change_nothing(tmp_path):
    model = tiny_dense_model(SEMANTIC_FPN)
    torch.save(dict(meta=dict(CLASSES=("a",), iter=80000), state_dict=model.state_dict()), tmp_path / "segmenter.pth")
    again = tiny_dense_model(SEMANTIC_FPN)
    for parameter in again.parameters():
        parameter.data.zero_()
    load_checkpoint(again, tmp_path / "segmenter.pth")
    images = torch.randn(2, 3, 64, 96)
    assert torch.equal(model._forward(images), again._forward(images))


def failing_train(mine, tmp_path, **options):
    config = tiny_config(mine / "mine.py", **{"data_root": str(mine / "data"), "load_from": None, **options})
    config.work_dir = str(tmp_path)
    for name in ("train", "val", "test"):
        config[f"{name}_dataloader"].update(num_workers=0, persistent_workers=False)
    adapt_to_device(config, "none")
    StrictRunner.from_cfg(config).train()


def test_missing_data_root(mine, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        failing_train(mine, tmp_path, data_root=str(tmp_path / "nowhere"))


def test_empty_folder(mine, tmp_path):
    (tmp_path / "images/training").mkdir(parents=True)
    with pytest.raises(ValueError, match="no samples"):
        failing_train(mine, tmp_path, data_root=str(tmp_path))


def test_number_of_classes(mine, tmp_path):
    with pytest.raises(ValueError, match=r"decode_head.num_classes=150.*2 classes: background, road"):
        failing_train(mine, tmp_path, **{"model.decode_head.num_classes": 150})


def test_checkpoint_of_other_classes(mine, tmp_path):
    torch.save(dict(meta={}, state_dict=tiny_dense_model(SEMANTIC_FPN).state_dict()), tmp_path / "ade20k.pth")
    model = tiny_dense_model(mine / "mine.py")
    with pytest.raises(ValueError, match=r"for 150 classes and the configuration for 2"):
        load_checkpoint(model, tmp_path / "ade20k.pth")
    load_checkpoint(model, tmp_path / "ade20k.pth", fine_tune=True)
