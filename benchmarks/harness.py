"""Timing that survives a noisy machine (the functions take turns, medians and ratios are compared), and peak memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of each function over ``rounds`` turns, in which each runs once after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warm_up + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(function: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held on the CPU during a call beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events):
        held += change
        peak = max(peak, held)
    return peak


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)
