# SPDX-License-Identifier: Apache-2.0
"""The commands of detection/, as a user runs them: the README's own configuration on six generated images, and bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from gpu_helpers import on_gpu
from helpers import ROOT, shared
from litv2.configurations import config_of
from litv2.openmmlab.build import build_model
from litv2.openmmlab.config import adapt_to_device, load_config
from litv2.openmmlab.runner import StrictRunner, load_checkpoint
from mm_helpers import SMALL_OPTIONS, TINY_OPTIONS, config_files, own_project, run_tool, tiny_config, tiny_dense_model

pytestmark = pytest.mark.extra

RETINANET = ROOT / "detection/configs/litv2/retinanet_litv2_s_fpn_1x_coco.py"
MASK_RCNN = ROOT / "detection/configs/litv2/mask_rcnn_litv2_s_fpn_1x_coco.py"
SMALL = SMALL_OPTIONS["detection"]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with the README's configuration, pointed at the repository, and a generated data set."""
    return own_project("detection", tmp_path_factory.mktemp("detection"))


@pytest.fixture(scope="module")
def trained(mine):
    """One epoch of the README's configuration; returns the options of the run."""
    options = [*SMALL, f"data_root={mine / 'data'}", "train_cfg.max_epochs=1", "load_from=None", "model.test_cfg.score_thr=0.0"]
    flags = ["--work-dir", mine / "run", "--local-rank=0", "--cfg-options", *options]
    done = run_tool("detection", "tools/train.py", mine / "mine.py", *flags)
    assert "coco/bbox_mAP" in done.stdout and ("training in float32" in done.stdout) == (not torch.cuda.is_available())
    assert Image.open(mine / "run/curves.png").size == (1800, 480)
    losses = [float(loss) for loss in re.findall(r" loss: ([\d.]+)", done.stdout)]
    assert len(losses) == 3 and all(np.isfinite(losses))
    return options


@on_gpu
def test_mixed_precision(mine, trained):
    """Where there is a GPU, ``trained`` has trained as the configuration says."""
    assert load_config(mine / "run/mine.py").optim_wrapper.type == "AmpOptimWrapper"


def test_resume(mine, trained):
    options = [option for option in trained if "max_epochs" not in option] + ["train_cfg.max_epochs=2"]
    done = run_tool("detection", "tools/train.py", mine / "mine.py", "--work-dir", mine / "run", "--resume", "--cfg-options", *options)
    assert "resumed epoch: 1, iter: 3" in done.stdout and "[2][3/3]" in done.stdout and "[1][" not in done.stdout
    assert (mine / "run/epoch_2.pth").is_file()


def test_evaluation_and_pictures(mine, trained):
    checkpoint = mine / "run/epoch_1.pth"
    flags = ["--work-dir", mine / "test", "--out", mine / "predictions.pkl", "--show-dir", mine / "pictures"]
    done = run_tool("detection", "tools/test.py", mine / "mine.py", checkpoint, *flags, "--cfg-options", *trained)
    assert "coco/bbox_mAP" in done.stdout and (mine / "predictions.pkl").is_file()
    assert len(list((mine / "pictures").glob("*.jpg"))) == 6

    flags = ["--config", mine / "mine.py", "--checkpoint", checkpoint, "--out", mine / "demo.png", "--score", "0"]
    run_tool("detection", "demo.py", mine / "data/val/0.jpg", *flags, "--cfg-options", *trained)
    original, picture = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (mine / "data/val/0.jpg", mine / "demo.png"))
    assert original.shape == picture.shape and np.abs(original - picture).max() > 50  # something was drawn


def test_export_and_reload_change_nothing(tmp_path):
    """A whole detector, saved in the release's format, loads strictly and predicts the same."""
    for config in (RETINANET, MASK_RCNN):
        model = tiny_dense_model(config)
        torch.save(dict(meta=dict(CLASSES=("a",), epoch=12), state_dict=model.state_dict()), tmp_path / "detector.pth")
        again = tiny_dense_model(config)
        for parameter in again.parameters():
            parameter.data.zero_()
        load_checkpoint(again, tmp_path / "detector.pth")
        images = torch.randn(1, 3, 64, 96)
        ours, theirs = (m.extract_feat(images) for m in (model, again))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs)) and len(ours) == 5
        heads = [m.bbox_head if config is RETINANET else m.rpn_head for m in (model, again)]
        for first, second in zip(heads[0](ours), heads[1](theirs)):
            assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_release_backbone_in_a_detector(tmp_path):
    """The values of a file in the release's format arrive in the detector's backbone, whole file strictly loaded."""
    content = torch.load(shared("golden/detection_format.pth"), weights_only=True)
    options = {"model.backbone." + key: value for key, value in dict(embed_dim=32, depths=(1, 1, 2, 1)).items()}
    model = tiny_dense_model(RETINANET, **options, **{"model.neck.in_channels": [32, 64, 128, 256]})
    backbone = {key: value for key, value in content["state_dict"].items() if key.startswith("backbone.")}
    torch.save(dict(meta=content["meta"], state_dict=model.state_dict() | backbone), tmp_path / "whole.pth")
    load_checkpoint(model, tmp_path / "whole.pth")
    for key, value in backbone.items():
        assert torch.equal(model.state_dict()[key], value)
    with pytest.raises(ValueError, match="neck.lateral_convs"):  # the file itself is a fragment of a detector
        load_checkpoint(model, shared("golden/detection_format.pth"))


# Bad input: each ends with one error that names what is wrong and what to do.


def failing_run(config, checkpoint=None, train=True):
    adapt_to_device(config, "none")
    config.load_from = str(checkpoint) if checkpoint else None
    runner = StrictRunner.from_cfg(config)
    return runner.train() if train else runner.test()


def mine_config(mine, tmp_path, **options):
    config = tiny_config(mine / "mine.py", data_root=str(options.pop("data_root", mine / "data")), load_from=None, **options)
    config.work_dir = str(tmp_path)
    for name in ("train", "val", "test"):
        config[f"{name}_dataloader"].update(num_workers=0, persistent_workers=False)
    return config


def test_mistyped_option():
    with pytest.raises(ValueError, match="train_cgf.max_epochs: the configuration has no such key"):
        load_config(RETINANET, {"train_cgf.max_epochs": 1})
    with pytest.raises(ValueError, match="pipeline.9"):
        load_config(RETINANET, {"train_dataloader.dataset.pipeline.9.scale": 1})


def test_missing_data_root(mine, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*cannot be read.*No such file"):
        failing_run(mine_config(mine, tmp_path, data_root=tmp_path / "nowhere"))


@pytest.mark.parametrize("content", ["not json", "[]", "{}", '{"images": [], "annotations": []}'])
def test_annotation_file_that_is_not_coco(mine, tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    config = mine_config(mine, tmp_path, **{"train_dataloader.dataset.ann_file": str(tmp_path / "bad.json")})
    with pytest.raises(ValueError, match=r"bad.json"):
        failing_run(config)


@pytest.mark.parametrize("classes", [("cat", "bird"), ("dog", "cat"), ("cat",) * 2])
def test_classes_that_are_not_the_files(mine, tmp_path, classes):
    """In another order too: mmdet would exchange their names silently."""
    config = mine_config(mine, tmp_path, **{"train_dataloader.dataset.metainfo.classes": classes})
    with pytest.raises(ValueError, match=r"categories in .*train.json are cat, dog"):
        failing_run(config)


def test_number_of_classes(mine, tmp_path):
    config = mine_config(mine, tmp_path, **{"model.bbox_head.num_classes": 80})
    with pytest.raises(ValueError, match=r"num_classes=80.*2 classes: cat, dog"):
        failing_run(config)


def test_checkpoint_of_other_classes(mine, tmp_path):
    model = tiny_dense_model(RETINANET)
    torch.save(dict(meta={}, state_dict=model.state_dict()), tmp_path / "coco.pth")
    with pytest.raises(ValueError, match=r"for 80 classes and the configuration for 2"):
        failing_run(mine_config(mine, tmp_path), tmp_path / "coco.pth", train=False)
    # to fine-tune, the layers of the classes start anew and all others are taken
    runner = StrictRunner.from_cfg(mine_config(mine, tmp_path))
    head = runner.model.bbox_head.retina_cls.weight.clone()
    load_checkpoint(runner.model, tmp_path / "coco.pth", fine_tune=True)
    assert torch.equal(runner.model.bbox_head.retina_cls.weight, head)
    assert torch.equal(runner.model.bbox_head.retina_reg.weight, model.bbox_head.retina_reg.weight)


def test_checkpoint_of_another_variant(mine, tmp_path):
    model = tiny_dense_model(mine / "mine.py", **{"model.backbone.depths": (1, 1, 2, 1)})
    torch.save(dict(meta={}, state_dict=model.state_dict()), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth: .*another variant(?s:.*)unexpected"):
        failing_run(mine_config(mine, tmp_path), tmp_path / "other.pth", train=False)


def test_classifier_given_as_detector(tmp_path):
    torch.save(dict(model=dict(weight=torch.zeros(1))), tmp_path / "classifier.pth")
    with pytest.raises(ValueError, match="init_cfg.checkpoint"):
        load_checkpoint(tiny_dense_model(RETINANET), tmp_path / "classifier.pth")


def test_hostile_checkpoints_run_nothing(tmp_path):
    """Neither code in the file nor the configuration that mmengine keeps in it, which it would execute to resume."""

    class Hostile:
        def __init__(self, function, *arguments):
            self.call = function, arguments

        def __reduce__(self):
            return self.call

    model = tiny_dense_model(RETINANET)
    for call in ((os.system, f"touch {tmp_path / 'executed'}"), (getattr, torch.Tensor, "tofile"), (eval, "1")):
        torch.save(dict(meta=Hostile(*call), state_dict=model.state_dict()), tmp_path / "hostile.pth")
        with pytest.raises(ValueError, match="cannot be read"):
            load_checkpoint(model, tmp_path / "hostile.pth")
    config = f"open({str(tmp_path / 'executed')!r}, 'w')"
    torch.save(dict(meta=dict(config=config), state_dict=model.state_dict()), tmp_path / "config.pth")
    assert "config" not in load_checkpoint(model, tmp_path / "config.pth")["meta"]
    assert not (tmp_path / "executed").exists()


def test_one_line_for_the_user(mine, tmp_path):
    """On the command line, errors that we find are one line without a traceback."""
    cases = {
        "no configuration at": ["tools/train.py", "configs/litv2/nothing.py"],
        "cannot be read": ["tools/train.py", RETINANET, "--work-dir", tmp_path, "--cfg-options", *TINY_OPTIONS, f"data_root={tmp_path}"],
        "cannot be read as an image": ["demo.py", RETINANET, "--checkpoint", "x.pth", "--out", tmp_path / "x.png"],
        "pass the configuration with --config": ["demo.py", mine / "data/val/0.jpg", "--checkpoint", "x.pth", "--out", tmp_path / "x.png"],
    }
    for message, arguments in cases.items():
        done = run_tool("detection", *arguments, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_launch_scripts(task, tmp_path):
    """What dist_*.sh and slurm_*.sh start."""
    for launcher in ("torchrun", "srun"):
        (tmp_path / launcher).write_text('#!/bin/sh\necho "$(basename "$0") $*"\n')
        (tmp_path / launcher).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GPUS": "16"}
    expected = {
        "dist_train.sh CONFIG 8 --amp": r"torchrun --nnodes=1 .*--nproc-per-node=8 .*tools/train.py CONFIG --amp",
        "dist_test.sh CONFIG FILE 4 --out x.pkl": r"torchrun .*--nproc-per-node=4 .*tools/test.py CONFIG FILE --out x.pkl",
        "slurm_train.sh PART JOB CONFIG DIR --amp": r"srun -p PART --job-name=JOB .*--ntasks=16 --ntasks-per-node=8 .*"
        r"tools/train.py CONFIG --work-dir DIR --launcher slurm --amp",
        "slurm_test.sh PART JOB CONFIG FILE": r"srun -p PART .*tools/test.py CONFIG FILE --launcher slurm",
    }
    for command, line in expected.items():
        script, *words = command.split()
        done = subprocess.run([f"tools/{script}", *words], cwd=ROOT / task, env=environment, capture_output=True, text=True, check=True)
        assert re.fullmatch(line, done.stdout.strip()), done.stdout


def test_configuration_named_by_the_checkpoint():
    for path in config_files("detection") + config_files("segmentation"):
        assert config_of(f"somewhere/{path.stem}.pth") == config_of(f"work_dirs/{path.stem}/epoch_12.pth") == str(path)
    with pytest.raises(ValueError, match="--config"):
        config_of("somewhere/epoch_12.pth")


def test_data_root_moves_all_paths():
    config = load_config(MASK_RCNN, dict(data_root="/elsewhere/"))
    assert config.train_dataloader.dataset.data_root == config.test_dataloader.dataset.data_root == "/elsewhere/"
    assert config.val_evaluator.ann_file == config.test_evaluator.ann_file == "/elsewhere/annotations/instances_val2017.json"
    assert "data/coco" not in json.dumps(config.to_dict())


def test_pretrained_of_the_release():
    """mmdet of then handed a detector's ``pretrained`` to the backbone; that of today does not know the key."""
    config = load_config(RETINANET, {"model.pretrained": "litv2_s.pth", "model.backbone.use_checkpoint": True})
    backbone = build_model(config).backbone
    assert backbone.init_cfg == dict(type="Pretrained", checkpoint="litv2_s.pth") and backbone.layers[0].grad_checkpointing
    assert build_model(load_config(RETINANET, {"model.pretrained": None})).backbone.init_cfg["checkpoint"] == "litv2_small"
