"""Timing that survives a noisy machine (the functions take turns, medians and ratios are compared), and peak memory."""

from __future__ import annotations

import csv
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not


def samples(functions: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each function in each of ``rounds`` turns, in which each runs once after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warm_up + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of each function over ``rounds`` turns."""
    return {name: statistics.median(values) for name, values in samples(functions, rounds, warm_up).items()}


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


def environment(device: str = "cpu") -> dict:
    """What figures depend on, for the record beside them."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    if device != "cpu":
        processor = torch.cuda.get_device_name(device)
    return dict(
        device=processor,
        instructions=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        python=platform.python_version(),
    )


def write_results(stem: Path, rows: list[dict], **about) -> None:
    """STEM.json, with the environment and what is told of the run, and STEM.csv."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(dict(about, rows=rows), indent=2) + "\n")
    with open(stem.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
