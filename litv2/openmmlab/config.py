# SPDX-License-Identifier: Apache-2.0
"""Loads configurations of detection and segmentation, applies command-line options and adapts them to the machine."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from ..errors import UserError
from . import missing_package
from .old_keys import move_pretrained

__all__ = ["adapt_to_device", "image_steps", "load_config", "revert_sync_bn"]

# Keys that mmengine's Runner reads but a configuration need not have.
OPTIONAL_KEYS = {"custom_hooks", "experiment_name", "find_unused_parameters", "model_wrapper_cfg", "randomness", "sync_bn", "work_dir"}


def load_config(path: str | Path, options: dict | None = None) -> Config:
    """Loads a configuration file and merges ``options`` (those of --cfg-options) into it.

    The option ``data_root`` replaces the configuration's own ``data_root`` in the paths of all data sets and annotation files.

    Raises:
        FileNotFoundError: there is no such file.
        MissingPackage: the base configuration belongs to a package that is not installed.
        UserError: an option does not fit the configuration.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        config = Config.fromfile(path)
    except ModuleNotFoundError as error:
        raise missing_package(error.name or str(error)) from error
    for option in options or {}:
        if option.split(".")[0] not in {*config, *OPTIONAL_KEYS}:
            raise UserError(f"--cfg-options {option}: the configuration has no such key; it has {', '.join(sorted(config))}")
    old_root = config.get("data_root")
    try:
        config.merge_from_dict(options or {})
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"--cfg-options {options}: {error}") from error
    if old_root and config.data_root != old_root:
        config.merge_from_dict(_moved(config.to_dict(), str(old_root).rstrip("/"), str(config.data_root).rstrip("/")))
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if config.get(name) and config[name].get("num_workers") == 0:
            config[name].persistent_workers = False  # torch rejects it without workers
    move_pretrained(config.get("model", {}))
    config.setdefault("work_dir", f"work_dirs/{Path(path).stem}")
    return config


def _moved(value, old: str, new: str):
    """Returns ``value`` with the leading path ``old`` of its strings replaced by ``new``."""
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, old, new) for item in value)
    if isinstance(value, str) and (value == old or value.startswith(old + "/")):
        return new + value[len(old) :]
    return value


def adapt_to_device(config: Config, launcher: str) -> None:
    """Sets the launcher; without a GPU, also replaces mixed precision and synchronised batch norms and joins the processes over gloo."""
    config.launcher = launcher
    if torch.cuda.is_available():
        return
    if config.get("optim_wrapper", {}).get("type") == "AmpOptimWrapper":
        print_log("no GPU: training in float32 instead of the configuration's mixed precision", logger="current")
        config.optim_wrapper.type = "OptimWrapper"
        for key in ("loss_scale", "dtype"):
            config.optim_wrapper.pop(key, None)
    if launcher != "none":
        revert_sync_bn(config.model)
        config.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
        if not dist.is_initialized():
            seconds = config.get("env_cfg", {}).get("dist_cfg", {}).get("timeout", 1800)  # as mmengine reads it on a GPU
            dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))


def revert_sync_bn(config: dict | list | tuple) -> None:
    """Replaces synchronised batch norms in place by plain ones, which need neither GPUs nor several processes."""
    for value in config.values() if isinstance(config, dict) else config:
        if isinstance(value, dict | list | tuple):
            revert_sync_bn(value)
    if isinstance(config, dict) and config.get("type") == "SyncBN":
        config["type"] = "BN"


def image_steps(dataset: ConfigDict) -> list:
    """Returns the steps of a data set's pipeline for images without annotations."""
    return [step for step in dataset.pipeline if step["type"] != "LoadAnnotations"]
