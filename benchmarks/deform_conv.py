# SPDX-License-Identifier: Apache-2.0
"""Backends of the deformable convolution at the three shapes of LITv2-S, and their share of the model's time.

    python benchmarks/deform_conv.py --batch-size 16 --threads 2
    python benchmarks/deform_conv.py --device cuda --batch-size 64

A plain convolution of the same size is included for comparison. Times are relative to plain PyTorch in float32; memory is the peak that a
call allocates. Lower precision is timed with its backward pass on a GPU only. Writes JSON, CSV and a plot.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import COLOURS, device_name, figure, milliseconds, parser, peak_memory, positive, publish, samples, say, synchronise
from litv2 import litv2_small
from litv2.errors import run_program
from litv2.layers import DeformableTokenMerging
from mm_modules.DCN import onnx_node
from mm_modules.DCN.deform_conv import operator
from mm_modules.dispatch import Backend

SHAPES = ((96, 56), (192, 28), (384, 14))  # channels and side of the input; kernel 2, stride 2, twice the channels
GEOMETRY = (None, (2, 2), (0, 0), (1, 1), None)  # bias, stride, padding, dilation, mask
BASE, PLAIN = "torch", "nn.Conv2d"
FORWARD, TRAINING = "forward", "forward + backward"
ON_GPU = (torch.float32, torch.bfloat16, torch.float16)
Case = tuple[str, str, str]  # backend, pass, dtype


def main() -> None:
    flags = parser(__doc__, "deform_conv")
    flags.add_argument("--batch-size", type=positive, default=16)
    flags.add_argument("--device", type=device_name, default="cpu")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for channels, side in SHAPES:
        say(f"{channels} x {side} x {side}")
        functions = cases(args.batch_size, channels, side, args.device)
        seconds = samples(functions, args.rounds, args.warm_up, device=args.device)
        for (name, kind, dtype), own in seconds.items():
            theirs = statistics.median(seconds[BASE, kind, "float32"])
            row = {"input": f"{channels} x {side} x {side}", "pass": kind, "dtype": dtype, "backend": name, **milliseconds(own)}
            row["times_as_fast"] = round(theirs / statistics.median(own), 1)
            rows.append(row | dict(memory_MiB=round(peak_memory(functions[name, kind, dtype], args.device) / 2**20, 1)))
    share = round(100 * dtm_share(args.rounds, args.warm_up, args.device), 1)
    title = f"deformable convolution, batch {args.batch_size}, medians of {args.rounds} interleaved rounds"
    publish(rows, args.out, title, plot, device=args.device, batch_size=args.batch_size, token_mergings_percent=share)
    print(f"The three token mergings take {share} % of LITv2-S's forward pass (batch 8, 224 x 224, eager float32)")


def cases(batch_size: int, channels: int, side: int, device: str) -> dict[Case, Callable[[], object]]:
    """Returns the functions to time."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(memory_format=torch.channels_last)

    input = random(batch_size, channels, side, side).requires_grad_()
    offset = random(batch_size, 8, side // 2, side // 2).requires_grad_()
    weight = random(2 * channels, channels, 2, 2).requires_grad_()
    gradient = random(batch_size, 2 * channels, side // 2, side // 2)

    def run(function: Callable[..., Tensor], training: bool, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
        tensors = [input.to(dtype), offset, weight.to(dtype)]
        if training:
            return lambda: torch.autograd.grad(function(*tensors), tensors, gradient.to(dtype), allow_unused=True)
        return torch.no_grad()(lambda: function(*tensors))

    def dcn(backend: Backend) -> Callable[..., Tensor]:
        return lambda input, offset, weight: backend.run(input, offset, weight, *GEOMETRY)

    def plain(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(input, weight, stride=2)

    functions: dict[Case, Callable[[], object]] = {}
    both = (FORWARD, TRAINING)
    kinds_of = {torch.float32: both, torch.bfloat16: (FORWARD,)} if device == "cpu" else dict.fromkeys(ON_GPU, both)
    for dtype, kinds in kinds_of.items():
        able = available(input.to(dtype), offset, weight.to(dtype))
        layers = {name: dcn(backend) for name, backend in able.items()} | {PLAIN: plain}
        for kind in kinds:
            for name, layer in layers.items():
                functions[name, kind, str(dtype).removeprefix("torch.")] = run(layer, kind == TRAINING, dtype)
    return functions


def available(*tensors: Tensor) -> dict[str, Backend]:
    """Returns the backends that can compute these tensors and prints why the others cannot."""
    backends = [backend for backend in operator.backends.values() if backend is not onnx_node.BACKEND]  # it computes nothing
    reasons = {backend.name: backend.why_not(*tensors, *GEOMETRY) for backend in backends}
    for name, reason in reasons.items():
        if reason is not None:
            say(f"without {name}, {tensors[0].dtype}: {reason}")
    return {name: operator.backends[name] for name, reason in reasons.items() if reason is None}


@torch.no_grad()
def dtm_share(rounds: int, warm_up: int, device: str) -> float:
    """Returns the median share of the token mergings (deformable convolution, batch norm, GELU) in an eager forward pass."""
    model = litv2_small().eval().to(device, memory_format=torch.channels_last)
    x = torch.randn(8, 3, 224, 224, device=device)
    started, spent = [], []

    def clock() -> float:
        synchronise(device)
        return time.perf_counter()

    for module in model.modules():
        if isinstance(module, DeformableTokenMerging):
            module.register_forward_pre_hook(lambda *_: started.append(clock()))
            module.register_forward_hook(lambda *_: spent.append(clock() - started.pop()))
    shares = []
    for _ in range(warm_up + rounds):
        spent.clear()
        start = clock()
        model(x)
        shares.append(sum(spent) / (clock() - start))
    return statistics.median(shares[warm_up:])


def plot(rows: list[dict], path: Path) -> None:
    """Plots the times in float32, forward and with backward, with a group of bars per input."""
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    names = list(dict.fromkeys(row["backend"] for row in rows))
    width = 0.8 / len(names)
    with figure(path, 2, (10, 4)) as drawings:
        for axes, kind in zip(drawings, (FORWARD, TRAINING)):
            for i, (name, colour) in enumerate(zip(names, itertools.cycle(COLOURS.values()))):
                own = [row["ms"] for row in rows if (row["backend"], row["pass"], row["dtype"]) == (name, kind, "float32")]
                axes.bar([at + (i - (len(names) - 1) / 2) * width for at in range(len(inputs))], own, width, color=colour, label=name)
            axes.set_xticks(range(len(inputs)), inputs)
            axes.set(title=kind, xlabel="input", ylabel="ms", yscale="log")
            axes.grid(False, axis="x")
        drawings[0].legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(run_program(main))
