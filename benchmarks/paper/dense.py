# SPDX-License-Identifier: Apache-2.0
"""Tables of detectors and segmenters, from the configurations in detection/ and segmentation/; they need OpenMMLab's packages."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import torch

from flops import SIZES, as_printed, dense_config, note, products_of
from harness import COLOURS, figure, say
from litv2.weights.releases import ZOO, Release

from .measuring import Result, Setting

FPS = {  # published by the release, which does not name the GPU
    "retinanet_litv2_s_fpn_1x_coco": 18.7,
    "retinanet_litv2_s_fpn_1x_coco_ws_4": 20.4,
    "retinanet_litv2_m_fpn_1x_coco": 12.2,
    "retinanet_litv2_m_fpn_1x_coco_ws_4": 14.8,
    "retinanet_litv2_b_fpn_1x_coco": 9.5,
    "retinanet_litv2_b_fpn_1x_coco_ws_4": 11.8,
    "mask_rcnn_litv2_s_fpn_1x_coco": 18.7,
    "mask_rcnn_litv2_s_fpn_1x_coco_ws_4": 21.9,
    "mask_rcnn_litv2_m_fpn_1x_coco": 12.6,
    "mask_rcnn_litv2_m_fpn_1x_coco_ws_4": 16.0,
    "mask_rcnn_litv2_b_fpn_1x_coco": 9.3,
    "mask_rcnn_litv2_b_fpn_1x_coco_ws_4": 11.5,
    "litv2_s_fpn_r50_512x512_80k_ade20k": 42.6,
    "litv2_m_fpn_r50_512x512_80k_ade20k": 28.5,
    "litv2_b_fpn_r50_512x512_80k_ade20k": 27.5,
}


@cache  # two tables are of the detectors
def dense_rows(task: str, setting: Setting) -> list[dict]:
    """A row per released configuration: parameters, multiply-adds, images/s from image to result, one at a time, and the accuracies.

    Multiply-adds are the release's count, without the deformable convolutions; weights and images are random.

    Raises:
        MissingPackage: OpenMMLab's packages are not installed.
    """
    entries = [entry for entry in ZOO.values() if entry.task == task]
    rows = [_counted(entry) for entry in entries]
    if setting.measure:
        fps = _speeds(entries, setting)
        rows = [row | fps[row["model"]] for row in rows]
    metrics = dict.fromkeys(metric for entry in entries for metric in entry.figures)
    accuracies = [{f"paper_{metric}": entry.figures.get(metric) for metric in metrics} for entry in entries]
    return [row | own for row, own in zip(rows, accuracies)]


def _counted(entry: Release) -> dict:
    from litv2.openmmlab.build import build_model
    from litv2.openmmlab.flops import count_flops

    say(f"counting {entry.name}")
    model = build_model(dense_config(entry))
    counts = count_flops(model, *SIZES[entry.task])
    parameters, flops = sum(p.numel() for p in model.parameters()) / 1e6, counts["published"] / 1e9
    same = as_printed(parameters, entry.parameters) and as_printed(flops, entry.gflops)
    columns = dict(model=entry.name, window=entry.window[2], paper_M=entry.parameters, parameters_M=round(parameters, 3))
    columns |= dict(paper_G=entry.gflops, flops_G=round(flops, 3), as_printed="yes" if same else "no")
    return columns | dict(note=note(counts["published"], products_of(counts), entry.gflops), release_FPS=FPS[entry.name])


def _speeds(entries: list[Release], setting: Setting) -> dict[str, dict]:
    from litv2.openmmlab.build import build_model
    from litv2.openmmlab.speed import random_images

    calls = {}
    for entry in entries:
        config = dense_config(entry)
        (batch,) = random_images(config, 1, *SIZES[entry.task])
        calls[entry.name] = partial(build_model(config).to(setting.device).test_step, batch)
    with torch.inference_mode():
        return setting.speeds(calls, 1, "FPS")


def detection_table(setting: Setting) -> Result:
    return dense_rows("detection", setting), None


def segmentation_table(setting: Setting) -> Result:
    return dense_rows("segmentation", setting), None


def windows_table(setting: Setting) -> Result:
    """A row per detector: windows of 4 x 4 beside those of 2 x 2."""
    of = {row["model"]: row for row in dense_rows("detection", setting)}
    timed = ("FPS",) if setting.measure else ()
    columns = ("paper_G", "flops_G", "as_printed", "release_FPS", *timed, "paper_box AP", "paper_mask AP")
    rows = []
    for name, two in of.items():
        if two["window"] == 2:
            four = of[f"{name}_ws_4"]
            pairs = {f"{column}_s{row['window']}": row.get(column) for column in columns for row in (two, four)}
            rows.append(dict(model=name, parameters_M=two["parameters_M"], **pairs))
    return rows, plot_windows


def plot_windows(rows: list[dict], path: Path) -> None:
    """Plots multiply-adds, and images/s if they are measured, of each detector with both windows."""
    panels = dict(flops_G="multiply-adds (G)") | (dict(FPS="images/s, measured") if "FPS_s2" in rows[0] else {})
    kinds = dict(retinanet="RetinaNet", mask_rcnn="Mask R-CNN")
    parts = [row["model"].removesuffix("_fpn_1x_coco").split("_litv2_") for row in rows]
    names = [f"{kinds[kind]} {size.upper()}" for kind, size in parts]
    with figure(path, len(panels), (4.5 * len(panels) + 1.5, 3.2)) as axes:
        for axis, (column, label) in zip(axes if len(panels) > 1 else [axes], panels.items()):
            for shift, window, colour in ((0.2, 2, "paper"), (-0.2, 4, "ours")):
                places, values = [shift - i for i in range(len(rows))], [row[f"{column}_s{window}"] for row in rows]
                axis.barh(places, values, 0.38, color=COLOURS[colour], label=f"s = {window}", zorder=2)
            axis.set_yticks([-i for i in range(len(rows))], names)
            axis.set(xlabel=label)
            axis.grid(False, axis="y")
            axis.legend(fontsize=8)
