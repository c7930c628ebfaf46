# SPDX-License-Identifier: Apache-2.0
"""Applies the flags of tools/test.py to a configuration."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict

from ..errors import UserError
from .config import image_steps

__all__ = ["augment", "draw", "format_only", "select_metrics"]

# Evaluators, their argument for the metrics, and the metrics that they support.
METRICS = {
    "CocoMetric": ("metric", ("bbox", "segm", "proposal", "proposal_fast")),
    "IoUMetric": ("iou_metrics", ("mIoU", "mDice", "mFscore")),
}
# Where each evaluator writes predictions: its argument, and what it appends to the path.
PREDICTIONS = {"CocoMetric": ("outfile_prefix", ".*.json"), "IoUMetric": ("output_dir", "/*.png")}


def select_metrics(config: Config, names: Sequence[str]) -> None:
    """--eval: evaluates these metrics instead of the configuration's."""
    evaluator = _evaluator(config, "--eval")
    argument, known = METRICS[evaluator["type"]]
    for name in names:
        if name not in known:
            raise UserError(f"--eval {name}: expected some of {', '.join(known)}, which are the metrics of {evaluator['type']}")
        if name == "segm" and not _has_masks(config):
            raise UserError(f"--eval segm: a {config.model.type} predicts boxes without masks; use --eval bbox")
    evaluator[argument] = list(names)


def format_only(config: Config) -> str:
    """--format-only: writes the predictions in the format of test servers, without evaluating them.

    Returns:
        The path of the predictions: in the work folder, unless the configuration sets it.
    """
    evaluator = _evaluator(config, "--format-only")
    argument, suffix = PREDICTIONS[evaluator["type"]]
    evaluator["format_only"] = True
    if not evaluator.get(argument):
        evaluator[argument] = str(Path(config.work_dir) / "predictions")
    dataset = _test_set(config)
    dataset.pipeline = image_steps(dataset)  # test sets may come without annotations
    return evaluator[argument] + suffix


def augment(config: Config) -> None:
    """--tta: merges the predictions on several views of each image (test-time augmentation), as in mmdet and mmseg.

    The views come from the configuration's ``tta_pipeline`` and are merged by its ``tta_model``. By default, the predictions on the
    image and its mirror image are merged.
    """
    detector = config.default_scope == "mmdet"
    if detector and _has_masks(config):
        raise UserError(f"--tta: mmdet merges the boxes of several views but no masks, and a {config.model.type} predicts masks")
    dataset = _test_set(config)
    if not config.get("tta_model"):
        nms = dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100)
        config.tta_model = dict(type="DetTTAModel", tta_cfg=nms) if detector else dict(type="SegTTAModel")
    if not config.get("tta_pipeline"):
        *steps, pack = copy.deepcopy(list(dataset.pipeline))
        if "meta_keys" in pack:
            pack["meta_keys"] = (*pack["meta_keys"], "flip", "flip_direction")
        flips = [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)]  # the ground truth is taken from the first view
        config.tta_pipeline = [*steps, dict(type="TestTimeAug", transforms=[flips, [pack]])]
    dataset.pipeline = config.tta_pipeline
    config.model = ConfigDict(**config.tta_model, module=config.model)


def draw(config: Config, folder: str | None, show: bool, seconds: float) -> None:
    """--show-dir and --show: draws each prediction beside the ground truth, into a folder or on the display for ``seconds`` each."""
    hook = config.default_hooks.visualization
    hook.update(draw=True, interval=1)
    if show:
        from matplotlib import pyplot as plt

        if plt.get_backend().lower() == "agg":
            raise UserError("--show: there is no display; use --show-dir FOLDER to write the pictures instead")
        hook.update(show=True, wait_time=seconds)
    if folder and config.default_scope == "mmdet":
        hook.test_out_dir = str(Path(folder).absolute())
    elif folder and show:
        raise UserError("--show and --show-dir: mmseg either shows or writes the pictures; use only one of the two")
    elif folder:
        config.visualizer.save_dir = folder


def _evaluator(config: Config, flag: str) -> ConfigDict:
    evaluators = config.test_evaluator if isinstance(config.test_evaluator, list | tuple) else [config.test_evaluator]
    for evaluator in evaluators:
        if evaluator["type"] in METRICS:
            return evaluator
    types = ", ".join(evaluator["type"] for evaluator in evaluators)
    raise UserError(f"{flag} supports {' and '.join(METRICS)}, but the configuration evaluates with {types}; change its test_evaluator")


def _test_set(config: Config) -> ConfigDict:
    """Returns the settings of the test set inside wrappers such as RepeatDataset."""
    dataset = config.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    return dataset


def _has_masks(config: Config) -> bool:
    return bool(config.model.get("mask_head") or config.model.get("roi_head", {}).get("mask_head"))
