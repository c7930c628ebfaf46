# SPDX-License-Identifier: Apache-2.0
"""Builds detectors and segmenters for programs that run them without mmengine's Runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope

from .config import revert_sync_bn
from .runner import load_checkpoint

__all__ = ["build_model"]


def build_model(config: Config, checkpoint: str | Path | None = None) -> Any:
    """Builds the model of a configuration on the CPU, in evaluation mode and with ``dataset_meta``.

    Without a checkpoint the weights are random.
    """
    init_default_scope(config.default_scope)
    revert_sync_bn(config.model)
    model = MODELS.build(config.model).eval().to(memory_format=torch.channels_last)
    meta = load_checkpoint(model, checkpoint)["meta"] if checkpoint else {}
    dataset = config.test_dataloader.dataset
    with DATASETS.switch_scope_and_registry(config.default_scope) as registry:
        model.dataset_meta = {**registry.get(dataset.type).METAINFO, **dataset.get("metainfo", {})}
    for source in (meta, meta.get("dataset_meta") or {}):  # as in the release's files, then as in ours
        model.dataset_meta |= {key.lower(): value for key, value in source.items() if key.lower() in ("classes", "palette")}
    return model
