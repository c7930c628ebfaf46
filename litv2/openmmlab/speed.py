# SPDX-License-Identifier: Apache-2.0
"""Measures the images per second of a detector or segmenter, one image at a time, by the release's protocol."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose

from ..errors import UserError

__all__ = ["frames_per_second", "random_images"]

WARM_UP = 5  # images that are not timed


@torch.no_grad()
def frames_per_second(model: Any, batches: Iterable[dict], most: int, log_interval: int = 50) -> float:
    """Runs ``model.test_step`` on at most ``most`` batches of one image; prints and returns the images per second.

    The time includes preprocessing, the network and postprocessing to boxes or labels, but neither file reading nor the first five
    images.

    Raises:
        UserError: there are five images or fewer.
    """
    on_gpu = next(model.parameters()).is_cuda
    seconds, count = 0.0, 0
    for count, batch in enumerate(islice(batches, most), start=1):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model.test_step(batch)
        if on_gpu:
            torch.cuda.synchronize()
        if count > WARM_UP:
            seconds += time.perf_counter() - start
            if count % log_interval == 0:
                print(f"Done image [{count}/{most}], {_rate(seconds, count)}", flush=True)
    if count <= WARM_UP:
        raise UserError(f"{count} images are too few: the first {WARM_UP} are not timed")
    print(f"Overall {_rate(seconds, count)}")
    return (count - WARM_UP) / seconds


def _rate(seconds: float, count: int) -> str:
    timed = count - WARM_UP
    return f"fps: {timed / seconds:.1f} img / s, times per image: {1e3 * seconds / timed:.1f} ms / img"


def random_images(config: Config, count: int, height: int, width: int) -> list[dict]:
    """Returns batches of one random image of height x width, passed through the configuration's test pipeline."""
    steps = [step for step in config.test_dataloader.dataset.pipeline if not step["type"].startswith("Load")]
    resize = next(step for step in steps if step["type"] == "Resize")
    resize["scale"] = (width, height)
    pipeline = Compose([dict(type="LoadImageFromNDArray"), *steps])
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    items = [pipeline(dict(img=image, img_id=i, img_path="")) for i, image in enumerate(pixels)]
    return [dict(inputs=[item["inputs"]], data_samples=[item["data_samples"]]) for item in items]
