# SPDX-License-Identifier: Apache-2.0
"""Shared code of the benchmarks: timing that is robust on a noisy machine (functions run in turns; medians and ratios are compared),
peak memory, the record of the machine, and the JSON, CSV, Markdown and plot that each benchmark writes. Importing this file makes
this checkout importable, installed or not, including the trainer's modules in classification/."""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler prints lines at every start; its errors are off with them
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "classification"))  # last, because its module names are generic, such as config

from litv2.files import atomic_write  # noqa: E402

Device = str | torch.device


def synchronise(device: Device) -> None:
    """Waits until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def samples(
    functions: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2, pause: float = 0.0, device: Device = "cpu"
) -> dict[str, list[float]]:
    """Returns the seconds of each function in each of ``rounds`` rounds; in a round, each function runs once.

    ``pause`` seconds before each call let the threads of other libraries fall asleep: they spin for a while after their work.
    On a GPU the wait for its results counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warm_up + rounds):
        for name, function in functions.items():
            time.sleep(pause)
            start = time.perf_counter()
            function()
            synchronise(device)
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def event_samples(functions: dict[str, Callable[[], object]], rounds: int, warm_up: int, device: Device) -> dict[str, list[float]]:
    """The same on the GPU's own clock: the functions of a round are queued one after the other, and none is waited for.

    Where the processor queues more slowly than the GPU computes, that is what is measured. On a CPU it is ``samples``.
    """
    if torch.device(device).type != "cuda":
        return samples(functions, rounds, warm_up)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warm_up + rounds):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(functions) + 1)]
        events[0].record()
        for function, end in zip(functions.values(), events[1:]):
            function()
            end.record()
        torch.cuda.synchronize(device)
        if i >= warm_up:
            for values, start, end in zip(seconds.values(), events, events[1:]):
                values.append(start.elapsed_time(end) / 1e3)
    return seconds


def say(what: str) -> None:
    """Prints progress to stderr; stdout is reserved for the table."""
    print(what, file=sys.stderr, flush=True)


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Returns the 10th, 50th and 90th percentile, interpolated between the values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[0], deciles[4], deciles[8]


def milliseconds(seconds: list[float], digits: int = 1) -> dict[str, float]:
    """Returns the table columns of a time: its median and its spread."""
    low, median, high = (round(1e3 * value, digits) for value in percentiles(seconds))
    return dict(ms=median, p10_ms=low, p90_ms=high)


def peak_memory(function: Callable[[], object], device: Device = "cpu") -> int:
    """Returns the peak bytes that torch's allocator held on the device during a call, minus what it held before."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events):
        held += change
        peak = max(peak, held)
    return peak


def multiply_adds(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Returns the multiply-adds of products and convolutions in a forward pass, as torch counts them."""
    # Fused attention on a CPU is not counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2


def synchronisations(function: Callable[[], object], device: Device) -> int | None:
    """Returns how often the processor waits for a GPU in a call, as torch sees it: copies to the host, mostly."""
    if torch.device(device).type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


FLAGS = {  # of /proc/cpuinfo, by the names of what they stand for; the last three are ARM's
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "BF16": {"avx512_bf16", "bf16"},
    "AMX": {"amx_tile"},
    "NEON": {"asimd"},
    "SVE": {"sve"},
    "I8MM": {"i8mm"},
}


def features() -> list[str]:
    """The vector instructions of the processor that the speed depends on; where the system does not say, those that torch uses."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}
    return [name for name, names in FLAGS.items() if names & flags] or [torch.backends.cpu.get_cpu_capability()]


def environment(device: str = "cpu") -> dict:
    """Returns the hardware and software that the figures depend on, to be stored with them."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    if device != "cpu":
        processor = torch.cuda.get_device_name(device)
    return dict(
        device=processor,
        instructions=" ".join(features()),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        python=platform.python_version(),
        **({} if device == "cpu" else _gpu(device)),
    )


def _gpu(device: str) -> dict:
    return dict(
        capability=".".join(map(str, torch.cuda.get_device_capability(device))),
        memory_GiB=round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        triton=importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        tf32_convolutions=torch.backends.cudnn.allow_tf32,
        tf32_products=torch.backends.cuda.matmul.allow_tf32,
    )


def positive(text: str, least: int = 1) -> int:
    """Parses a flag: an integer of at least 1."""
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}, expected at least {least}")
    return int(text)


def non_negative(text: str) -> int:
    """Parses a flag: an integer of at least 0."""
    return positive(text, 0)


def device_name(text: str) -> str:
    """Parses a flag: "cpu", or an available CUDA device."""
    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from error
    return text


def stem(text: str) -> Path:
    """Parses a flag: a path, whose folder is created now rather than after hours of measuring."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} is read-only")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be written: {error}") from error
    return path


def parser(doc: str, name: str, threads: bool = True) -> argparse.ArgumentParser:
    """Returns a benchmark's parser with its docstring as help, --out, and, if it times something, --threads, --rounds and --warm-up."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = f"output/benchmarks/{name}"
    result.add_argument("--out", type=stem, default=out, metavar="STEM", help=f"path of the output files without suffix (default: {out})")
    if threads:
        result.add_argument("--threads", type=positive, default=torch.get_num_threads())
        result.add_argument("--rounds", type=positive, default=11, help="timed rounds, in which each function runs once (default: 11)")
        result.add_argument("--warm-up", type=non_negative, default=2, help="untimed rounds before them (default: 2)")
    return result


def write_json(path: Path, content: object) -> None:
    """At once: whoever reads it, or is killed while writing it, has the old file or the new one."""
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n")


def fingerprint(*settings: object) -> str:
    """Returns a short text that differs for other settings, by what ``str`` makes of them: the name of what was computed with them."""
    return hashlib.sha256("\n".join(map(str, settings)).encode()).hexdigest()[:8]


def publish(
    rows: list[dict], out: Path, title: str, draw: Callable[[list[dict], Path], None] | None = None, note: str = "", **about
) -> None:
    """Writes OUT.json (with the environment and ``about``), OUT.csv, OUT.md and OUT.png, and prints the Markdown.

    Rows are flat and have the same keys; None is an empty cell. ``draw(rows, path)`` draws the plot (see ``figure``); None skips it.
    ``note`` is a paragraph below the table.
    """
    about = dict(title=title, environment=environment(about.get("device", "cpu")), **about)
    json_file, csv_file, markdown, picture = (out.with_name(f"{out.name}.{kind}") for kind in ("json", "csv", "md", "png"))
    write_json(json_file, dict(about, rows=rows, note=note))
    with open(csv_file, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    if draw is not None:
        draw(rows, picture)
    settings = ", ".join(f"{name} {value}" for name, value in about["environment"].items())
    cells = table(list(rows[0]), [["" if value is None else str(value) for value in row.values()] for row in rows])
    with atomic_write(markdown) as draft:
        paragraphs = [f"## {title}", settings, cells, note, f"![{title}]({picture.name})" if draw else ""]
        draft.write_text("\n\n".join(filter(None, paragraphs)) + "\n")
    print(title, settings, cells, *filter(None, [note]), sep="\n")
    print(f"written to {out}.json, .csv, .md" + (" and .png" if draw else ""))


COLOURS = dict(ours="#d1495b", paper="#30638e", today="#8d96a3", second="#edae49", third="#3caea3")


@contextlib.contextmanager
def figure(path: Path, columns: int = 1, size: tuple[float, float] = (8, 5), rows: int = 1) -> Iterator:
    """Yields axes, a row or several, in the common style and saves them to ``path`` at the end: ``with figure(path) as axes: ...``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        drawing = Figure(figsize=size, layout="constrained")
        yield drawing.subplots(rows, columns)
        drawing.savefig(path, dpi=150)


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits or None)
