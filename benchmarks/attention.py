# SPDX-License-Identifier: Apache-2.0
"""HiLo against thirteen other attention layers, and HiLo's own choices, measured in interleaved runs.

    python benchmarks/attention.py --threads 2                         # the paper's table: 14 x 14 tokens, dim 768, 12 heads, batch 64
    python benchmarks/attention.py --training --modes eager            # forward and backward
    python benchmarks/attention.py --layers HiLo MSA "Local Window" --batch-size 8
    python benchmarks/attention.py --over resolution --threads 2       # maps of 14 x 14 to 128 x 128 tokens
    python benchmarks/attention.py --over window                       # HiLo's window sizes on a map of 56 x 56
    python benchmarks/attention.py --over alpha                        # HiLo from Hi-Fi alone to Lo-Fi alone
    python benchmarks/attention.py --over case                         # windows of 8 x 8 on 64 x 64 tokens, and where the time goes
    python benchmarks/attention.py --device cuda --dtype float16 --warm-up 50 --rounds 30   # the paper's protocol: 50 + 30 forwards

The layers are those of attention_layers.py, with random weights. In the first form, every layer must first match its published parameters
and multiply-adds within 1 %, and the published figures are shown alongside. Compiled layers have frozen weights on a CPU. Memory is the
peak that a call allocates in addition to its input and weights. Writes JSON, CSV and a plot.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
import torch._dynamo.config
import torch._inductor.config
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from attention_layers import DIM, HEADS, LAYERS, SIZE, Size, Window
from attention_plots import plot_case, plot_choice, plot_layers, plot_resolution
from harness import device_name, milliseconds, parser, peak_memory, positive, publish, rounded, samples, say
from hilo import HiLo
from litv2.errors import UserError, run_program
from runtime_modes import captured

# How each mode prepares a layer.
MODES: dict[str, Callable[[nn.Module], Callable]] = {
    "eager": lambda layer: layer,
    "graph": lambda layer: Graph(layer),
    "compiled": lambda layer: torch.compile(layer, dynamic=False),
}
# Layers beyond the table: HiLo with the windows intended for larger maps.
BUILD = {name: entry.build for name, entry in LAYERS.items()} | {
    f"HiLo, window {s}": partial(lambda s, dim, heads, size: HiLo(dim, heads, qkv_bias=True, window_size=s, alpha=0.9), s) for s in (4, 8)
}
# Defaults of the flags for each experiment.
DEFAULTS = {
    "layers": dict(layers=list(LAYERS), dim=DIM, heads=HEADS, sides=[SIZE[0]], batch_size=64),
    "resolution": dict(
        layers=["MSA", "SRA", "Local Window", "Shifted Window", "XCA", "HiLo", "HiLo, window 4"],
        dim=DIM,
        heads=HEADS,
        sides=[14, 28, 56, 84, 112, 128],
        batch_size=1,
    ),
    "window": dict(layers=["HiLo"], dim=384, heads=12, sides=[56], batch_size=1),
    "alpha": dict(layers=["HiLo"], dim=384, heads=12, sides=[14], batch_size=64),
    "case": dict(layers=["HiLo"], dim=256, heads=8, sides=[64], batch_size=1),
}
TOP1 = {0.0: 81.16, 0.2: 81.89, 0.4: 81.81, 0.5: 81.88, 0.7: 81.94, 0.9: 82.03, 1.0: 81.89}  # published top-1 of LITv2-S by alpha


def main() -> None:
    args = arguments(sys.argv[1:])
    rows = measured_rows(args)
    what = "forward and backward" if args.training else "forward"
    title = f"{what}, {args.dtype}, batch {args.batch_size}, dim {args.dim}, {args.heads} heads"
    title += "" if args.over == "resolution" else f", {args.sides[0]} x {args.sides[0]} tokens"
    about = {name: value for name, value in vars(args).items() if name not in ("out", "threads")}
    draw = EXPERIMENTS[args.over][1] if args.modes else None
    publish(rows, args.out, f"{title}, medians of {args.rounds} interleaved rounds", draw, **about)


def arguments(words: list[str]) -> argparse.Namespace:
    """Parses the flags of a command line, with each experiment's own defaults."""
    flags = parser(__doc__, "attention")
    flags.add_argument("--over", default="layers", choices=list(DEFAULTS), help="what to vary")
    flags.add_argument("--layers", nargs="+", choices=list(BUILD), metavar="NAME", help=f"of {'; '.join(BUILD)}")
    modes = ["eager", "compiled"]
    flags.add_argument("--modes", nargs="*", default=modes, choices=list(MODES), help="none: count only (default: eager compiled)")
    flags.add_argument("--training", action="store_true", help="time forward and backward instead of forward")
    flags.add_argument("--batch-size", type=positive, help="default: 64 for layers and alpha, else 1")
    flags.add_argument("--dim", type=positive)
    flags.add_argument("--heads", type=positive)
    flags.add_argument("--sides", type=positive, nargs="+", help="sides of the map: several with --over resolution, else one")
    flags.add_argument("--windows", type=positive, nargs="+", default=[1, 2, 3, 4, 5, 6, 7], help="for --over window")
    flags.add_argument("--alphas", type=float, nargs="+", default=list(TOP1), help="for --over alpha")
    flags.add_argument("--limit", type=float, default=300, help="do not time calls of more GFLOPs than this (default: 300)")
    flags.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    flags.add_argument("--device", type=device_name, default="cpu")
    args = flags.parse_args(words)
    for name, value in DEFAULTS[args.over].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.over != "resolution" and len(args.sides) > 1:
        flags.error(f"--sides: --over {args.over} takes one side only")
    if "graph" in args.modes and (args.device == "cpu" or args.training):
        raise UserError("--modes graph: it needs a GPU, and has no backward pass here; choose eager or compiled")
    if args.over != "layers" and str(args.out) == flags.get_default("out"):
        args.out = args.out.with_name(f"attention_{args.over}")
    return args


def measured_rows(args: argparse.Namespace) -> list[dict]:
    """Runs an experiment and returns the rows of its table."""
    torch.set_num_threads(args.threads)
    torch._inductor.config.freezing = args.device == "cpu" and not args.training
    torch._dynamo.config.recompile_limit = 256  # layers of one class are compiled one by one
    with torch.inference_mode(not args.training):
        return EXPERIMENTS[args.over][0](args)


def over_layers(args: argparse.Namespace) -> list[dict]:
    size = (args.sides[0], args.sides[0])
    layers = {name: _ready(partial(BUILD[name], args.dim, args.heads, size), args) for name in args.layers}
    costs = {name: dict(parameters_M=_parameters(layer) / 1e6, MFLOPs=layer.flops(*size) / 1e6) for name, layer in layers.items()}
    published = {name: LAYERS[name] for name in layers if name in LAYERS and (args.dim, args.heads, size) == (DIM, HEADS, SIZE)}
    check({name: costs[name] for name in published})
    measured = measure(layers, size, args)
    rows = []
    for name in layers:
        row = dict(layer=name, **{key: round(value, 2) for key, value in costs[name].items()}, **measured[name])
        for column, key in dict(M="parameters", MFLOPs="flops", CPU="cpu", RTX3090="rtx3090").items():
            row[f"published_{column}"] = getattr(published.get(name), key, None)
        rows.append(row)
    return rows


def check(costs: dict[str, dict[str, float]]) -> None:
    """Raises if the parameters or multiply-adds of a layer differ from the published ones by more than 1 %."""
    wrong = []
    for name, cost in costs.items():
        for (key, value), expected in zip(cost.items(), (LAYERS[name].parameters, LAYERS[name].flops)):
            if abs(value - expected) > 0.01 * expected:
                wrong.append(f"{name}: {key} {value:.2f}, published {expected:.2f}")
    if wrong:
        raise ValueError("the layers do not match the published table: " + "; ".join(wrong))


def over_resolution(args: argparse.Namespace) -> list[dict]:
    rows = []
    for side in args.sides:
        size = (side, side)
        layers = {name: _ready(partial(BUILD[name], args.dim, args.heads, size), args) for name in args.layers}
        measured = measure(layers, size, args)
        for name, layer in layers.items():
            rows.append(dict(layer=name, side=side, tokens=side**2, GFLOPs=round(layer.flops(*size) / 1e9, 3), **measured[name]))
        del layers
        gc.collect()
    return rows


def over_window(args: argparse.Namespace) -> list[dict]:
    return _hilos(args, {f"window {s}": dict(window=s, alpha=0.9) for s in args.windows})


def over_alpha(args: argparse.Namespace) -> list[dict]:
    rows = _hilos(args, {f"alpha {alpha}": dict(window=2, alpha=alpha) for alpha in args.alphas})
    return [row | dict(published_top1=TOP1.get(row["alpha"])) for row in rows]


def over_case(args: argparse.Namespace) -> list[dict]:
    """A user's case: HiLo, each of its two branches with all heads, and attention in windows of the same size."""
    size = (args.sides[0], args.sides[0])
    hilo = partial(HiLo, args.dim, args.heads, qkv_bias=True, window_size=8)
    builds = {
        "HiLo, alpha 0.5": partial(hilo, alpha=0.5),
        "Hi-Fi alone": partial(hilo, alpha=0),
        "Lo-Fi alone": partial(hilo, alpha=1),
        "window attention": partial(Window, args.dim, args.heads, window=8),
    }
    layers = {name: _ready(build, args) for name, build in builds.items()}
    measured = measure(layers, size, args)
    x = _tokens(size, args)
    rows = []
    for name, layer in layers.items():
        row = dict(layer=name, parameters_M=round(_parameters(layer) / 1e6, 2), MFLOPs=round(layer.flops(*size) / 1e6, 1), **measured[name])
        parts = where_time_goes(partial(_call, layer, x, size), args)
        rows.append(row | {f"{part}_ms": round(1e3 * seconds, 3) for part, seconds in parts.items()})
    return rows


def _hilos(args: argparse.Namespace, choices: dict[str, dict]) -> list[dict]:
    """Returns a row for each HiLo with these windows and alphas."""
    size = (args.sides[0], args.sides[0])
    layers = {
        name: _ready(partial(HiLo, args.dim, args.heads, qkv_bias=True, window_size=choice["window"], alpha=choice["alpha"]), args)
        for name, choice in choices.items()
    }
    measured = measure(layers, size, args)
    rows = []
    for name, layer in layers.items():
        row = dict(**choices[name], HiFi_heads=layer.h_heads, LoFi_heads=layer.l_heads, parameters_M=round(_parameters(layer) / 1e6, 2))
        rows.append(row | dict(MFLOPs=round(layer.flops(*size) / 1e6, 1), **measured[name]))
    return rows


def measure(layers: dict[str, nn.Module], size: Size, args: argparse.Namespace) -> dict[str, dict]:
    """Measures all layers and modes in turns; returns their columns: times in ms (empty beyond --limit), images/s and MiB."""
    x = _tokens(size, args)
    times_forward = 3 if args.training else 1
    calls = {}
    for name, layer in layers.items():
        if times_forward * args.batch_size * layer.flops(*size) > args.limit * 1e9:
            continue
        for mode in args.modes:
            calls[f"{name}, {mode}"] = partial(_train if args.training else _call, MODES[mode](layer), x, size)
    for name, call in tuple(calls.items()):  # compiles and captures
        say(f"preparing {name}, {size[0]} x {size[1]}")
        try:
            call()
        except RuntimeError as error:
            if name.endswith(", eager"):
                raise
            say(f"without {name}: {error}")
            del calls[name]
    memory = {name: peak_memory(call, x.device) / 2**20 for name, call in calls.items()}
    seconds = samples(calls, args.rounds, args.warm_up, device=args.device)
    columns = {}
    for name in layers:
        columns[name] = {}
        for mode in args.modes:
            times = seconds.get(f"{name}, {mode}")
            spread = milliseconds(times, 2) if times else dict.fromkeys(("ms", "p10_ms", "p90_ms"))
            columns[name] |= {
                f"{mode}_ms": spread["ms"],
                f"{mode}_p10": spread["p10_ms"],
                f"{mode}_p90": spread["p90_ms"],
                f"{mode}_images_per_s": float(f"{args.batch_size / statistics.median(times):.4g}") if times else None,
                f"{mode}_MiB": rounded(memory.get(f"{name}, {mode}"), 1),
            }
    return columns


def _ready(build: Callable[[], nn.Module], args: argparse.Namespace) -> nn.Module:
    try:
        layer = build()
    except ValueError as error:  # invalid flags: heads that do not divide the channels, a map that is not made of whole windows
        raise UserError(f"cannot build this layer: {error}") from error
    return layer.train(args.training).requires_grad_(args.training).to(args.device, getattr(torch, args.dtype))


def _tokens(size: Size, args: argparse.Namespace) -> Tensor:
    x = torch.randn(args.batch_size, size[0] * size[1], args.dim, device=args.device, dtype=getattr(torch, args.dtype))
    return x.requires_grad_(args.training)


class Graph:
    """A layer's CUDA graph, captured in the first call, of the tensors of that call."""

    def __init__(self, layer: nn.Module):
        self.layer, self.replay = layer, None

    def __call__(self, x: Tensor, *size: int) -> Tensor:
        if self.replay is None:
            self.replay = captured(partial(self.layer, x, *size))
        return self.replay()


def _parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _call(layer: Callable, x: Tensor, size: Size) -> None:
    layer(x, *size)


def _train(layer: nn.Module, x: Tensor, size: Size) -> None:
    y = layer(x, *size)
    torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))


PARTS = ["projections", "window_attention", "global_attention", "pooling", "moving_data", "rest"]
OPERATORS = {
    "aten::clone": "moving_data",  # from reshape and contiguous
    "aten::cat": "moving_data",
    "aten::constant_pad_nd": "moving_data",
    "aten::linear": "projections",
    "aten::avg_pool2d": "pooling",
}


def where_time_goes(function: Callable[[], object], args: argparse.Namespace) -> dict[str, float]:
    """Returns the seconds of a call by part: the self time of an operator counts for the innermost enclosing one in ``OPERATORS``.

    Attention with as many keys as queries is windowed; otherwise it is global: one query per token, one key per window.
    """
    on_gpu = args.device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    function()
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(args.rounds):
            function()
    parts = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
            parts[_part(event)] += seconds / args.rounds
    return {part: parts[part] for part in PARTS}


def _part(event: torch.autograd.profiler_util.FunctionEvent | None) -> str:
    while event is not None:
        if event.name == "aten::scaled_dot_product_attention":
            queries, keys = event.input_shapes[:2]
            return "window_attention" if queries[-2] == keys[-2] else "global_attention"
        if event.name in OPERATORS:
            return OPERATORS[event.name]
        event = event.cpu_parent
    return "rest"


EXPERIMENTS = {
    "layers": (over_layers, plot_layers),
    "resolution": (over_resolution, plot_resolution),
    "window": (over_window, partial(plot_choice, "window")),
    "alpha": (over_alpha, partial(plot_choice, "alpha")),
    "case": (over_case, plot_case),
}


if __name__ == "__main__":
    sys.exit(run_program(main))
