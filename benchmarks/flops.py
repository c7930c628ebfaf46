# SPDX-License-Identifier: Apache-2.0
"""Compares the published multiply-adds of every model of the release with ours and with those of a third counter.

    python benchmarks/flops.py
    python benchmarks/flops.py --only classification      # without OpenMMLab's packages

"ours" is the counter that follows the release's: ``LITv2.flops`` for classifiers, ``litv2.openmmlab.flops.count_flops`` for detectors and
segmenters. "torch" is the independent ``torch.utils.flop_counter.FlopCounterMode``, which counts only the matrix products and
convolutions that run. The columns after it, in G, are what the release counts differently, each from a formula over the shapes that
the modules see:

* offsets: token merging's offset convolution counted with 12 channels and their biases, although it has 8 (classifiers);
* norms: in classifiers 1 per value of a LayerNorm (none for the last one) and 2 of a BatchNorm; in dense models, as in mmcv, 2 for both;
* biases: in classifiers only those of depthwise convolutions; in dense models those of all convolutions, but not of linear layers;
* pooling: in classifiers the mean over positions, as if over 1/16 of the patches; in dense models HiLo's pooling,
  ReLU, and the padded cells that HiLo does not compute;
* deformable: the deformable convolutions themselves, which the release's dense counts omit.

"unexplained_%" is the rest of our count after subtracting torch's and these, "published_%" the deviation of the published figure from
ours. If that exceeds the rounding of the print, the note names the count that would give the figure, if there is one. Images are
800 x 1280 for detectors, with 1000 proposals and 100 masks if applicable, and 512 x 512 for segmenters. Only shapes are computed.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness import COLOURS, ROOT, figure, parser, publish
from hilo import HiLo
from litv2.errors import MissingPackage, UserError, run_program
from litv2.factory import create_model
from litv2.layers import Block, DeformableTokenMerging, DepthwiseConv, PatchEmbed
from litv2.model import LITv2
from litv2.weights.releases import ZOO, Release
from mm_modules.DCN import DeformConv2dPack
from mm_modules.dispatch import use

if TYPE_CHECKING:
    from mmengine.config import Config

TERMS = ("offsets", "norms", "biases", "pooling", "deformable")
TASKS = ("classification", "detection", "segmentation")
SIZES = dict(detection=(800, 1280), segmentation=(512, 512))  # height and width in pixels that the release counts at


def main() -> None:
    flags = parser(__doc__, "flops", threads=False)
    flags.add_argument("--only", nargs="+", default=TASKS, choices=TASKS, help="default: all that the installed packages allow")
    args = flags.parse_args()
    warnings.filterwarnings("ignore")
    tasks = [task for task in args.only if task == "classification" or mm_packages()]
    with use(deform_conv2d="torch"):  # plain operations, visible to every counter
        rows = [row(entry) for entry in ZOO.values() if entry.task in tasks]
    if not rows:
        raise UserError("there are no models to count; see the messages above")
    publish(rows, args.out, "G multiply-adds of one image", plot)


def mm_packages() -> bool:
    try:
        import litv2.openmmlab  # noqa: F401
    except MissingPackage as problem:
        print(f"left out: {problem}")
        return False
    return True


def row(entry: Release) -> dict:
    """Returns a row of the table: the published figures, ours, torch's, and the terms between the last two."""
    if entry.task == "classification":
        size, terms = entry.image_size, classifier_terms
        with torch.device("meta"):
            model = create_model(entry.name).eval()
        forward = model.to_empty(device="cpu")  # skips the initialisation, which takes longer than everything else
        ours, attention = model.flops(*size), {}
    else:
        from litv2.openmmlab.build import build_model
        from litv2.openmmlab.flops import CountedForward, count_flops

        size, terms = SIZES[entry.task], dense_terms
        model = build_model(dense_config(entry))
        counts = count_flops(model, *size)
        ours, attention = counts["published"], products_of(counts)
        forward = CountedForward(model)
    torchs, products, sums = count(forward, size, terms)
    result = dict(model=entry.name, published_M=entry.parameters, parameters_M=round(sum(p.numel() for p in model.parameters()) / 1e6, 3))
    result |= dict(published=entry.gflops, ours=round(ours / 1e9, 3), torch=round(torchs / 1e9, 3))
    result |= {term: round(sums[term] / 1e9, 3) for term in TERMS}
    unexplained = ours - torchs - sums.total()
    result |= {"unexplained_%": round(100 * unexplained / ours, 4), "published_%": round(100 * (float(entry.gflops) * 1e9 / ours - 1), 2)}
    return result | dict(note=note(ours, attention or products_by_window(products), entry.gflops))


def dense_config(entry: Release) -> Config:
    """The configuration of a released detector or segmenter.

    Raises:
        MissingPackage: OpenMMLab's packages are not installed.
    """
    from litv2.openmmlab.config import load_config

    return load_config(ROOT / entry.task / "configs/litv2" / f"{entry.config}.py")


def as_printed(value: float, printed: str) -> bool:
    """Whether a figure has the printed digits. The release's were rounded twice: 62.4996 became 62.50, and then 63."""
    return abs(round(value, 3) - float(printed)) <= 0.5 * 10 ** -len(printed.partition(".")[2])


def count(forward: nn.Module, size: tuple[int, int], terms) -> tuple[int, Counter, Counter]:
    """Returns torch's multiply-adds for one pass, the part in attention by HiLo's window, and the sums of the terms."""
    sums: Counter = Counter()

    def add(module: nn.Module, inputs: tuple, output) -> None:
        for term, amount in terms(module, inputs, output).items():
            sums[term] += amount

    hooks = [module.register_forward_hook(add) for module in forward.modules()]
    # torch's counter skips the fused attention on CPUs, but sees the products of the plain one.
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False) as counter,
    ):
        forward(torch.empty(1, 3, *size))
    for hook in hooks:
        hook.remove()
    products: Counter = Counter()
    for name, module in forward.named_modules():
        if isinstance(module, HiLo):
            products[module.window_size] += counter.flop_counts[f"{type(forward).__name__}.{name}"][torch.ops.aten.bmm] // 2
    return counter.get_total_flops() // 2, products, sums


def classifier_terms(module: nn.Module, inputs: tuple, output) -> dict[str, int]:
    """Returns what ``LITv2.flops`` counts for a module in addition to products and convolutions, or differently."""
    match module:
        case PatchEmbed():
            return dict(norms=output.numel())
        case Block():
            return dict(norms=output.numel() * (1 if module.attn is None else 2))
        case DepthwiseConv():
            return dict(biases=output.numel())
        case DeformableTokenMerging():
            cells, offset = output.shape[1] * output.shape[2], module.dconv.conv_offset
            return dict(norms=2 * output.numel(), offsets=cells * (12 * (offset.weight[0].numel() + 1) - offset.weight.numel()))
        case LITv2():
            H, W = inputs[0].shape[2:]
            return dict(pooling=module.num_features * (H // 4) * (W // 4) // 16)
    return {}


def dense_terms(module: nn.Module, inputs: tuple, output) -> dict[str, int]:
    """Returns the same for ``count_flops``, which is mmcv's counter plus what that misses."""
    match module:
        case nn.LayerNorm() | nn.BatchNorm2d():
            return dict(norms=2 * output.numel())
        case nn.Conv2d() | nn.ConvTranspose2d() if module.bias is not None:
            return dict(biases=output.numel())
        case nn.ReLU():
            return dict(pooling=output.numel())
        case HiLo():
            (s, _), (H, W) = module.window, inputs[1:]
            windows = -(-H // s) * -(-W // s)
            pooling = windows * s**2 * module.dim if s > 1 and module.l_heads else 0
            padding = (windows * s**2 - H * W) * (module.h_dim**2 + module.l_dim * (module.dim + 2 * windows + module.l_dim))
            return dict(pooling=pooling + padding)
        case DeformConv2dPack():
            cells = output.shape[2] * output.shape[3]
            return dict(biases=cells * module.conv_offset.out_channels, deformable=-cells * module.weight.numel())
    return {}


def products_by_window(products: Counter) -> dict[str, int]:
    """What ``note`` takes, from the multiply-adds in attention by HiLo's window."""
    windowed = sum(amount for window, amount in products.items() if window > 1)
    return {"attention's products": products.total(), "the products of stage 3's attention": windowed}


def products_of(counts: dict[str, int]) -> dict[str, int]:
    """The same from ``count_flops``, which counts padded cells, though HiLo does not compute them."""
    return {"attention's products": counts["products"]}


def note(ours: int, products: dict[str, int], published: str) -> str | None:
    """Explains a published figure that is not ours rounded, if it is ours without some or all products in attention."""
    if as_printed(ours / 1e9, published):
        return None
    for what, amount in products.items():
        if as_printed((ours - amount) / 1e9, published):
            return f"{(ours - amount) / 1e9:.3f} without {what} ({amount / 1e9:.3f})"
    return "not explained"


def plot(rows: list[dict], path: Path) -> None:
    """Plots a bar per model: the excess of the release's count over torch's, term by term, and a mark at the published figure."""
    labels = ("offset convolutions counted larger", "norms", "biases", "pooling, ReLU, padding", "deformable convolutions left out")
    places = [-i for i in range(len(rows))]
    totals = [100 * sum(row[term] for term in TERMS) / row["torch"] for row in rows]
    marks = [100 * (float(row["published"]) / row["torch"] - 1) for row in rows]
    with figure(path, size=(9, 1.5 + 0.24 * len(rows))) as axes:
        ends = [0.0] * len(rows)
        for term, label, colour in zip(TERMS, labels, COLOURS.values()):
            shares = [100 * row[term] / row["torch"] for row in rows]
            left = 0 if term == "deformable" else ends  # the only negative term
            axes.barh(places, shares, left=left, height=0.6, color=colour, label=label, zorder=2)
            ends = [end + share for end, share in zip(ends, shares)]
        axes.scatter(marks, places, marker="|", s=90, color="black", label="published", zorder=3)
        axes.scatter(totals, places, s=14, color="white", edgecolor="black", label="sum of the terms = ours", zorder=3)
        for row, mark, place in zip(rows, marks, places):
            if row["note"]:
                shift, side = (-6, "right") if 2 * mark > min(marks) + max(marks) else (6, "left")
                axes.annotate(row["note"], (mark, place), (shift, 0), textcoords="offset points", ha=side, va="center", fontsize=7)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.use_sticky_edges = False
        axes.margins(x=0.04)
        axes.set_yticks(places, [row["model"] for row in rows])
        axes.set(xlabel="difference from the count of torch.utils.flop_counter (%)", ylim=(places[-1] - 0.7, 0.7))
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.3, -0.08 if len(rows) > 12 else -0.16), ncols=3, frameon=False)


if __name__ == "__main__":
    sys.exit(run_program(main))
