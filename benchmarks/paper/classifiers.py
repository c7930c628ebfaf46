# SPDX-License-Identifier: Apache-2.0
"""Tables of classifiers: LITv2, other attention in it, its predecessor, and the share of Lo-Fi heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from flops import as_printed
from harness import COLOURS, figure
from litv2.factory import VARIANTS
from litv2.lit import lit_base, lit_medium, lit_small
from litv2.model import LITv2, litv2_small
from litv2.weights.releases import ZOO

from .measuring import Result, Setting, measured, plot_measured

SPEEDS = {  # images/s, training and test memory in GB, published by the release: one RTX 3090, batch 64
    "litv2_small": (1471, 5.1, 1.2),
    "litv2_medium": (812, 8.8, 1.4),
    "litv2_base": (602, 12.2, 2.1),
    "litv2_base_384": (198, 35.8, 4.6),
}
ATTENTION = {"msa": ("28", "4.1"), "sra": ("32", "4.0"), "w-msa": ("28", "4.0"), "t-msa": ("30", "4.0"), "hilo": ("28", "3.7")}
LIT = {  # LIT's own sizes are of its paper, arXiv 2105.14217
    "LIT-S": (lit_small, dict(), "27", "4.1"),
    "LIT-S + ConvFFN": (lit_small, dict(conv_ffn=True), "28", "4.1"),
    "LIT-S + ConvFFN - relative positions": (litv2_small, dict(attention="msa"), "28", "4.1"),
    "LITv2-S (+ HiLo)": (litv2_small, dict(), "28", "3.7"),
    "LIT-M": (lit_medium, dict(), "48", "8.6"),
    "LIT-B": (lit_base, dict(), "86", "15.0"),
}
Models = dict[str, tuple[Callable[[], LITv2], str | None, str, int]]  # what makes it, printed M and G, side of its images


def counted(model: LITv2, parameters: str | None, gflops: str, side: int = 224) -> dict:
    """The columns of a model: parameters in M and multiply-adds in G, as the paper prints them and as they are counted here."""
    count, flops = sum(p.numel() for p in model.parameters()) / 1e6, model.flops(side, side) / 1e9
    same = (parameters is None or as_printed(count, parameters)) and as_printed(flops, gflops)
    columns = dict(paper_M=parameters, parameters_M=round(count, 3), paper_G=gflops, flops_G=round(flops, 3))
    return columns | dict(as_printed="yes" if same else "no")


def model_rows(models: Models, setting: Setting) -> list[dict]:
    rows = []
    for name, (make, parameters, gflops, side) in models.items():
        with torch.device("meta"):
            rows.append(dict(model=name) | counted(make(), parameters, gflops, side))
    if setting.measure:
        columns = {}
        for side in {side for *_, side in models.values()}:
            columns |= measured({name: make for name, (make, *_, own) in models.items() if own == side}, side, setting)
        rows = [row | columns[row["model"]] for row in rows]
    return rows


def released(names: list[str], setting: Setting) -> list[dict]:
    """Rows of released classifiers, with their accuracies."""
    entries = {name: ZOO[name] for name in names}
    models: Models = {
        name: (lambda entry=entry: VARIANTS[entry.variant](alpha=entry.alpha), entry.parameters, entry.gflops, entry.image_size[0])
        for name, entry in entries.items()
    }
    return [row | {"paper_top-1": entries[row["model"]].figures["top-1"]} for row in model_rows(models, setting)]


def published(name: str | None) -> dict:
    """The columns that are published of a released classifier, and their empty cells for None."""
    figures = (ZOO[name].figures["top-1"], *SPEEDS[name]) if name else (None,) * 4
    return dict(zip(("paper_top-1", "RTX3090_images_per_s", "RTX3090_train_GB", "RTX3090_test_GB"), figures))


def main_table(setting: Setting) -> Result:
    rows = [row | published(row["model"]) for row in released(list(SPEEDS), setting)]
    return rows, plot_measured if setting.measure else None


def attention_table(setting: Setting) -> Result:
    models: Models = {name: (lambda name=name: litv2_small(attention=name), *printed, 224) for name, printed in ATTENTION.items()}
    rows = [row | published("litv2_small" if row["model"] == "hilo" else None) for row in model_rows(models, setting)]
    return rows, plot_measured if setting.measure else None


def lit_table(setting: Setting) -> Result:
    """With the parameters without those of the classifier and the tables of relative positions, which the note is about."""
    models: Models = {
        name: (lambda make=make, kwargs=kwargs: make(**kwargs), *printed, 224) for name, (make, kwargs, *printed) in LIT.items()
    }
    rows = model_rows(models, setting)
    for row, (make, *_) in zip(rows, models.values()):
        with torch.device("meta"):
            parts = [p.numel() for name, p in make().named_parameters() if not name.startswith("head.") and "relative_position" not in name]
        row |= dict(bare_M=round(sum(parts) / 1e6, 3)) | published("litv2_small" if row["model"].startswith("LITv2") else None)
    return rows, plot_measured if setting.measure else None


def alpha_table(setting: Setting) -> Result:
    names = [name for name in ZOO if name.startswith("litv2_small_alpha")]
    return [dict(alpha=ZOO[row["model"]].alpha) | row for row in released(names, setting)], plot_alpha


def plot_alpha(rows: list[dict], path: Path) -> None:
    """Plots multiply-adds, counted and printed, the published accuracy, and the images/s, if they are measured, over alpha."""
    shares = [row["alpha"] for row in rows]
    timed = "images_per_s" in rows[0]
    with figure(path, 2 + timed, (4.5 * (2 + timed), 3.8)) as (left, right, *others):
        left.plot(shares, [row["flops_G"] for row in rows], "o-", color=COLOURS["ours"], label="counted")
        left.plot(shares, [float(row["paper_G"]) for row in rows], "s", color=COLOURS["paper"], label="published", markersize=4)
        left.set(ylabel="multiply-adds (G)")
        left.legend(fontsize=8, frameon=False)
        right.plot(shares, [row["paper_top-1"] for row in rows], "s-", color=COLOURS["paper"])
        right.set(ylabel="published top-1 on ImageNet-1K (%)")
        for axes in others:
            axes.plot(shares, [row["images_per_s"] for row in rows], "o-", color=COLOURS["ours"])
            spread = [[row[f"images_per_s_{end}"] for row in rows] for end in ("p10", "p90")]
            axes.fill_between(shares, *spread, color=COLOURS["ours"], alpha=0.15)
            axes.set(ylabel="images/s, measured (band: p10 to p90)", ylim=(0, 1.05 * max(spread[1])))
        for axes in (left, right, *others):
            axes.set(xlabel="alpha, the share of Lo-Fi heads")
