# SPDX-License-Identifier: Apache-2.0
"""What the tests of detection and segmentation share: tiny models, small generated data sets, and the tools as a user starts them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from PIL import Image
from torch import nn

from command_helpers import put_download
from document_helpers import blocks
from helpers import ROOT, fill, generator
from litv2.openmmlab import commands
from litv2.openmmlab.build import build_model
from litv2.openmmlab.config import load_config

# A backbone that trains in seconds, as --cfg-options.
TINY_OPTIONS = """
model.backbone.embed_dim=16 model.backbone.depths=[1,1,1,1] model.backbone.num_heads=[1,2,4,8] model.backbone.init_cfg=None
model.neck.in_channels=[16,32,64,128] train_dataloader.num_workers=0 val_dataloader.num_workers=0 test_dataloader.num_workers=0
default_hooks.logger.interval=1
""".split()


# Images of 64 x 80, as --cfg-options.
SMALL_OPTIONS = {
    "detection": [
        *TINY_OPTIONS,
        "train_dataloader.dataset.pipeline.2.scale=(80,64)",
        "val_dataloader.dataset.pipeline.1.scale=(80,64)",
        "test_dataloader.dataset.pipeline.1.scale=(80,64)",
    ],
    "segmentation": [
        *TINY_OPTIONS,
        "train_dataloader.dataset.pipeline.2.scale=(80,64)",
        "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
        "model.data_preprocessor.size=(64,64)",
        "val_dataloader.dataset.pipeline.1.scale=(80,64)",
        "test_dataloader.dataset.pipeline.1.scale=(80,64)",
        "load_from=None",
    ],
}


def config_files(task: str) -> list[Path]:
    return sorted((ROOT / task / "configs/litv2").glob("*.py"))


def tiny_config(path: Path, **options) -> Config:
    backbone = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), init_cfg=None)
    tiny = {f"model.backbone.{key}": value for key, value in backbone.items()} | {"model.neck.in_channels": [16, 32, 64, 128]}
    return load_config(path, tiny | options)


def tiny_dense_model(path: Path, **options) -> nn.Module:
    return fill(build_model(tiny_config(path, **options))).eval()


def run_tool(task: str, script: str, *arguments, check: bool = True, launcher: tuple = (), timeout: int = 300, **environment: str):
    """A script of detection/ or segmentation/ in a process of its own: by Python, or by the shell if it is one of its scripts."""
    interpreter = "bash" if script.endswith(".sh") else sys.executable
    command = [interpreter, *launcher, script, *map(str, arguments)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of torchrun
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run(command, cwd=ROOT / task, env=environment, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode != 0:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def run_test(monkeypatch, config: Path, checkpoint: Path, folder: Path, *flags) -> tuple[list[dict], dict]:
    """tools/test.py in this process: its predictions, and its metrics."""
    arguments = ["test.py", config, checkpoint, "--work-dir", folder, "--out", folder / "predictions.pkl", *flags]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    commands.test()
    return pickle.loads((folder / "predictions.pkl").read_bytes()), metrics_in(folder)


def metrics_in(folder: Path) -> dict:
    """What tools/test.py has written to its work folder."""
    reports = [json.loads(path.read_text()) for path in folder.glob("*/*.json")]
    return reports[0] if reports else {}


def own_project(task: str, folder: Path) -> Path:
    """A folder with the README's configuration for one's own data as mine.py, pointed at the repository, and a generated data set."""
    (folder / "mine.py").write_text(readme_config(task).replace("./litv2", str(ROOT / task / "configs/litv2")))
    (write_coco if task == "detection" else write_segmentation)(folder / "data")
    return folder


def published_project(task: str, folder: Path) -> dict[str, Path]:
    """What the commands of a task's document name: a generated data set in the published one's place, and a tiny checkpoint under the
    published name. In the folder of downloads (TORCH_HOME) lies a tiny backbone."""
    if task == "detection":
        config = ROOT / task / "configs/litv2/retinanet_litv2_s_fpn_1x_coco.py"
        write_coco(folder / "data", CocoDataset.METAINFO["classes"])
        (folder / "data/annotations").mkdir()
        for split in ("train", "val"):
            (folder / f"data/{split}.json").rename(folder / f"data/annotations/instances_{split}2017.json")
            (folder / f"data/{split}").rename(folder / f"data/{split}2017")
        image = folder / "data/val2017/0.jpg"
    else:
        config = ROOT / task / "configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py"
        image = write_segmentation(folder / "data") / "images/validation/0.jpg"
    put_download(folder, "litv2_s.pth", dict(model=tiny_dense_model(config).backbone.state_dict()))
    checkpoint = save_tiny(config, folder / f"{config.stem}.pth")
    return {"DIR": folder / "data", "IMAGE": image, "FILE": checkpoint, checkpoint.name: checkpoint}


def assert_drawn(image: Path, picture: Path) -> None:
    """The picture is the image with something drawn on it."""
    before, after = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (image, picture))
    assert before.shape == after.shape and np.abs(before - after).max() > 50


def save_tiny(config: Path, path: Path) -> Path:
    """A checkpoint of the tiny model of a configuration, as mmengine writes them."""
    torch.save(dict(meta={}, state_dict=tiny_dense_model(config).state_dict()), path)
    return path


def readme_config(task: str) -> str:
    """The configuration that the task's README shows for one's own data."""
    (block,) = (block for block in blocks(f"{task}/README.md", "python") if "_base_ =" in block)
    return block


def write_coco(folder: Path, names: tuple[str, ...] = ("cat", "dog"), images: int = 6) -> Path:
    """folder/{train,val}.json and folder/{train,val}/: rectangles of one colour per class on grey, with masks."""
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        content = dict(images=[], annotations=[], categories=[dict(id=10 * i + 1, name=name) for i, name in enumerate(names)])
        for number in range(images):
            pixels = generator(number).integers(90, 140, (64, 80, 3)).astype(np.uint8)
            kind, (x, y, w, h) = number % len(names), (6 + number, 10, 40, 30)
            pixels[y : y + h, x : x + w] = (230, 30, 30) if kind == 0 else (30, 30, 230)
            Image.fromarray(pixels).save(folder / split / f"{number}.jpg")
            content["images"].append(dict(id=number, file_name=f"{number}.jpg", width=80, height=64))
            box = dict(bbox=[x, y, w, h], area=w * h, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]], iscrowd=0)
            content["annotations"].append(dict(id=number, image_id=number, category_id=10 * kind + 1, **box))
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def write_segmentation(folder: Path, images: int = 6) -> Path:
    """folder/{images,annotations}/{training,validation}: a rectangle of class 1 on class 0."""
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(images):
            pixels = generator(number).integers(90, 140, (64, 80, 3)).astype(np.uint8)
            labels = np.zeros((64, 80), np.uint8)
            area = slice(10, 40), slice(6 + number, 46 + number)
            pixels[area], labels[area] = (230, 30, 30), 1
            Image.fromarray(pixels).save(folder / "images" / split / f"{number}.jpg")
            Image.fromarray(labels).save(folder / "annotations" / split / f"{number}.png")
    return folder


def learning_rates(config: Config, epoch_length: int, updates: list[int]) -> list[float]:
    """The learning rate in force at each of ``updates`` (counted from 0), by running the configuration's schedulers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optim_wrapper.optimizer.lr)
    schedulers = [PARAM_SCHEDULERS.build({**item, "optimizer": optimizer}) for item in config.param_scheduler]
    rates = []
    for update in range(updates[-1] + 1):
        if update in updates:
            rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or (update + 1) % epoch_length == 0:
                scheduler.step()
    return rates


def parameter_groups(config: Config, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Name of each parameter -> its learning rate and weight decay in the optimizer that the configuration builds."""
    init_default_scope(config.default_scope)
    wrapper = {key: value for key, value in config.optim_wrapper.items() if key != "loss_scale"} | dict(type="OptimWrapper")
    optimizer = build_optim_wrapper(model, Config(dict(w=wrapper)).w).optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


def as_published(value: float, published: str) -> str:
    """``value``, counted to two decimals, rounded to the digits of a published number (62.50 is 63 in the tables)."""
    return str(Decimal(f"{value:.2f}").quantize(Decimal(published), ROUND_HALF_UP))


def backbone_settings(model: nn.Module) -> dict:
    """What a built backbone does, whatever its configuration says."""
    backbone = model.backbone
    return dict(
        depths=[len(stage.blocks) for stage in backbone.layers],
        channels=[info["num_chs"] for info in backbone.feature_info],
        drop_path=round(backbone.layers[-1].blocks[-1].drop_path.rate, 6),
        windows=[stage.blocks[0].attn.window_size if stage.blocks[0].attn else 0 for stage in backbone.layers],
        alpha={stage.blocks[0].attn.alpha for stage in backbone.layers if stage.blocks[0].attn},
        norms=[i for i in range(4) if hasattr(backbone, f"norm{i}")],
        checkpointing={stage.grad_checkpointing for stage in backbone.layers},
    )


# Depths, channels and drop path of the variants (SPEC of the paper's tables).
VARIANTS = {
    "s": dict(depths=[2, 2, 6, 2], channels=[96, 192, 384, 768], drop_path=0.2),
    "m": dict(depths=[2, 2, 18, 2], channels=[96, 192, 384, 768], drop_path=0.2),
    "b": dict(depths=[2, 2, 18, 2], channels=[128, 256, 512, 1024], drop_path=0.3),
}
