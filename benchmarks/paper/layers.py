# SPDX-License-Identifier: Apache-2.0
"""Figures and the table of one attention layer; figure 3 and the table are experiments of attention.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import attention
from attention_plots import plot_layers, plot_modes
from harness import COLOURS, figure
from hilo import HiLo

from .measuring import Result, Setting

WIDTH, HEADS = 384, 12  # of figure2's layer: that of LITv2-S in stage 3, where a token is of 16 x 16 pixels
SIDES = tuple(range(256, 2049, 256))  # of its images
WINDOWS = (2, 4, 8)  # and sides of pooled cells
RIVALS = ("MSA", "SRA", "Local Window", "HiLo", "HiLo, window 4")  # of figure 3
QUICK_SIDES = ("14", "28", "56")  # of its maps


def figure2(setting: Setting) -> Result:
    """A row per side of the images: multiply-adds alone, as in the paper."""
    shares = {"Hi-Fi": 0.0, "Lo-Fi": 1.0, "HiLo": 0.9}  # of Lo-Fi heads
    layers = {f"{name}_s{s}_G": HiLo(WIDTH, HEADS, window_size=s, alpha=alpha) for name, alpha in shares.items() for s in WINDOWS}
    counts = [{name: round(layer.flops(side // 16, side // 16) / 1e9, 3) for name, layer in layers.items()} for side in SIDES]
    return [dict(pixels=side) | count for side, count in zip(SIDES, counts)], plot_figure2


def plot_figure2(rows: list[dict], path: Path) -> None:
    """Plots Hi-Fi against Lo-Fi with windows of 2 and of 4 (or the pooling of that size), and HiLo with all windows."""
    with figure(path, 3, (12, 3.8)) as (first, second, third):
        for axes, s in ((first, 2), (second, 4)):
            for name, colour in (("Hi-Fi", "paper"), ("Lo-Fi", "ours")):
                axes.plot(SIDES, [row[f"{name}_s{s}_G"] for row in rows], "o-", color=COLOURS[colour], label=name)
            axes.set(title=f"{HEADS} heads of one kind, s = {s}")
        for s, colour in zip(WINDOWS, ("ours", "second", "third")):
            third.plot(SIDES, [row[f"HiLo_s{s}_G"] for row in rows], "o-", color=COLOURS[colour], label=f"s = {s}")
        third.set(title="HiLo, alpha 0.9")
        for axes in (first, second, third):
            axes.set(xlabel="side of the image (pixels)", ylabel="multiply-adds of the layer (G)", ylim=(0, None))
            axes.legend(fontsize=8, frameon=False)


def figure3(setting: Setting) -> Result:
    """A row per side of the map and layer: its forward pass as the mode "inference", forward and backward as "training"."""
    flags = ["--over", "resolution", "--layers", *RIVALS, *(["--sides", *QUICK_SIDES] if setting.quick else [])]
    modes = dict(inference=[], training=["--training"]) if setting.measure else dict(counted=[])
    rows: list[dict] = []
    for mode, more in modes.items():
        found = _experiment([*flags, *more], mode, setting)
        rows = [old | new for old, new in zip(rows, found)] if rows else found
    return rows, plot_modes


def layers_table(setting: Setting) -> Result:
    """A row per layer of the paper's table; with a GPU, both it and the CPU are measured, as the modes "gpu" and "cpu"."""
    batch = ["--over", "layers", "--batch-size", str(setting.batch_size)]
    rows = _experiment([*batch, "--device", "cpu"], "cpu", setting)
    if setting.measure and setting.device != "cpu":
        rows = [row | other for row, other in zip(rows, _experiment([*batch, "--device", setting.device], "gpu", setting))]
    return rows, partial(plot_layers, together=False) if setting.measure else None


def _experiment(flags: list[str], mode: str, setting: Setting) -> list[dict]:
    """The rows of an experiment of attention.py, with this name for what it calls eager; if nothing is measured, counts alone."""
    device = [] if "--device" in flags else ["--device", setting.device]
    modes = ["--modes", *(["eager"] if setting.measure else [])]
    times = ["--rounds", str(setting.rounds), "--warm-up", str(setting.warm_up), "--out", str(setting.out)]
    rows = attention.measured_rows(attention.arguments([*flags, *device, *times, *modes]))
    return [{key.replace("eager", mode, 1): value for key, value in row.items()} for row in rows]
