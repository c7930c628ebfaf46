"""Backends of the deformable convolution at the three shapes of LITv2-S, and their share of the model's time.

python benchmarks/deform_conv.py --batch-size 16 --threads 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import interleaved, peak_memory, positive, table
from litv2 import litv2_small
from litv2.layers import DeformableTokenMerging
from mm_modules.DCN import compiled, reference, vision

SHAPES = ((96, 56), (192, 28), (384, 14))  # channels and side of the input; kernel 2, stride 2, twice the channels
BACKENDS = {"torchvision": vision, "torch": reference, "compiled": compiled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if compiled.problem:
        parser.error(f"the compiled backend is {compiled.problem}")

    times, memory = [], []
    for channels, side in SHAPES:
        functions = cases(args.batch_size, channels, side)
        seconds = interleaved(functions, args.rounds, warm_up=2)
        for name, own in seconds.items():
            kind = name.split(", ")[1]
            reference = seconds["torchvision, " + kind.replace("bfloat16", "float32")]
            times.append([f"{channels} x {side} x {side}", name, f"{1e3 * own:.1f}", f"{reference / own:.1f}"])
        for kind in ("forward float32", "forward + backward float32"):
            peaks = {name: peak_memory(functions[f"{name}, {kind}"]) for name in BACKENDS}
            memory.append([f"{channels} x {side} x {side}", kind] + [f"{peak / 2**20:.0f}" for peak in peaks.values()])

    print(f"batch {args.batch_size}, {args.threads} threads, torch {torch.__version__}, medians of {args.rounds} interleaved rounds")
    print(table(["input", "", "ms", "times as fast as torchvision float32"], times))
    print("\nPeak of the memory allocated in the call, MiB")
    print(table(["input", "", *BACKENDS], memory))
    print(f"\nThe three DTMs take {100 * dtm_share(args.rounds):.1f} % of LITv2-S's forward pass (batch 8, 224 x 224, eager float32)")


def cases(batch_size: int, channels: int, side: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name: "backend, pass dtype"."""
    input = torch.randn(batch_size, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
    offset = torch.randn(batch_size, 8, side // 2, side // 2).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(2 * channels, channels, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(batch_size, 2 * channels, side // 2, side // 2).to(memory_format=torch.channels_last)

    def run(function: Callable[..., Tensor], training: bool, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
        tensors = [input.to(dtype), offset, weight.to(dtype)]
        if training:
            return lambda: torch.autograd.grad(function(*tensors), tensors, gradient, allow_unused=True)
        return torch.no_grad()(lambda: function(*tensors))

    def dcn(backend) -> Callable[..., Tensor]:
        return lambda input, offset, weight: backend.deform_conv2d(input, offset, weight, None, (2, 2), (0, 0), (1, 1), None)

    def plain(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(input, weight, stride=2)

    functions = {f"{name}, forward float32": run(dcn(backend), False) for name, backend in BACKENDS.items()}
    functions["nn.Conv2d, forward float32"] = run(plain, False)
    functions |= {f"{name}, forward + backward float32": run(dcn(backend), True) for name, backend in BACKENDS.items()}
    functions["nn.Conv2d, forward + backward float32"] = run(plain, True)
    functions["torch, forward bfloat16"] = run(dcn(reference), False, torch.bfloat16)
    functions["compiled, forward bfloat16"] = run(dcn(compiled), False, torch.bfloat16)
    functions["nn.Conv2d, forward bfloat16"] = run(plain, False, torch.bfloat16)
    return functions


@torch.no_grad()
def dtm_share(rounds: int) -> float:
    """Median share of the token mergings, deformable convolution, batch norm and GELU, in an eager forward pass."""
    model = litv2_small().eval().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 224, 224)
    started, spent = [], []
    for module in model.modules():
        if isinstance(module, DeformableTokenMerging):
            module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
            module.register_forward_hook(lambda *_: spent.append(time.perf_counter() - started.pop()))
    shares = []
    for _ in range(2 + rounds):
        spent.clear()
        start = time.perf_counter()
        model(x)
        shares.append(sum(spent) / (time.perf_counter() - start))
    return sorted(shares[2:])[rounds // 2]


if __name__ == "__main__":
    main()
