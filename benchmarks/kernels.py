# SPDX-License-Identifier: Apache-2.0
"""The kernels of the network's operators beside what torch.compile makes of the same operator, at the sizes of LITv2-S.

    python benchmarks/kernels.py --device cuda --batch-size 64 --dtype float16
    python benchmarks/kernels.py --batch-size 8    # the native operators of a CPU

A kernel is worth having on a GPU where it is a fifth faster than "torch.compile" here, or where the whole model is a twentieth faster with
it. On a GPU all are timed in CUDA graphs, without the time that Python takes to launch them. Backends that cannot compute a case, or that
the operator would not choose, are left out, saying why. ``times_as_fast`` is relative to "torch.compile". Writes JSON and CSV.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

from harness import device_name, event_samples, milliseconds, parser, positive, publish, rounded, say
from hilo import HiLo
from litv2.errors import run_program
from litv2.layers import DeformableTokenMerging, DepthwiseConv, PatchEmbed
from litv2.ops import OPERATORS, triton
from runtime_modes import captured

COMPILED = "torch.compile"
PASSES = ("forward", "forward + backward")
INFERENCE = (  # kernels without gradients
    "hilo_attention", "linear_add", "linear_add_norm", "norm_linear", "patch_embed", "pooled_attention", "pooled_linear", "token_merging",
)  # fmt: skip
STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))  # side and width of LITv2-S's maps
Case = tuple[str, str, tuple]  # operator, description, arguments


def cases(batch_size: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    images = torch.randn(batch_size, 3, 224, 224, device=device, dtype=dtype)
    yield "patch_embed", "224 x 224 x 3", (images, PatchEmbed(3, 96, 4).to(device, dtype))
    for side, dim in STAGES:
        x = torch.randn(batch_size, side, side, 4 * dim, device=device, dtype=dtype, requires_grad=True)
        conv = DepthwiseConv(4 * dim).dwconv.to(device, dtype)
        yield "depthwise_gelu", f"{side} x {side} x {4 * dim}", (x, conv)
    normal = partial(torch.randn, device=device, dtype=dtype)
    for side, dim in STAGES[:2]:
        x, hidden = normal(batch_size, side, side, dim), normal(batch_size, side, side, 4 * dim)
        yield "norm_linear", f"{side} x {side}, {dim} -> {4 * dim}", (x, normal(4 * dim, dim), normal(4 * dim), 1e-5)
        yield "linear_add", f"{side} x {side}, {4 * dim} -> {dim}", (hidden, normal(dim, 4 * dim), normal(dim), x)
    for (side, dim), inputs in ((STAGES[2], 1), (STAGES[2], 4), (STAGES[3], 1), (STAGES[3], 4)):  # inputs in units of dim
        x, y = normal(batch_size, side, side, inputs * dim), normal(batch_size, side, side, dim)
        yield "linear_add_norm", f"{side} x {side}, {inputs * dim} -> {dim}", (x, normal(dim, inputs * dim), normal(dim), y, 1e-5)
    for side, dim in STAGES[:-1]:
        x = torch.randn(batch_size, side, side, dim, device=device, dtype=dtype)
        yield "token_merging", f"{side} x {side} x {dim}", (x, DeformableTokenMerging(dim, 2 * dim).eval().to(device, dtype))
    side, dim = STAGES[2]
    x = torch.randn(batch_size, side, side, dim, device=device, dtype=dtype, requires_grad=True)
    attn = HiLo(dim, 12, qkv_bias=True, alpha=0.9).to(device, dtype)
    yield "attention", f"{side} x {side} x {dim}", (x, attn)
    for s in (2, 4):
        product = torch.randn(batch_size, side, side, 192, device=device, dtype=dtype, requires_grad=True)
        yield "window_attention", f"{side} x {side}, 2 heads, windows {s} x {s}", (product, product.new_zeros(192), s, 2, attn.scale)
    qkv, q = torch.randn(batch_size, side, side, 512, device=device, dtype=dtype).split((192, 320), dim=-1)  # as in the folded form
    kv = torch.randn(batch_size, side // 2, side // 2, 640, device=device, dtype=dtype)
    yield "pooled_attention", f"{side} x {side}, 10 heads, pooled 2 x 2", (q, kv, 10, attn.scale)
    weight, bias = attn.l_kv.weight.detach(), attn.l_kv.bias.detach()
    yield "pooled_linear", f"{side} x {side} x {dim}, pooled 2 x 2", (x.detach(), 2, weight, bias, torch.zeros_like(bias))
    both = qkv, qkv.new_zeros(192), q, kv, 2, 2, 10, attn.scale
    yield "hilo_attention", f"{side} x {side}, 2 heads in windows 2 x 2, 10 to the map pooled 2 x 2", both


def main() -> None:
    flags = parser(__doc__, "kernels")
    flags.add_argument("--batch-size", type=positive, default=64)
    flags.add_argument("--device", type=device_name, default="cpu")
    flags.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name, description, arguments in cases(args.batch_size, args.device, getattr(torch, args.dtype)):
        say(f"{name}, {description}")
        for kind in PASSES[: 1 if name in INFERENCE else 2]:
            functions = {form: timed(run, arguments, kind) for form, run in forms(name, arguments, kind).items()}
            if args.device != "cpu":  # launched by Python, the smaller ones would take as long as Python does
                functions = {form: captured(run) for form, run in functions.items()}
            seconds = event_samples(functions, args.rounds, args.warm_up, args.device)
            compiled = statistics.median(seconds[COMPILED])
            for form, own in seconds.items():
                row = {"operator": name, "input": description, "pass": kind, "form": form, **milliseconds(own, 4)}
                rows.append(row | dict(times_as_fast=rounded(compiled / statistics.median(own), 2)))
    title = f"kernels in {args.dtype}, batch {args.batch_size}, medians of {args.rounds} interleaved rounds"
    publish(rows, args.out, title, device=args.device, batch_size=args.batch_size, dtype=args.dtype)


def forms(name: str, arguments: tuple, kind: str) -> dict[str, Callable[..., Tensor]]:
    """The backends that the operator might choose, and what torch.compile makes of it. What is left out is said in the forward pass."""
    operator = OPERATORS[name]
    with torch.set_grad_enabled(kind != PASSES[0]):
        reasons = operator.explain(*arguments)
    for backend, reason in reasons.items():
        if reason and kind == PASSES[0]:
            say(f"without {backend}: {reason}")
    able = {backend: operator.backends[backend].run for backend, reason in reasons.items() if not reason}
    torch._dynamo.reset()
    compiled = torch.compile(lambda *arguments: operator(*arguments), dynamic=False)

    def without_triton(*arguments) -> Tensor:
        with patch.object(triton, "problem", "the compiled form is made without it"):
            return compiled(*arguments)

    return able | {COMPILED: without_triton}


def timed(run: Callable[..., Tensor], arguments: tuple, kind: str) -> Callable[[], object]:
    if kind == PASSES[0]:
        return torch.no_grad()(partial(run, *arguments))
    leaves = [each for each in arguments if isinstance(each, Tensor) and each.requires_grad]
    leaves += [p for each in arguments if isinstance(each, nn.Module) for p in each.parameters()]
    with torch.no_grad():
        gradient = torch.randn_like(run(*arguments))
    return lambda: torch.autograd.grad(run(*arguments), leaves, gradient)


if __name__ == "__main__":
    sys.exit(run_program(main))
