# SPDX-License-Identifier: Apache-2.0
"""How the tables are measured, and the images per second and memory of classifiers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from harness import COLOURS, figure, peak_memory, percentiles, samples, say
from training_step import PRECISIONS, random_batch, training_step

Draw = Callable[[list[dict], Path], None]
Result = tuple[list[dict], Draw | None]  # a table's rows, and what draws its plot


@dataclass(frozen=True)
class Setting:
    """What the flags say; without ``measure``, everything is counted alone. Files are OUT-NAME.json and so on."""

    out: Path
    measure: bool = False
    quick: bool = False
    device: str = "cpu"
    batch_size: int = 8
    rounds: int = 11
    warm_up: int = 2
    checkpoint: str = ""
    images: tuple[Path, ...] = ()

    def speeds(self, calls: dict[str, Callable[[], object]], items: int, column: str) -> dict[str, dict[str, float]]:
        """Columns of each call, of so many items: items per second in the median of rounds in which each runs once, and from the 10th to
        the 90th percentile."""
        say(f"timing {', '.join(calls)}: {self.warm_up} + {self.rounds} rounds")
        seconds = samples(calls, self.rounds, self.warm_up, device=self.device)
        columns = {}
        for name, values in seconds.items():
            short, middle, long = percentiles(values)
            rates = {column: items / middle, f"{column}_p10": items / long, f"{column}_p90": items / short}
            columns[name] = {key: float(f"{rate:.4g}") for key, rate in rates.items()}
        return columns


def measured(models: dict[str, Callable[[], nn.Module]], side: int, setting: Setting) -> dict[str, dict]:
    """Columns of each model, which its function makes: images/s, and the MiB that the forward pass and a training step allocate.

    In float32, on images of side x side pixels. Memory is beyond weights, images and the optimizer's state.
    """
    device = torch.device(setting.device)
    images = torch.randn(setting.batch_size, 3, side, side, device=device)
    networks = {name: make().to(device).eval() for name, make in models.items()}
    with torch.inference_mode():
        calls: dict[str, Callable[[], object]] = {name: partial(network, images) for name, network in networks.items()}
        speeds = setting.speeds(calls, setting.batch_size, "images_per_s")
        test = {name: peak_memory(call, device) for name, call in calls.items()}
    del networks, calls
    gc.collect()
    train = {name: training_memory(make(), side, setting) for name, make in models.items()}
    memory = {name: dict(train_MiB=round(train[name] / 2**20, 1), test_MiB=round(test[name] / 2**20, 1)) for name in models}
    return {name: speeds[name] | memory[name] for name in models}


def training_memory(model: nn.Module, side: int, setting: Setting) -> int:
    """Bytes at the peak of a step of the trainer, not its first: activations and gradients."""
    step = training_step(model, random_batch(setting.batch_size, side), torch.device(setting.device))
    run = partial(step, PRECISIONS["float32"])
    run()
    return peak_memory(run, setting.device)


def plot_measured(rows: list[dict], path: Path) -> None:
    """A bar for each model: images/s and both memories; LITv2 stands out."""
    columns = dict(images_per_s="images/s, p10 to p90", train_MiB="peak of a training step, MiB", test_MiB="peak of a forward pass, MiB")
    colours = [COLOURS["ours" if "hilo" in row["model"].lower() or row["model"].startswith("litv2") else "paper"] for row in rows]
    places = [-i for i in range(len(rows))]
    spread = [[abs(row[f"images_per_s_{end}"] - row["images_per_s"]) for row in rows] for end in ("p10", "p90")]
    with figure(path, 3, (12, 1.1 + 0.32 * len(rows))) as axes:
        for axis, (column, label) in zip(axes, columns.items()):
            axis.barh(places, [row[column] for row in rows], 0.7, color=colours, zorder=2)
            axis.set_yticks(places, [row["model"] if axis is axes[0] else "" for row in rows])
            axis.set(xlabel=label)
            axis.grid(False, axis="y")
        axes[0].errorbar([row["images_per_s"] for row in rows], places, xerr=spread, fmt="none", ecolor="black", elinewidth=1, zorder=3)
