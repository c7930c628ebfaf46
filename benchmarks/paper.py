# SPDX-License-Identifier: Apache-2.0
"""Prints tables and figures of the paper: what it states beside what is counted here.

    python benchmarks/paper.py                            # all of them
    python benchmarks/paper.py attention --throughput     # one, and the images/s of its models on this machine

* main: parameters and multiply-adds of LITv2-S, M, B, and B at 384 x 384 pixels;
* attention: other attention layers in the place of HiLo in LITv2-S (table 4);
* lit: from the predecessor LIT to LITv2 (table 5), and all of LIT's sizes;
* figure2: multiply-adds of Hi-Fi and Lo-Fi, with equally many heads, and of HiLo, by resolution and window (figure 2);
* alpha: multiply-adds of LITv2-S over the share of Lo-Fi heads (figure 4).

Columns that start with "paper" are published, all others are counted, or measured, here: parameters in M and multiply-adds in G, with the
digits that the paper prints, and with more where they differ. Accuracies are the published ones. Nothing is trained here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from harness import COLOURS, device_name, figure, parser, positive, publish, samples
from hilo import HiLo
from litv2.errors import run_program
from litv2.factory import VARIANTS
from litv2.lit import lit_base, lit_medium, lit_small
from litv2.model import LITv2, litv2_small
from litv2.weights.releases import ZOO

Speed = Callable[[dict[str, Callable[[], LITv2]], int], dict[str, float]]  # models by name, side of the images -> images/s by name

ATTENTION = {"msa": ("28", "4.1"), "sra": ("32", "4.0"), "w-msa": ("28", "4.0"), "t-msa": ("30", "4.0"), "hilo": ("28", "3.7")}
LIT = {  # LIT's own sizes are of its paper, arXiv 2105.14217
    "LIT-S": (lit_small, dict(), "27", "4.1"),
    "LIT-S + ConvFFN": (lit_small, dict(conv_ffn=True), "28", "4.1"),
    "LIT-S + ConvFFN - relative positions": (litv2_small, dict(attention="msa"), "28", "4.1"),
    "LITv2-S (+ HiLo)": (litv2_small, dict(), "28", "3.7"),
    "LIT-M": (lit_medium, dict(), "48", "8.6"),
    "LIT-B": (lit_base, dict(), "86", "15.0"),
}
WIDTH, HEADS = 384, 12  # of figure2's layer: that of LITv2-S in stage 3, where a token is of 16 x 16 pixels
SIDES = tuple(range(256, 2049, 256))  # of its images
WINDOWS = (2, 4, 8)  # and sides of pooled cells


def main() -> None:
    flags = parser(__doc__, "paper")
    flags.add_argument("names", nargs="*", type=table_name, metavar="NAME", help=f"{', '.join(TABLES)} (default: all)")
    flags.add_argument("--throughput", action="store_true", help="also time the models, which takes minutes on a CPU")
    flags.add_argument("--device", type=device_name, default="cpu", help="of --throughput")
    flags.add_argument("--batch-size", type=positive, default=8, help="of --throughput (default: 8)")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)

    def speed(models: dict[str, Callable[[], LITv2]], side: int) -> dict[str, float]:
        images = torch.randn(args.batch_size, 3, side, side, device=args.device)
        networks = {name: make().to(args.device).eval() for name, make in models.items()}
        with torch.inference_mode():
            seconds = samples({n: lambda m=m: m(images) for n, m in networks.items()}, args.rounds, args.warm_up, device=args.device)
        return {name: round(args.batch_size / sorted(values)[len(values) // 2], 1) for name, values in seconds.items()}

    for name in args.names or TABLES:
        make_rows, title, draw = TABLES[name]
        rows = make_rows(speed if args.throughput else None)
        out = args.out.with_name(f"{args.out.name}-{name}")
        publish(rows, out, title, draw, device=args.device, batch_size=args.batch_size if args.throughput else None)


def table_name(text: str) -> str:
    """Parses an argument: a name of ``TABLES``."""
    if text not in TABLES:
        raise argparse.ArgumentTypeError(f"{text!r}, expected one of {', '.join(TABLES)}")
    return text


def counted(model: LITv2, parameters: str | None, gflops: str, side: int = 224) -> dict:
    """The columns of a model: what the paper prints, and the same rounded alike and with three digits."""
    count, flops = sum(p.numel() for p in model.parameters()) / 1e6, model.flops(side, side) / 1e9
    digits = {name: len(printed.partition(".")[2]) for name, printed in (("M", parameters or ""), ("G", gflops))}
    same = parameters in (None, f"{count:.{digits['M']}f}") and gflops == f"{flops:.{digits['G']}f}"
    columns = dict(paper_M=parameters, parameters_M=round(count, 3), paper_G=gflops, flops_G=round(flops, 3))
    return columns | dict(as_printed="yes" if same else "no")


def model_rows(models: dict[str, tuple[Callable[[], LITv2], str | None, str, int]], speed: Speed | None) -> list[dict]:
    """A row for each (what makes the model, printed parameters, printed multiply-adds, side of the images)."""
    rows = []
    for name, (make, parameters, gflops, side) in models.items():
        with torch.device("meta"):
            rows.append(dict(model=name) | counted(make(), parameters, gflops, side))
    if speed is not None:
        for side in {side for *_, side in models.values()}:
            images_per_s = speed({name: make for name, (make, *_, of) in models.items() if of == side}, side)
            for row in rows:
                row.setdefault("images_per_s", None)
                row["images_per_s"] = images_per_s.get(row["model"], row["images_per_s"])
    return rows


def released(names: list[str], speed: Speed | None) -> list[dict]:
    """Rows of released classifiers, with their accuracies."""
    entries = {name: ZOO[name] for name in names}
    models = {
        name: (lambda entry=entry: VARIANTS[entry.variant](alpha=entry.alpha), entry.parameters, entry.gflops, entry.image_size[0])
        for name, entry in entries.items()
    }
    return [row | {"paper_top-1": entries[row["model"]].figures["top-1"]} for row in model_rows(models, speed)]


def main_rows(speed: Speed | None) -> list[dict]:
    return released(["litv2_small", "litv2_medium", "litv2_base", "litv2_base_384"], speed)


def attention_rows(speed: Speed | None) -> list[dict]:
    models = {name: (lambda name=name: litv2_small(attention=name), *printed, 224) for name, printed in ATTENTION.items()}
    return model_rows(models, speed)


def lit_rows(speed: Speed | None) -> list[dict]:
    models = {name: (lambda make=make, kwargs=kwargs: make(**kwargs), *printed, 224) for name, (make, kwargs, *printed) in LIT.items()}
    rows = model_rows(models, speed)
    for row, (make, *_) in zip(rows, models.values()):
        with torch.device("meta"):
            row["without_head_M"] = round(row["parameters_M"] - sum(p.numel() for p in make().head.parameters()) / 1e6, 3)
    return rows


def alpha_rows(speed: Speed | None) -> list[dict]:
    names = [name for name in ZOO if name.startswith("litv2_small_alpha")]
    return [dict(alpha=ZOO[row["model"]].alpha) | row for row in released(names, speed)]


def figure2_rows(speed: Speed | None) -> list[dict]:
    """A row per side of the images; these are layers, which are not timed: benchmarks/attention.py does that."""
    shares = {"Hi-Fi": 0.0, "Lo-Fi": 1.0, "HiLo": 0.9}  # of Lo-Fi heads
    layers = {f"{name}_s{s}_G": HiLo(WIDTH, HEADS, window_size=s, alpha=alpha) for name, alpha in shares.items() for s in WINDOWS}
    counts = [{name: round(layer.flops(side // 16, side // 16) / 1e9, 3) for name, layer in layers.items()} for side in SIDES]
    return [dict(pixels=side) | count for side, count in zip(SIDES, counts)]


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


def plot_alpha(rows: list[dict], path: Path) -> None:
    """Plots multiply-adds, counted and printed, and the published accuracy over alpha."""
    shares = [row["alpha"] for row in rows]
    with figure(path, 2, (9, 3.8)) as (left, right):
        left.plot(shares, [row["flops_G"] for row in rows], "o-", color=COLOURS["ours"], label="counted")
        left.plot(shares, [float(row["paper_G"]) for row in rows], "s", color=COLOURS["paper"], label="published", markersize=4)
        left.set(xlabel="alpha, the share of Lo-Fi heads", ylabel="multiply-adds (G)")
        left.legend(fontsize=8, frameon=False)
        right.plot(shares, [row["paper_top-1"] for row in rows], "s-", color=COLOURS["paper"])
        right.set(xlabel="alpha, the share of Lo-Fi heads", ylabel="published top-1 on ImageNet-1K (%)")


Table = tuple[Callable[[Speed | None], list[dict]], str, Callable[[list[dict], Path], None] | None]
TABLES: dict[str, Table] = {
    "main": (main_rows, "LITv2: parameters (M), multiply-adds of one image (G), top-1 (%)", None),
    "attention": (attention_rows, "LITv2-S with other attention (table 4)", None),
    "lit": (lit_rows, "From LIT to LITv2 (table 5)", None),
    "figure2": (figure2_rows, f"Multiply-adds of a layer of {WIDTH} channels and {HEADS} heads (G)", plot_figure2),
    "alpha": (alpha_rows, "LITv2-S over the share of Lo-Fi heads (figure 4)", plot_alpha),
}


if __name__ == "__main__":
    sys.exit(run_program(main))
