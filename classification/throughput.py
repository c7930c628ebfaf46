# SPDX-License-Identifier: Apache-2.0
"""Measures the throughput of a model by the paper's protocol."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from memory import peak_memory_mb


@torch.inference_mode()
def measure_throughput(model: nn.Module, images: Tensor, warm_up: int = 50, timed: int = 30) -> dict[str, float | None]:
    """Times the forward pass on one batch, on its device and in its dtype: 50 warm-up passes, then 30 timed ones.

    Returns:
        images_per_second, latency_ms (median, p10, p90 per pass), and peak_memory_mb (see :func:`memory.peak_memory_mb`).
    """
    device = images.device
    synchronise = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    model.eval()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for i in range(warm_up + timed):
        synchronise()
        start = time.perf_counter()
        model(images)
        synchronise()
        if i >= warm_up:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return dict(
        batch_size=len(images),
        images_per_second=len(images) / median,
        latency_ms_median=1e3 * median,
        latency_ms_p10=1e3 * deciles[0],
        latency_ms_p90=1e3 * deciles[-1],
        peak_memory_mb=peak_memory_mb(device),
    )
