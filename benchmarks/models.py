# SPDX-License-Identifier: Apache-2.0
"""Compares LITv2-S, M and B with models of similar accuracy, in all available runtimes, measured in one interleaved run.

    python benchmarks/models.py --quick  # seven models in float32, under five minutes on two cores that nobody else uses
    python benchmarks/models.py --batch-size 8 --threads 2  # float32; compiling takes a minute or two per model
    python benchmarks/models.py --models ours today --dtype bfloat16
    python benchmarks/models.py --models litv2_small resnet50 --dtype int8 --modes native openvino
    python benchmarks/models.py --device cuda --dtype float16 --batch-size 64 --warm-up 50 --rounds 30  # the paper's 50 + 30 forwards

Modes: eager, in the model's faster memory format; graph, a CUDA graph of that (LITv2: of its folded form); compiled, with frozen weights;
native (LITv2 only, ``litv2.optimize``), with products in the dtype if the processor supports them, else in float32; OpenVINO and
onnxruntime, from the exported model. The figure of a model is its best over all modes. Other models are re-parameterised in every mode if
they support it, and their parameters and FLOPs are counted in that form. Memory is that of the eager forward pass. In int8 the products
with weights are quantized: LITv2 by its own export, other models with int8 or uint8 activations, whichever is faster. torch has no int8 for
these models, and onnxruntime no bfloat16 on a CPU.
Before a mode is timed, its logits are compared with those of the eager float32 model. If the error exceeds 5 % of the largest logit (30 %
in lower precision), the mode is left out and the reason is printed to stderr.
Peak share: FLOPs x images/s relative to the rate of the processor's multiply-add instructions for this dtype in a loop of their own
(benchmarks/peak.py), or on a GPU to the rate of a large matrix product, timed in turns with the models.
Weights are random. Published figures are shown alongside: top-1 on ImageNet at 224 pixels and, from the release, images/s on an RTX 3090
(batch 64, float16). Models that timm lacks are listed with their published figures only. Writes JSON, CSV and a plot.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torch._inductor.config
from timm.utils import reparameterize_model
from torch import Tensor, nn

from harness import COLOURS, device_name, figure, milliseconds, multiply_adds, parser, peak_memory, positive, publish, rounded, samples, say
from litv2 import LITv2
from litv2.errors import UserError, run_program
from peak import NoPeak, Peak, peak
from runtime_modes import MODES, Case, inferred, why_not

FORMATS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}
PAUSE = 0.02  # seconds between the runs of two runtimes
GEMM_SIZE = 8192  # of the product whose rate stands for a GPU's; smaller ones do not fill a large GPU
TOLERANCES = dict(float32=0.05, bfloat16=0.3, float16=0.3, int8=0.3)  # of the logits, in units of the largest
QUICK = "litv2_small resnet50 convnext_tiny swin_tiny_patch4_window7_224 xcit_small_12_p16_224 repvit_m1_5 fastvit_sa24".split()


@dataclass(frozen=True)
class Candidate:
    name: str
    timm: str | None  # its name there, if it is there
    top1: float  # published, percent
    rtx3090: int | None  # published images/s
    options: tuple[tuple[str, object], ...] = ()
    group: str = "paper"  # of GROUPS


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
    Candidate("EfficientViT-B2", "efficientvit_b2", 82.1, None, group="today"),
    Candidate("EfficientViT-B3", "efficientvit_b3", 83.5, None, group="today"),
    Candidate("Hiera-T", "hiera_tiny_224", 82.8, None, group="today"),
    Candidate("DaViT-T", "davit_tiny", 82.8, None, group="today"),
    Candidate("DeiT-III-S", "deit3_small_patch16_224", 81.4, None, group="today"),
    Candidate("ConvNeXtV2-T", "convnextv2_tiny", 82.5, None, group="today"),
]

GROUPS = dict(ours="LITv2", paper="models of the paper's table", today="newer models")


def main() -> None:
    flags = parser(__doc__, "models")
    names = [*GROUPS, *(candidate.timm for candidate in CANDIDATES if candidate.timm)]
    flags.add_argument("--models", nargs="+", default=list(GROUPS), choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    flags.add_argument(
        "--modes", nargs="+", choices=MODES, metavar="MODE", help=f"of {', '.join(MODES)} (default: all that are available here)"
    )
    flags.add_argument(
        "--quick",
        action="store_true",
        help=f"of {', '.join(QUICK)}, 1 + 5 rounds; without compiled for models that OpenVINO runs: it takes a minute or two",
    )
    flags.add_argument("--batch-size", type=positive, default=8)
    flags.add_argument("--img-size", type=positive, default=224)
    flags.add_argument("--dtype", default="float32", choices=list(TOLERANCES))
    flags.add_argument("--device", type=device_name, default="cpu")
    args = flags.parse_args()
    if args.quick:
        flags.set_defaults(models=QUICK, rounds=5, warm_up=1)  # a flag that is given counts
        args = flags.parse_args()
    on_gpu = args.device != "cpu"
    args.modes = available(args.modes, args.dtype, args.device)
    torch.set_num_threads(args.threads)
    torch._inductor.config.freezing = not on_gpu
    warnings.filterwarnings("ignore")

    chosen = [candidate for candidate in CANDIDATES if candidate.timm and {candidate.timm, candidate.group} & {*args.models}]
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    functions, facts = {}, {}
    with torch.no_grad():
        for candidate in chosen:
            say(f"preparing {candidate.name}")
            functions |= prepare(candidate, images, args, facts)
        if not functions:
            raise UserError(f"none of these models supports the modes {', '.join(args.modes)} here")
        modes, args.modes = args.modes, [mode for mode in args.modes if any(name.endswith(f", {mode}") for name in functions)]
        top = reference_rate(args)
        say(f"timing: {args.warm_up} + {args.rounds} rounds of {len(functions)} functions")
        seconds = samples(functions | ({"peak": top.run} if top else {}), args.rounds, args.warm_up, PAUSE, args.device)
    rate = top.multiply_adds / statistics.median(seconds.pop("peak")) if top else None

    if args.quick and "compiled" in modes and "compiled" not in args.modes:
        say("without compiled: --quick leaves it out for models that OpenVINO runs")
    shown = [candidate for candidate in CANDIDATES if candidate in chosen or (candidate.timm is None and not args.quick)]
    rows = [row(candidate, seconds, facts, rate, args) for candidate in shown]
    compare(rows)
    title = f"{args.dtype}, batch {args.batch_size}, {args.img_size} x {args.img_size}, medians of {args.rounds} interleaved rounds"
    about = dict(batch_size=args.batch_size, img_size=args.img_size, dtype=args.dtype, peak=top and top.instruction)
    about |= dict(peak_GFLOPs=rounded(rate and rate / 1e9, 1))
    ending = f", peak {about['peak_GFLOPs']} G multiply-adds/s ({about['peak']})" if top else ""
    publish(rows, args.out, title + ending, plot, device=args.device, **about)


def available(named: list[str] | None, dtype: str, device: str) -> list[str]:
    """Returns the available modes, of those named or of all. It is an error if a named one is not available."""
    reasons = {mode: why_not(mode, dtype, device) for mode in MODES if named is None or mode in named}
    for mode, reason in reasons.items():
        if reason and named:
            raise UserError(f"--modes {mode}: {reason}")
        if reason:
            say(f"without {mode}: {reason}")
    return [mode for mode, reason in reasons.items() if not reason]


def reference_rate(args: argparse.Namespace) -> Peak | None:
    """Returns the rate that peak_share is relative to."""
    if args.device != "cpu":
        a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE, device=args.device, dtype=getattr(torch, args.dtype))
        return Peak(f"a product of {GEMM_SIZE} x {GEMM_SIZE} matrices", GEMM_SIZE**3, partial(torch.mm, a, b))
    try:
        top = peak(args.dtype, args.threads)
    except NoPeak as reason:
        say(f"without peak_share: {reason}")
        return None
    if args.dtype == "bfloat16" and "FMA" in top.instruction:
        say(f"this processor has no instructions for bfloat16: peak_share is of {top.instruction}, which is float32's")
    return top


def open_branches(model: nn.Module) -> None:
    """Sets layer scales and norms' weights that start at zero, or nearly, to 0.1, as if they were trained.

    Otherwise a residual branch adds nothing, and a runtime could skip it; in int8 it does.
    """
    for name, parameter in model.named_parameters():
        is_vector = parameter.numel() == max(parameter.shape, default=0)
        if is_vector and not name.endswith("bias") and parameter.abs().max() < 1e-3:
            parameter.fill_(0.1)


def prepare(candidate: Candidate, images: Tensor, args: argparse.Namespace, facts: dict) -> dict[str, Callable[[], object]]:
    """Returns the functions to time for a model, by "name, mode"; adds its parameters, FLOPs and peak memory to ``facts``."""
    torch.manual_seed(0)
    model = timm.create_model(candidate.timm, **dict(candidate.options)).eval().requires_grad_(False).to(images.device)
    open_branches(model)
    try:
        exact = model(images)
    except (ValueError, AssertionError) as error:  # timm's models assert the size that they are built for
        raise UserError(f"--img-size {images.shape[-1]}: {candidate.name} does not support it: {error}") from error
    if isinstance(model, LITv2):
        flops = model.flops(*images.shape[2:])
    else:
        model = reparameterize_model(model)
        flops = multiply_adds(model, images[:1])
    dtype = torch.float32 if args.dtype == "int8" else getattr(torch, args.dtype)
    model, images = in_faster_format(model.to(dtype), images.to(dtype), 1 if args.quick else 3)
    facts[candidate.name] = dict(
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        gflops=flops / 1e9,
        memory=peak_memory(partial(model, images), images.device) / 2**20,
    )
    functions = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        case = Case(model, images, args.dtype, Path(folder))
        for mode in sorted(args.modes, key="compiled".__eq__):  # it is the last
            if mode == "native" and not isinstance(model, LITv2):
                continue
            if mode == "compiled" and args.quick and f"{candidate.name}, openvino" in functions:
                continue
            runs = []
            for variant in case.variants():
                try:
                    run = MODES[mode](variant)
                    check(run(), exact, TOLERANCES[args.dtype])
                    runs.append(run)
                except Exception as error:  # exporters and compilers raise anything; what else there is goes on
                    kind = f" with {variant.activations} activations" if len(case.variants()) > 1 else ""
                    say(f"{candidate.name} without {mode}{kind}: {type(error).__name__}: {in_a_line(error)}")
            if runs:
                functions[f"{candidate.name}, {mode}"] = faster(runs, images.device)
    return functions


def in_faster_format(model: nn.Module, images: Tensor, rounds: int) -> tuple[nn.Module, Tensor]:
    """Both in that memory format in which the eager model is the faster one."""

    def both(name: str) -> tuple[nn.Module, Tensor]:
        return model.to(memory_format=FORMATS[name]), images.to(memory_format=FORMATS[name])

    times = {name: samples({name: inferred(*both(name))}, rounds, 1, device=images.device)[name] for name in FORMATS}
    return both(min(times, key=lambda name: statistics.median(times[name])))


def faster(runs: list[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    if len(runs) == 1:
        return runs[0]
    seconds = samples(dict(enumerate(runs)), 3, 1, PAUSE, device)
    return runs[min(seconds, key=lambda i: statistics.median(seconds[i]))]


def check(logits: Tensor, exact: Tensor, tolerance: float) -> None:
    """A broken conversion is not timed."""
    error = ((logits.float() - exact).abs().max() / exact.abs().max()).item()
    if not error <= tolerance:  # NaN too
        raise ValueError(f"its logits are off by {error:.2g} of the largest, allowed are {tolerance}")


def in_a_line(error: Exception, limit: int = 200) -> str:
    """Without OpenVINO's lines that say where in its sources it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return " ".join(lines)[:limit] or "no message"


def row(candidate: Candidate, seconds: dict[str, list[float]], facts: dict, rate: float | None, args: argparse.Namespace) -> dict:
    """A line of the table; times are in ms, p10 and p90 of the fastest mode."""
    own = facts.get(candidate.name, {})
    result = dict(model=candidate.name, group=candidate.group, top1=candidate.top1, parameters_M=rounded(own.get("parameters"), 1))
    result |= dict(GFLOPs=rounded(own.get("gflops"), 2), memory_MiB=rounded(own.get("memory"), 0))
    times = {mode: seconds.get(f"{candidate.name}, {mode}") for mode in args.modes}
    medians = {mode: statistics.median(values) for mode, values in times.items() if values}
    result |= {f"{mode}_ms": rounded(1e3 * medians[mode] if mode in medians else None, 1) for mode in args.modes}
    best = min(medians, key=medians.get, default=None)
    spread = milliseconds(times[best]) if best else dict.fromkeys(("p10_ms", "p90_ms"))
    result |= dict(
        best=best,
        p10_ms=spread["p10_ms"],
        p90_ms=spread["p90_ms"],
        images_per_s=rounded(args.batch_size / medians[best], 1) if best else None,
        peak_share=rounded(own["gflops"] * 1e9 * args.batch_size / medians[best] / rate, 2) if best and rate else None,
    )
    return result | dict(published_RTX3090=candidate.rtx3090)


def compare(rows: list[dict]) -> None:
    """Adds a column: the images/s of each model over those of the first LITv2."""
    first = next((row for row in rows if row["group"] == "ours" and row["images_per_s"]), None)
    for row in rows if first else ():
        row[f"times_{first['model']}"] = rounded(row["images_per_s"] and row["images_per_s"] / first["images_per_s"], 2)


def plot(rows: list[dict], path: Path) -> None:
    """Published accuracy against measured speed, a point per model."""
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
