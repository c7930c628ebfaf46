# SPDX-License-Identifier: Apache-2.0
"""A strict version of mmengine's Runner for the tools of detection and segmentation.

* Checkpoints are read without running their code and loaded strictly.
* They are written atomically, and a run resumes exactly (``exact_loops.py``) from the newest that is whole.
* A data set that is missing, empty or has other classes than the model stops the run before it starts.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from mmengine.fileio import dump
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer, MMLogger, print_log
from mmengine.runner import BaseLoop, Runner
from mmengine.visualization import LocalVisBackend, Visualizer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..coco import read_annotations
from ..errors import UserError, listed
from ..files import append_whole, atomic_write, remove_drafts
from ..runs.failures import start_worker
from ..runs.outputs import LogFile, Outputs
from ..weights.download import fetch
from ..weights.reading import read_checkpoint
from ..weights.state_dict import load_weights
from .annotations import check_annotations
from .exact_loops import ExactEpochLoop, ExactIterLoop, with_named_files
from .numpy_pickles import NUMPY_CLASSES

__all__ = ["StrictRunner", "load_checkpoint"]

EXACT_LOOPS = {"EpochBasedTrainLoop": ExactEpochLoop, "IterBasedTrainLoop": ExactIterLoop}

# The layers whose shape depends on the number of classes, with their outputs per class and their additional outputs.
CLASS_LAYERS = {
    "bbox_head.retina_cls": (9, 0),  # anchors per position
    "roi_head.bbox_head.fc_cls": (1, 1),  # the background
    "roi_head.bbox_head.fc_reg": (4, 0),
    "roi_head.mask_head.conv_logits": (1, 0),
    "decode_head.conv_seg": (1, 0),
}


def _history_method(owner: type, name: str):
    """Replaces getattr in mmengine's checkpoints, which use it only to name the four statistics of a HistoryBuffer."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise ValueError(f"the file asks for {owner!r}.{name}")
    return getattr(owner, name)


# What mmengine saves in addition to tensors: its history of losses, which consists of numpy arrays.
MMENGINE_CLASSES: list = [
    HistoryBuffer,
    (_history_method, "builtins.getattr"),
    *NUMPY_CLASSES,
]


def load_checkpoint(model: nn.Module, path: str | Path, fine_tune: bool = False) -> dict:
    """Strictly loads the checkpoint of a detector or segmenter, from the release or from this repository; returns its content.

    Args:
        fine_tune: whether class-dependent layers whose shape differs from the file's keep their initialisation.

    Raises:
        FileNotFoundError, UserError: the file is missing, is damaged or does not fit the model.
    """
    content = _read(path)
    _load(model, content, path, fine_tune)
    return content


def _read(path: str | Path) -> dict:
    content = read_checkpoint(fetch(path), also=MMENGINE_CLASSES)
    if not isinstance(content.get("state_dict"), dict):
        raise UserError(
            f"{path} is not the checkpoint of a detector or segmenter (its entries are {sorted(map(str, content))[:8]}); "
            "to use the weights of a classifier, set model.backbone.init_cfg.checkpoint"
        )
    # On resuming, mmengine would run the configuration in the file as Python, only to look for an obsolete key.
    content.setdefault("meta", {}).pop("config", None)
    return content


def _load(model: nn.Module, content: dict, path: str | Path, fine_tune: bool) -> None:
    weights = {key.removeprefix("module."): value for key, value in content["state_dict"].items()}
    try:
        notes = load_weights(model, weights, new_heads=CLASS_LAYERS if fine_tune else ())
    except UserError as error:
        raise UserError(f"{path}: {_class_disagreement(model.state_dict(), weights)}{error}") from error
    for note in notes:
        print_log(note, logger="current")


def _class_disagreement(own: dict, weights: dict) -> str:
    for layer, (per_class, others) in CLASS_LAYERS.items():
        key = f"{layer}.weight"
        if key in own and key in weights and len(own[key]) != len(weights[key]):
            ours, theirs = ((len(state[key]) - others) // per_class for state in (own, weights))
            return f"it is for {theirs} classes and the configuration for {ours}; set num_classes in the configuration's heads. "
    return ""


class StrictRunner(Runner):
    """mmengine's Runner with strict and safe checkpoint loading and checked data sets. Create one with ``from_cfg(config)``."""

    _resume: bool
    _load_from: str | None

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """Builds the model with channels-last parameters, the layout of the backbone's maps, so that the neck copies nothing."""
        return super().build_model(model).to(memory_format=torch.channels_last)

    def load_checkpoint(self, filename: str, map_location="cpu", strict: bool = True, revise_keys: Sequence = ()) -> dict:
        """Loads a checkpoint strictly; mmengine calls this to resume, to test and, for ``load_from``, to fine-tune."""
        model = _unwrapped(self.model)
        fine_tune = isinstance(self._train_loop, BaseLoop) and not self._resume  # the loop is a dictionary until training begins
        content = _read(filename)
        if self._resume and "optimizer" not in content:
            raise UserError(f"{filename} holds no optimizer state to resume from; set load_from to start from its weights")
        self.call_hook("after_load_checkpoint", checkpoint=content)  # an EMA hook takes its own weights from it
        _load(model, content, filename, fine_tune)
        self._has_loaded = True
        self.logger.info(f"loaded {filename}")
        return content

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Builds the logger; a log file that cannot be written does not stop the run."""
        logger = super().build_logger(*args, **kwargs)
        for i, handler in enumerate(logger.handlers):
            if type(handler) is logging.FileHandler:
                handler.close()
                logger.handlers[i] = file = LogFile(handler.baseFilename, handler.mode)
                file.setFormatter(handler.formatter)
                file.setLevel(handler.level)
                file.filters = handler.filters
        return logger

    def build_visualizer(self, *args: Any, **kwargs: Any) -> Visualizer:
        """Builds the visualizer; scalars that cannot be written do not stop the run, and are written whole or not at all."""
        visualizer = super().build_visualizer(*args, **kwargs)
        outputs = Outputs(self.logger.warning)
        for backend in visualizer._vis_backends.values():
            for name in ("add_scalars", "close"):
                setattr(backend, name, _going_on(getattr(backend, name), outputs, f"{backend._save_dir} ({type(backend).__name__})"))
            if isinstance(backend, LocalVisBackend):
                backend._dump = lambda values, path, file_format: append_whole(path, dump(values, file_format=file_format) + "\n")
        return visualizer

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Saves a checkpoint: beside an older one of this name, flushed, and renamed."""
        if is_main_process():
            with atomic_write(Path(out_dir) / filename) as draft:
                super().save_checkpoint(out_dir, draft.name, *args, **kwargs)

    def register_hook(self, hook: Hook | dict, priority: Any = None) -> None:
        """Registers a hook; of mmengine's CheckpointHook the one that removes an old checkpoint last."""
        if isinstance(hook, dict) and hook.get("type") == "CheckpointHook":
            hook = {**hook, "type": CarefulCheckpointHook}
        super().register_hook(hook, priority)

    def save_for_resume(self, epoch: int, iteration: int) -> None:
        """Saves a checkpoint after this number of epochs and iterations, which ``--resume`` finds."""
        self.save_checkpoint(self.work_dir, f"iter_{iteration}.pth", by_epoch=False, meta=dict(epoch=epoch, iter=iteration))

    def load_or_resume(self) -> None:
        """As mmengine's; but ``--resume`` without a file takes the newest checkpoint of the run that is whole."""
        if is_main_process():
            remove_drafts(self.work_dir)
        if self._resume and self._load_from is None and not self._has_loaded:
            self._load_from = self._newest_checkpoint()
            if self._load_from is None:
                self.logger.info(f"there is no checkpoint in {self.work_dir}: training begins at the beginning")
                self._resume = False
        super().load_or_resume()

    def _newest_checkpoint(self) -> str | None:
        """By the number of iterations in its name, since clocks may jump; a damaged one is reported and left out."""
        length = len(self.train_loop.dataloader)
        found = {}
        for path in Path(self.work_dir).glob("*.pth"):
            if match := re.fullmatch(r"(epoch|iter)_(\d+)\.pth", path.name):
                found[path] = int(match[2]) * (length if match[1] == "epoch" else 1)
        for path in sorted(found, key=lambda path: (found[path], path.name), reverse=True):
            try:
                _read(path)
                return str(path)
            except UserError as error:
                self.logger.warning(f"{error}; trying the checkpoint before it")
        return None

    def build_train_loop(self, loop):
        if isinstance(loop, dict):
            kind = loop.get("type") or ("EpochBasedTrainLoop" if loop.get("by_epoch") else "IterBasedTrainLoop")
            loop = {**{key: value for key, value in loop.items() if key != "by_epoch"}, "type": EXACT_LOOPS.get(kind, kind)}
        loop = super().build_train_loop(loop)
        self._check_classes(loop.dataloader.dataset)
        return loop

    def build_val_loop(self, loop):
        loop = super().build_val_loop(loop)
        self._check_classes(loop.dataloader.dataset)
        loop.dataloader = with_named_files(loop.dataloader)
        return loop

    def build_test_loop(self, loop):
        loop = super().build_test_loop(loop)
        self._check_classes(loop.dataloader.dataset)
        loop.dataloader = with_named_files(loop.dataloader)
        return loop

    @staticmethod
    def build_dataloader(dataloader, seed: int | None = None, diff_rank_seed: bool = False) -> DataLoader:
        """Builds a loader; raises an error that names the data set if it cannot be read or is empty."""
        if isinstance(dataloader, DataLoader):
            return dataloader
        try:
            loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        except Exception as error:  # mmdet reads a COCO file without checks and raises whatever its content leads to
            # for an empty data set, mmengine fails with this error of numpy's
            reason = "it has no samples" if "need at least one array" in str(error) else f"{type(error).__name__}: {error}"
            raise UserError(f"the data set {_describe(dataloader['dataset'])} cannot be read: {reason}") from error
        for dataset in _datasets(loader.dataset):
            _check_data(dataset)
        loader.worker_init_fn = functools.partial(start_worker, loader.worker_init_fn)
        return loader

    def _check_classes(self, dataset: Dataset) -> None:
        model = _unwrapped(self.model)
        modules = dict(model.named_modules())
        for name in {layer.rpartition(".")[0] for layer in CLASS_LAYERS} & modules.keys():
            for part in _datasets(dataset):
                classes = part.metainfo.get("classes") or ()
                if classes and modules[name].num_classes != len(classes):
                    raise UserError(
                        f"the model has {name}.num_classes={modules[name].num_classes}, but the data set {_describe(part)} has "
                        f"{len(classes)} classes: {listed(classes)}; set num_classes in the model's heads, or the data set's metainfo"
                    )


class CarefulCheckpointHook(CheckpointHook):
    """An old checkpoint, or the best one so far, is removed when the new one is whole; mmengine's hook removes it before."""

    max_keep_ckpts: int
    file_backend: Any

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        keep, self.max_keep_ckpts = self.max_keep_ckpts, 0  # mmengine removes none
        try:
            if keep > 0 and step not in self.keep_ckpt_ids:
                kept = [*self.keep_ckpt_ids, step]
                runner.message_hub.update_info("keep_ckpt_ids", kept)  # a run that is resumed from this checkpoint removes the others
                super()._save_checkpoint_with_step(runner, step, meta)
                self.keep_ckpt_ids.append(step)  # of fixed length
                for old in kept[:-keep] if is_main_process() else ():
                    Path(self.out_dir, self.filename_tmpl.format(old)).unlink(missing_ok=True)
            else:
                super()._save_checkpoint_with_step(runner, step, meta)
        finally:
            self.max_keep_ckpts = keep

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        backend, self.file_backend = self.file_backend, _RemovingLater(self.file_backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
            best = {getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()}
            for old in self.file_backend.removed - best:
                backend.remove(old)
        finally:
            self.file_backend = backend


class _RemovingLater:
    """A file backend of mmengine's that only notes which files it is to remove."""

    def __init__(self, backend: Any):
        self._backend = backend
        self.removed: set[str] = set()

    def remove(self, path: str) -> None:
        self.removed.add(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def _going_on(method: Callable, outputs: Outputs, what: str) -> Callable:
    @functools.wraps(method)
    def write(*args: Any, **kwargs: Any) -> None:
        with outputs.writing(what):
            method(*args, **kwargs)

    return write


def _unwrapped(model: Any) -> Any:
    """Returns the detector or segmenter inside wrappers such as DDP and test-time augmentation."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _datasets(dataset: Dataset) -> Iterator[BaseDataset]:
    """Yields the data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(dataset, BaseDataset) or hasattr(dataset, "ann_file"):
        yield dataset
    for inner in (*getattr(dataset, "datasets", ()), *([dataset.dataset] if hasattr(dataset, "dataset") else [])):
        yield from _datasets(inner)


def _describe(dataset: Dataset | dict) -> str:
    get = dataset.get if isinstance(dataset, dict) else lambda name: getattr(dataset, name, None)
    parts = [f"{name}={get(name)!r}" for name in ("data_root", "ann_file", "data_prefix") if get(name)]
    return f"{get('type') or type(dataset).__name__}({', '.join(parts)})"


def _check_data(dataset: BaseDataset) -> None:
    """Raises UserError if a data set is empty, or its COCO file is not one, or has other classes or another order of them."""
    classes = list(dataset.metainfo.get("classes") or ())
    if hasattr(dataset, "cat_ids"):
        content = read_annotations(dataset.ann_file)
        with_masks = any(getattr(step, "with_mask", False) for step in dataset.pipeline.transforms)
        check_annotations(dataset.ann_file, content, with_masks)
        categories = [category.get("name") for category in content["categories"]]
        in_file = [name for name in categories if name in classes]
        published = len(dataset.cat_ids) == len(classes) and classes == list(type(dataset).METAINFO["classes"])
        if in_file != classes and not published:  # mmdet numbers classes in the order of the file, not in that of the names
            raise UserError(
                f"the categories in {dataset.ann_file} are {listed(categories) or 'none (is it a COCO annotation file?)'}, but the data "
                f"set's classes are {listed(classes)}; set its metainfo=dict(classes=...) to category names, in the order of the file"
            )
    if len(dataset) == 0:
        raise UserError(f"the data set {_describe(dataset)} has no samples")
