"""HiLo against thirteen other attention layers, and HiLo's own choices, measured in interleaved runs.

    python benchmarks/attention.py --threads 2                         # the paper's table: 14 x 14 tokens, dim 768, 12 heads, batch 64
    python benchmarks/attention.py --training --modes eager            # forward and backward
    python benchmarks/attention.py --layers HiLo MSA "Local Window" --batch-size 8
    python benchmarks/attention.py --over resolution --threads 2       # maps of 14 x 14 to 128 x 128 tokens
    python benchmarks/attention.py --over window                       # HiLo's window sizes on a map of 56 x 56
    python benchmarks/attention.py --over alpha                        # HiLo from Hi-Fi alone to Lo-Fi alone
    python benchmarks/attention.py --over case                         # windows of 8 x 8 on 64 x 64 tokens, and where the time goes
    python benchmarks/attention.py --device cuda --dtype float16 --warm-up 50 --rounds 30   # the paper's protocol: 50 + 30 forwards

The layers are those of attention_layers.py; weights are random. In the first form no speed is printed before every layer is found to have
its published parameters and multiply-adds, within 1 %; the published figures stand beside. Compiled layers have frozen weights on a CPU.
Memory is the peak that a call allocates beyond its input and weights. Writes JSON, CSV and a plot.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch._dynamo.config
import torch._inductor.config
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from attention_layers import DIM, HEADS, LAYERS, SIZE, Size, Window
from harness import COLOURS, device_name, figure, non_negative, parser, peak_memory, positive, publish, rounded, samples, say
from hilo import HiLo

# How a layer is made ready; None for a layer that the mode does not have.
MODES: dict[str, Callable[[nn.Module], Callable | None]] = {
    "eager": lambda layer: layer,
    "compiled": lambda layer: torch.compile(layer, dynamic=False),
}
# Layers beyond the table: HiLo as it is meant to be on larger maps.
BUILD = {name: entry.build for name, entry in LAYERS.items()} | {
    f"HiLo, window {s}": partial(lambda s, dim, heads, size: HiLo(dim, heads, qkv_bias=True, window_size=s, alpha=0.9), s) for s in (4, 8)
}
# Of each experiment, what the flags are if they are not given.
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
TOP1 = {0.0: 81.16, 0.2: 81.89, 0.4: 81.81, 0.5: 81.88, 0.7: 81.94, 0.9: 82.03, 1.0: 81.89}  # published, of LITv2-S by alpha


def main() -> None:
    flags = parser(__doc__, "attention")
    flags.add_argument("--over", default="layers", choices=list(DEFAULTS), help="what is varied")
    flags.add_argument("--layers", nargs="+", choices=list(BUILD), metavar="NAME", help=f"of {'; '.join(BUILD)}")
    flags.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=list(MODES))
    flags.add_argument("--training", action="store_true", help="forward and backward in place of forward")
    flags.add_argument("--batch-size", type=positive, help="64 for layers and alpha, else 1")
    flags.add_argument("--dim", type=positive)
    flags.add_argument("--heads", type=positive)
    flags.add_argument("--sides", type=positive, nargs="+", help="of the map: several for resolution, else one")
    flags.add_argument("--windows", type=positive, nargs="+", default=[1, 2, 3, 4, 5, 6, 7], help="for --over window")
    flags.add_argument("--alphas", type=float, nargs="+", default=list(TOP1), help="for --over alpha")
    flags.add_argument("--limit", type=float, default=300, help="GFLOPs of a call; what takes more is not timed (default: 300)")
    flags.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    flags.add_argument("--device", type=device_name, default="cpu")
    flags.add_argument("--warm-up", type=non_negative, default=2, help="rounds before those that count")
    args = flags.parse_args()
    for name, value in DEFAULTS[args.over].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.over != "resolution" and len(args.sides) > 1:
        flags.error(f"--sides: --over {args.over} has one map")
    torch.set_num_threads(args.threads)
    torch._inductor.config.freezing = args.device == "cpu" and not args.training
    torch._dynamo.config.recompile_limit = 256  # layers of one class are compiled one by one

    if args.over != "layers" and str(args.out) == flags.get_default("out"):
        args.out = args.out.with_name(f"attention_{args.over}")
    experiment, draw = EXPERIMENTS[args.over]
    with torch.inference_mode(not args.training):
        rows = experiment(args)
    what = "forward and backward" if args.training else "forward"
    title = f"{what}, {args.dtype}, batch {args.batch_size}, dim {args.dim}, {args.heads} heads"
    title += "" if args.over == "resolution" else f", {args.sides[0]} x {args.sides[0]} tokens"
    about = {name: value for name, value in vars(args).items() if name not in ("out", "threads")}
    publish(rows, args.out, f"{title}, medians of {args.rounds} interleaved rounds", draw, **about)


def over_layers(args: argparse.Namespace) -> list[dict]:
    size = (args.sides[0], args.sides[0])
    layers = {name: _ready(BUILD[name](args.dim, args.heads, size), args) for name in args.layers}
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
    """Raises if a layer is not the one whose figures were published: 1 % of difference in parameters or multiply-adds."""
    wrong = []
    for name, cost in costs.items():
        for (key, value), expected in zip(cost.items(), (LAYERS[name].parameters, LAYERS[name].flops)):
            if abs(value - expected) > 0.01 * expected:
                wrong.append(f"{name}: {key} {value:.2f}, published {expected:.2f}")
    if wrong:
        raise ValueError("not the layers of the published table: " + "; ".join(wrong))


def over_resolution(args: argparse.Namespace) -> list[dict]:
    rows = []
    for side in args.sides:
        size = (side, side)
        layers = {name: _ready(BUILD[name](args.dim, args.heads, size), args) for name in args.layers}
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
    """HiLo as a user had it, its two halves with all of the heads, and attention in windows of that size."""
    size = (args.sides[0], args.sides[0])
    layers = {
        "HiLo, alpha 0.5": HiLo(args.dim, args.heads, qkv_bias=True, window_size=8, alpha=0.5),
        "Hi-Fi alone": HiLo(args.dim, args.heads, qkv_bias=True, window_size=8, alpha=0),
        "Lo-Fi alone": HiLo(args.dim, args.heads, qkv_bias=True, window_size=8, alpha=1),
        "window attention": Window(args.dim, args.heads, window=8),
    }
    layers = {name: _ready(layer, args) for name, layer in layers.items()}
    measured = measure(layers, size, args)
    x = _tokens(size, args)
    rows = []
    for name, layer in layers.items():
        row = dict(layer=name, parameters_M=round(_parameters(layer) / 1e6, 2), MFLOPs=round(layer.flops(*size) / 1e6, 1), **measured[name])
        parts = where_time_goes(partial(_call, layer, x, size), args)
        rows.append(row | {f"{part}_ms": round(1e3 * seconds, 3) for part, seconds in parts.items()})
    return rows


def _hilos(args: argparse.Namespace, choices: dict[str, dict]) -> list[dict]:
    """A row for each HiLo of these windows and alphas."""
    size = (args.sides[0], args.sides[0])
    layers = {
        name: _ready(HiLo(args.dim, args.heads, qkv_bias=True, window_size=choice["window"], alpha=choice["alpha"]), args)
        for name, choice in choices.items()
    }
    measured = measure(layers, size, args)
    rows = []
    for name, layer in layers.items():
        row = dict(**choices[name], HiFi_heads=layer.h_heads, LoFi_heads=layer.l_heads, parameters_M=round(_parameters(layer) / 1e6, 2))
        rows.append(row | dict(MFLOPs=round(layer.flops(*size) / 1e6, 1), **measured[name]))
    return rows


def measure(layers: dict[str, nn.Module], size: Size, args: argparse.Namespace) -> dict[str, dict]:
    """Columns of each layer and mode, all of which take turns: times in ms (empty beyond --limit), images/s and MiB."""
    x = _tokens(size, args)
    times_forward = 3 if args.training else 1
    calls = {}
    for name, layer in layers.items():
        if times_forward * args.batch_size * layer.flops(*size) > args.limit * 1e9:
            continue
        for mode in args.modes:
            ready = MODES[mode](layer)
            if ready is not None:
                calls[f"{name}, {mode}"] = partial(_train if args.training else _call, ready, x, size)
    for name, call in calls.items():  # compiles
        say(f"preparing {name}, {size[0]} x {size[1]}")
        call()
    memory = {name: _peak(call, x.device) / 2**20 for name, call in calls.items()}
    seconds = samples(calls, args.rounds, args.warm_up)
    columns = {}
    for name in layers:
        columns[name] = {}
        for mode in args.modes:
            times = sorted(seconds.get(f"{name}, {mode}", []))
            median = statistics.median(times) if times else None
            columns[name] |= {
                f"{mode}_ms": rounded(1e3 * median if times else None, 2),
                f"{mode}_p10": rounded(1e3 * times[len(times) // 10] if times else None, 2),
                f"{mode}_p90": rounded(1e3 * times[9 * len(times) // 10] if times else None, 2),
                f"{mode}_images_per_s": float(f"{args.batch_size / median:.4g}") if times else None,
                f"{mode}_MiB": rounded(memory.get(f"{name}, {mode}"), 1),
            }
    return columns


def _ready(layer: nn.Module, args: argparse.Namespace) -> nn.Module:
    return layer.train(args.training).requires_grad_(args.training).to(args.device, getattr(torch, args.dtype))


def _tokens(size: Size, args: argparse.Namespace) -> Tensor:
    x = torch.randn(args.batch_size, size[0] * size[1], args.dim, device=args.device, dtype=getattr(torch, args.dtype))
    return x.requires_grad_(args.training)


def _parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _call(layer: Callable, x: Tensor, size: Size) -> None:
    layer(x, *size)
    if x.is_cuda:
        torch.cuda.synchronize()


def _train(layer: nn.Module, x: Tensor, size: Size) -> None:
    y = layer(x, *size)
    torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
    if x.is_cuda:
        torch.cuda.synchronize()


def _peak(function: Callable[[], object], device: torch.device) -> int:
    if device.type == "cpu":
        return peak_memory(function)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


PARTS = ["projections", "window_attention", "global_attention", "pooling", "moving_data", "rest"]
OPERATORS = {
    "aten::clone": "moving_data",  # of reshape and contiguous
    "aten::cat": "moving_data",
    "aten::constant_pad_nd": "moving_data",
    "aten::linear": "projections",
    "aten::avg_pool2d": "pooling",
}


def where_time_goes(function: Callable[[], object], args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a call by part: each operator's own time belongs to the innermost operator around it that is in ``OPERATORS``.

    Attention is that in windows where it has as many keys as queries, else global: as many queries as tokens, as many keys as windows.
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


def _modes(row: dict) -> list[str]:
    return [mode for mode in MODES if f"{mode}_ms" in row]


def _fastest(row: dict) -> str | None:
    """The mode in which the layer was fastest, if it was timed."""
    return min((mode for mode in _modes(row) if row[f"{mode}_ms"]), key=lambda mode: row[f"{mode}_ms"], default=None)


SHADES = {"eager": 0.45, "compiled": 1.0}  # of bars


def plot_layers(rows: list[dict], path: Path) -> None:
    """Measured images/s, and how often faster HiLo is: measured and published."""
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

        speeds = {
            "measured here": ([row[f"{_fastest(row)}_images_per_s"] for row in rows], hilo[f"{_fastest(hilo)}_images_per_s"], "ours", "o"),
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
    """Multiply-adds, speed and memory against the side of the map, as the paper draws them."""
    others = [("today", "-", "."), ("paper", "-", "s"), ("second", "-", "^"), ("third", "--", "v"), ("today", ":", "D")]
    names = list(dict.fromkeys(row["layer"] for row in rows))
    rivals = [name for name in names if not name.startswith("HiLo")]
    with figure(path, 3, (12, 4)) as axes:
        for name in names:
            own = [row for row in rows if row["layer"] == name]
            timed = [row for row in own if _fastest(row)]
            colour, line, marker = others[rivals.index(name) % len(others)] if name in rivals else ("ours", "-", "o")
            style = dict(color=COLOURS[colour], linestyle=line, marker=marker, markersize=4, linewidth=1.3)
            if name not in rivals:
                style = dict(
                    color=COLOURS["ours"], linestyle="-" if name == "HiLo" else "--", marker="o", markersize=4, linewidth=2, zorder=3
                )
            axes[0].plot([row["side"] for row in own], [row["GFLOPs"] for row in own], label=name, **style)
            axes[1].plot([row["side"] for row in timed], [row[f"{_fastest(row)}_images_per_s"] for row in timed], **style)
            axes[2].plot([row["side"] for row in timed], [row[f"{_modes(row)[0]}_MiB"] for row in timed], **style)
        for axis, label in zip(axes, ("GFLOPs (multiply-adds)", "images/s in the fastest mode", "peak memory of a call, MiB")):
            axis.set_xscale("log", base=2)
            sides = sorted({row["side"] for row in rows})
            axis.set_xticks(sides, [str(side) for side in sides], rotation=45)
            axis.minorticks_off()
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
            axis.set(xlabel="side of the map, tokens", ylabel=label)
        axes[0].legend(fontsize=8, handlelength=3)


def plot_choice(key: str, rows: list[dict], path: Path) -> None:
    """Multiply-adds, time and memory against HiLo's window or alpha."""
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
    """Time by mode, and by part of the eager forward."""
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
        for part, colour in zip(PARTS, [COLOURS[name] for name in colours] + ["#dddddd"]):
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


EXPERIMENTS = {
    "layers": (over_layers, plot_layers),
    "resolution": (over_resolution, plot_resolution),
    "window": (over_window, partial(plot_choice, "window")),
    "alpha": (over_alpha, partial(plot_choice, "alpha")),
    "case": (over_case, plot_case),
}


if __name__ == "__main__":
    main()
