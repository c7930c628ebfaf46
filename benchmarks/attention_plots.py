# SPDX-License-Identifier: Apache-2.0
"""Plots for attention.py, from the rows of its table: columns MODE_ms, MODE_p10, MODE_images_per_s and MODE_MiB for each mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness import COLOURS, figure


def _modes(row: dict) -> list[str]:
    return [key.removesuffix("_p10") for key in row if key.endswith("_p10")]


def _fastest(row: dict) -> str | None:
    """Returns the mode in which the layer was fastest, None if it was not timed."""
    return min((mode for mode in _modes(row) if row[f"{mode}_ms"]), key=lambda mode: row[f"{mode}_ms"], default=None)


SHADES = {"eager": 0.45, "compiled": 1.0}  # of bars


def plot_layers(rows: list[dict], path: Path, together: bool = True) -> None:
    """Plots the measured images/s and HiLo's speedup, measured and published; measured in the fastest mode, or in each one apart."""
    rows = sorted((row for row in rows if _fastest(row)), key=lambda row: row[f"{_fastest(row)}_images_per_s"])
    hilo = next((row for row in rows if row["layer"] == "HiLo"), rows[-1])
    with figure(path, 2, (10, 0.32 * len(rows) + 1.2)) as (left, right):
        modes = _modes(rows[0])
        height = 0.8 / len(modes)
        for i, mode in enumerate(modes):
            places = [y + (len(modes) - 1 - 2 * i) * height / 2 for y in range(len(rows))]
            colours = [COLOURS["ours" if row["layer"].startswith("HiLo") else "paper"] for row in rows]
            left.barh(places, [row[f"{mode}_images_per_s"] or 0 for row in rows], height, color=colours, alpha=SHADES.get(mode, 0.7))
            left.barh([0], [0], color=COLOURS["paper"], alpha=SHADES.get(mode, 0.7), label=mode)
        names = [f"{row['layer']}  ({row['MFLOPs']:.0f} M)" for row in rows]
        left.set_yticks(range(len(rows)), names)
        left.set(xlabel="images/s", ylabel="layer (multiply-adds)")
        left.grid(False, axis="y")
        left.legend(fontsize=8, loc="lower right")

        measured = {"measured here": _fastest} if together else {f"measured here, {mode}": lambda row, mode=mode: mode for mode in modes}
        speeds = {
            label: ([row[f"{mode(row)}_images_per_s"] for row in rows], hilo[f"{mode(hilo)}_images_per_s"], colour, marker)
            for (label, mode), colour, marker in zip(measured.items(), ("ours", "third", "today"), "oDv")
        } | {
            "published, CPU": ([row["published_CPU"] for row in rows], hilo["published_CPU"], "paper", "s"),
            "published, RTX 3090": ([row["published_RTX3090"] for row in rows], hilo["published_RTX3090"], "second", "^"),
        }
        for label, (values, own, colour, marker) in speeds.items():
            if own is not None:
                ratios = [own / value if value else float("nan") for value in values]
                right.plot(ratios, range(len(rows)), marker, color=COLOURS[colour], label=label, alpha=0.9)
        right.axvline(1, color=COLOURS["today"], linewidth=1)
        right.set_xscale("log")
        ticks = [0.5, 1, 1.5, 2, 3, 5, 10, 20]
        right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        right.minorticks_off()
        low, high = right.dataLim.intervalx
        right.set_xlim(low / 1.1, high * 1.1)
        right.set_yticks(range(len(rows)), [""] * len(rows))
        right.set_ylim(left.get_ylim())
        right.set(xlabel=f"speed of {hilo['layer']} / speed of the layer")
        right.legend(fontsize=8, loc="upper right")


def plot_resolution(rows: list[dict], path: Path) -> None:
    """Plots multiply-adds, speed in the fastest mode and memory in the first against the side of the map."""
    panels = {
        "images/s in the fastest mode": lambda row: row[f"{_fastest(row)}_images_per_s"] if _fastest(row) else None,
        "peak memory of a call, MiB": lambda row: row[f"{_modes(row)[0]}_MiB"],
    }
    _plot_over_side(rows, path, panels)


def plot_modes(rows: list[dict], path: Path) -> None:
    """Plots multiply-adds, and speed and memory of each mode, against the side of the map: figure 3 of the paper."""
    panels = {f"images/s, {mode}": lambda row, mode=mode: row[f"{mode}_images_per_s"] for mode in _modes(rows[0])}
    panels |= {f"peak memory, {mode}, MiB": lambda row, mode=mode: row[f"{mode}_MiB"] for mode in _modes(rows[0])}
    _plot_over_side(rows, path, panels)


def _plot_over_side(rows: list[dict], path: Path, panels: dict[str, Callable[[dict], float | None]]) -> None:
    """A panel for the multiply-adds, and one for each of ``panels``: what its value is called, and the value of a row, None without one.

    Three stand in a row, and the names of the layers where one is free.
    """
    import numpy as np
    from matplotlib.ticker import LogLocator

    panels = {"GFLOPs (multiply-adds)": lambda row: row["GFLOPs"]} | panels
    others = [("today", "-", "."), ("paper", "-", "s"), ("second", "-", "^"), ("third", "--", "v"), ("today", ":", "D")]
    names = list(dict.fromkeys(row["layer"] for row in rows))
    rivals = [name for name in names if not name.startswith("HiLo")]
    sides = sorted({row["side"] for row in rows})
    columns, lines = min(3, len(panels)), -(-len(panels) // 3)
    with figure(path, columns, (4 * columns, 3.6 * lines), lines) as drawn:
        axes = np.atleast_1d(drawn).ravel()
        for axis, (label, value) in zip(axes, panels.items()):
            for name in names:
                own = [row for row in rows if row["layer"] == name and value(row) is not None]
                colour, line, marker = others[rivals.index(name) % len(others)] if name in rivals else ("ours", "-", "o")
                style = dict(color=COLOURS[colour], linestyle=line, marker=marker, markersize=4, linewidth=1.3)
                if name not in rivals:
                    style |= dict(linestyle="-" if name == "HiLo" else "--", linewidth=2, zorder=3)
                axis.plot([row["side"] for row in own], [value(row) for row in own], label=name, **style)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sides, [str(side) for side in sides], rotation=45)
            axis.minorticks_off()
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
            axis.set(xlabel="side of the map, tokens", ylabel=label)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        free = axes[-1] if len(axes) > len(panels) else axes[0]
        free.legend(*axes[0].get_legend_handles_labels(), fontsize=8, handlelength=3, loc="center" if free is axes[-1] else "best")


def plot_choice(key: str, rows: list[dict], path: Path) -> None:
    """Plots multiply-adds, time and memory against HiLo's window size or alpha."""
    with figure(path, 3, (11, 3.6)) as axes:
        values = [row[key] for row in rows]
        axes[0].plot(values, [row["MFLOPs"] for row in rows], "o-", color=COLOURS["today"])
        axes[0].set(ylabel="MFLOPs (multiply-adds)")
        for mode, colour in zip(_modes(rows[0]), ("paper", "ours", "second", "third")):
            axes[1].plot(values, [row[f"{mode}_ms"] for row in rows], "o-", color=COLOURS[colour], label=mode)
            axes[1].fill_between(values, *([row[f"{mode}_{p}"] for row in rows] for p in ("p10", "p90")), color=COLOURS[colour], alpha=0.15)
            axes[2].plot(values, [row[f"{mode}_MiB"] for row in rows], "o-", color=COLOURS[colour], label=mode)
        axes[1].set(ylabel="ms per batch (band: p10 to p90)")
        axes[2].set(ylabel="peak memory of a call, MiB")
        for axis in axes:
            axis.set(xlabel={"window": "window size s", "alpha": "alpha: share of Lo-Fi's heads"}[key], ylim=(0, None))
        axes[1].legend(fontsize=8)


def plot_case(rows: list[dict], path: Path) -> None:
    """Plots the time by mode, and by part of the eager forward pass."""
    colours = ["paper", "ours", "second", "third", "today"]
    with figure(path, 2, (10, 3.2)) as (left, right):
        modes = _modes(rows[0])
        height = 0.8 / len(modes)
        for i, mode in enumerate(modes):
            places = [y - (len(modes) - 1 - 2 * i) * height / 2 for y in range(len(rows))]
            left.barh(
                places, [row[f"{mode}_ms"] or 0 for row in rows], height, color=COLOURS["paper"], alpha=SHADES.get(mode, 0.7), label=mode
            )
        start = [0.0] * len(rows)
        parts = [key.removesuffix("_ms") for key in rows[0] if key.endswith("_ms")]
        parts = [part for part in parts if part not in modes]
        for part, colour in zip(parts, [COLOURS[name] for name in colours] + ["#dddddd"]):
            widths = [row[f"{part}_ms"] for row in rows]
            right.barh(range(len(rows)), widths, 0.6, left=start, color=colour, label=part.replace("_", " "))
            start = [a + b for a, b in zip(start, widths)]
        left.set_yticks(range(len(rows)), [row["layer"] for row in rows])
        right.set_yticks(range(len(rows)), [""] * len(rows))
        left.set(xlabel="ms per batch")
        left.invert_yaxis()
        right.set(xlabel="ms of the eager forward, by part", ylim=left.get_ylim())
        for axis in (left, right):
            axis.grid(False, axis="y")
        left.legend(fontsize=8)
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
