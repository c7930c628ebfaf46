"""Compares LITv2-S, M and B with models of similar accuracy, measured in one interleaved run.

    python benchmarks/models.py --batch-size 8 --threads 2  # float32
    python benchmarks/models.py --models ours paper         # without the newer models: compiling takes a minute or two per model
    python benchmarks/models.py --models litv2_small resnet50 --modes eager
    python benchmarks/models.py --device cuda --dtype float16 --batch-size 64 --warm-up 50 --rounds 30  # the paper's 50 + 30 forwards

Each model is timed in eager mode, in its faster memory format, and compiled, with frozen weights on a CPU. LITv2 is also timed in its
native form (``litv2.optimize``); for bfloat16 that is the one with bfloat16 products, or float32 if the processor has no instructions for
them. GEMM share: FLOPs x images/s relative to the rate of a large matrix product in the same dtype, timed in turns with the models.
Weights are random. Published figures are shown alongside: top-1 on ImageNet at 224 pixels and, from the release, images/s on an RTX 3090
(batch 64, float16). Models that timm lacks are listed with their published figures only. Writes JSON, CSV and a plot.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness import (
    COLOURS,
    GEMM_SIZE,
    device_name,
    figure,
    gemm,
    milliseconds,
    parser,
    peak_memory,
    positive,
    publish,
    rounded,
    samples,
    say,
)
from litv2 import LITv2
from litv2.errors import UserError, run_program
from litv2.inference.fastest import make_form, why_not

MODES = ["eager", "compiled", "native"]
FORMATS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}


@dataclass(frozen=True)
class Candidate:
    name: str
    timm: str | None  # its name in timm, if it is there
    top1: float  # published, percent
    rtx3090: int | None  # published images/s
    options: tuple[tuple[str, object], ...] = ()
    group: str = "paper"  # key of GROUPS


CANDIDATES = [
    Candidate("LITv2-S", "litv2_small", 82.0, 1471, group="ours"),
    Candidate("LITv2-M", "litv2_medium", 83.3, 812, group="ours"),
    Candidate("LITv2-B", "litv2_base", 83.6, 602, group="ours"),
    Candidate("ResNet-50", "resnet50", 80.4, 1279),
    Candidate("PVT-S", None, 79.8, 1007),
    Candidate("PVTv2-B2", "pvt_v2_b2", 82.0, 854),
    Candidate("Twins-PCPVT-S", "twins_pcpvt_small", 81.2, 998),
    Candidate("Swin-T", "swin_tiny_patch4_window7_224", 81.3, 961),
    Candidate("TNT-S", "tnt_s_legacy_patch16_224", 81.5, 534),
    Candidate("CvT-13", None, 81.6, 947),
    Candidate("CoAtNet-0", "coatnet_0_224", 81.6, 1151),
    Candidate("CaiT-XS24", "cait_xs24_384", 81.8, 623, (("img_size", 224),)),
    Candidate("XCiT-S12/16", "xcit_small_12_p16_224", 82.0, 1068),
    Candidate("ConvNeXt-T", "convnext_tiny", 82.1, 1079),
    Candidate("Focal-Tiny", None, 82.2, 384),
    Candidate("FastViT-SA24", "fastvit_sa24", 82.6, None, group="today"),
    Candidate("RepViT-M1.5", "repvit_m1_5", 82.3, None, group="today"),
    Candidate("TinyViT-21M", "tiny_vit_21m_224", 83.1, None, group="today"),
    Candidate("EfficientViT-B3", "efficientvit_b3", 83.5, None, group="today"),
    Candidate("Hiera-T", "hiera_tiny_224", 82.8, None, group="today"),
    Candidate("DaViT-T", "davit_tiny", 82.8, None, group="today"),
    Candidate("ConvNeXtV2-T", "convnextv2_tiny", 82.5, None, group="today"),
]

GROUPS = dict(ours="LITv2", paper="models of the paper's table", today="newer models")


def main() -> None:
    flags = parser(__doc__, "models")
    names = [*GROUPS, *(candidate.timm for candidate in CANDIDATES if candidate.timm)]
    flags.add_argument("--models", nargs="+", default=list(GROUPS), choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    flags.add_argument("--modes", nargs="+", default=MODES, choices=MODES, metavar="MODE", help=f"of {', '.join(MODES)}")
    flags.add_argument("--batch-size", type=positive, default=8)
    flags.add_argument("--img-size", type=positive, default=224)
    flags.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    flags.add_argument("--device", type=device_name, default="cpu")
    args = flags.parse_args()
    on_gpu = args.device != "cpu"
    torch.set_num_threads(args.threads)
    torch._inductor.config.freezing = not on_gpu
    warnings.filterwarnings("ignore", category=UserWarning)

    chosen = [candidate for candidate in CANDIDATES if candidate.timm and {candidate.timm, candidate.group} & {*args.models}]
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device, dtype=getattr(torch, args.dtype))
    functions, facts = {}, {}
    with torch.inference_mode():
        for candidate in chosen:
            say(f"preparing {candidate.name}")
            functions |= prepare(candidate, images, args.modes, facts)
        if not functions:
            raise UserError(f"none of these models supports the modes {', '.join(args.modes)} here")
        say(f"timing: {args.warm_up} + {args.rounds} rounds of {len(functions)} functions")
        seconds = samples(functions | {"GEMM": gemm(images.dtype, args.device)}, args.rounds, args.warm_up)
    rate = GEMM_SIZE**3 / statistics.median(seconds.pop("GEMM"))

    rows = [row(candidate, seconds, facts, rate, args) for candidate in CANDIDATES if candidate in chosen or candidate.timm is None]
    title = f"{args.dtype}, batch {args.batch_size}, {args.img_size} x {args.img_size}, medians of {args.rounds} interleaved rounds"
    about = dict(batch_size=args.batch_size, img_size=args.img_size, dtype=args.dtype, gemm_GFLOPs=round(rate / 1e9, 1))
    publish(rows, args.out, f"{title}, GEMM {about['gemm_GFLOPs']} G multiply-adds/s", plot, device=args.device, **about)


def prepare(candidate: Candidate, images: Tensor, modes: list[str], facts: dict) -> dict[str, Callable[[], object]]:
    """Returns the functions to time for a model, by "name, mode"; adds its parameters, FLOPs and peak memory to ``facts``."""
    model = timm.create_model(candidate.timm, **dict(candidate.options)).eval().requires_grad_(False).to(images.device, images.dtype)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the counter skips fused attention on a CPU
            model(images[:1])
    except (ValueError, AssertionError) as error:  # timm's models assert their image size
        raise UserError(f"--img-size {images.shape[-1]}: {candidate.name} does not support it: {error}") from error
    flops = model.flops(*images.shape[2:]) if isinstance(model, LITv2) else counter.get_total_flops() / 2
    layouts = {name: images.to(memory_format=layout) for name, layout in FORMATS.items()}
    trials = {}
    for name, layout in FORMATS.items():
        trials[name] = partial(_synchronised, model.to(memory_format=layout), layouts[name])
        trials[name] = statistics.median(samples({name: trials[name]}, 3, 1)[name])
    best = min(trials, key=trials.get)
    model, own = model.to(memory_format=FORMATS[best]), layouts[best]
    facts[candidate.name] = dict(
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        gflops=flops / 1e9,
        layout=best,
        memory=peak_memory(partial(model, own), images.device) / 2**20,
    )
    functions = {}
    if "eager" in modes:
        functions[f"{candidate.name}, eager"] = partial(_synchronised, model, own)
    if "compiled" in modes:
        last = layouts["channels-last"]
        if isinstance(model, LITv2):
            compiled = make_form(model, "compiled", images.dtype)
        else:
            compiled = torch.compile(model.to(memory_format=torch.channels_last))
        compiled(last)
        functions[f"{candidate.name}, compiled"] = partial(_synchronised, compiled, last)
    if "native" in modes and isinstance(model, LITv2) and not why_not("native", images):
        form = "native" if why_not("native-bfloat16", images) else "native-bfloat16"
        functions[f"{candidate.name}, native"] = partial(_synchronised, make_form(model, form, images.dtype), own)
    return functions


def _synchronised(model: nn.Module, images: Tensor) -> None:
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()


def row(candidate: Candidate, seconds: dict[str, list[float]], facts: dict, rate: float, args: argparse.Namespace) -> dict:
    """Returns a row of the table; times are in ms, with p10 and p90 of the faster mode next to its median."""
    own = facts.get(candidate.name, {})
    result = dict(model=candidate.name, group=candidate.group, top1=candidate.top1, parameters_M=rounded(own.get("parameters"), 1))
    result |= dict(GFLOPs=rounded(own.get("gflops"), 2), memory_MiB=rounded(own.get("memory"), 0), layout=own.get("layout"))
    times = {mode: seconds.get(f"{candidate.name}, {mode}") for mode in args.modes}
    medians = {mode: statistics.median(values) for mode, values in times.items() if values}
    result |= {f"{mode}_ms": rounded(1e3 * medians[mode] if mode in medians else None, 1) for mode in args.modes}
    best = min(medians, key=medians.get, default=None)
    spread = milliseconds(times[best]) if best else dict.fromkeys(("p10_ms", "p90_ms"))
    result |= dict(
        p10_ms=spread["p10_ms"],
        p90_ms=spread["p90_ms"],
        images_per_s=rounded(args.batch_size / medians[best], 1) if best else None,
        gemm_share=rounded(own["gflops"] * 1e9 * args.batch_size / medians[best] / rate, 2) if best else None,
    )
    return result | dict(published_RTX3090=candidate.rtx3090)


def plot(rows: list[dict], path: Path) -> None:
    """Plots the published accuracy against the measured speed, with a point per model."""
    with figure(path) as axes:
        for group, label in GROUPS.items():
            points = [row for row in rows if row["group"] == group and row["images_per_s"]]
            if not points:
                continue
            axes.scatter(
                [row["images_per_s"] for row in points], [row["top1"] for row in points], color=COLOURS[group], label=label, zorder=3
            )
            for row in points:
                place = (row["images_per_s"], row["top1"])
                shift = (5, 4) if group != "ours" else (5, -11)
                axes.annotate(row["model"], place, xytext=shift, textcoords="offset points", fontsize=8, color=COLOURS[group])
        axes.set(xlabel="images/s in its fastest mode", ylabel="top-1 on ImageNet, published (%)")
        axes.margins(x=0.15)
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(GROUPS), frameon=False)  # a corner may have a model


if __name__ == "__main__":
    sys.exit(run_program(main))
