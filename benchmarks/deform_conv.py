"""Backends of the deformable convolution at the three shapes of LITv2-S, forward and backward.

python benchmarks/deform_conv.py --batch-size 16 --threads 2
"""

from __future__ import annotations

import argparse

import torch

from harness import interleaved, table
from mm_modules.DCN import backend_torch, backend_torchvision

SHAPES = ((96, 56), (192, 28), (384, 14))  # channels and side of the input; kernel 2, stride 2, twice the channels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for channels, side in SHAPES:
        input = torch.randn(args.batch_size, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
        offset = torch.randn(args.batch_size, 8, side // 2, side // 2).requires_grad_()
        weight = torch.randn(2 * channels, channels, 2, 2).requires_grad_()

        def forward(backend, input=input, offset=offset, weight=weight):
            return backend.deform_conv2d(input, offset, weight, None, (2, 2), (0, 0), (1, 1), None)

        def inference(backend, forward=forward):
            with torch.no_grad():
                forward(backend)

        functions = {
            "torchvision": lambda inference=inference: inference(backend_torchvision),
            "torch": lambda inference=inference: inference(backend_torch),
            "torchvision, training": lambda forward=forward: forward(backend_torchvision).sum().backward(),
            "torch, training": lambda forward=forward: forward(backend_torch).sum().backward(),
        }
        seconds = interleaved(functions, args.rounds, warm_up=1)
        for suffix in ("", ", training"):
            a, b = seconds["torchvision" + suffix], seconds["torch" + suffix]
            name = "forward + backward" if suffix else "forward"
            rows.append([f"{channels} x {side} x {side}", name, f"{1e3 * a:.1f}", f"{1e3 * b:.1f}", f"{a / b:.1f}"])
    print(f"float32, batch {args.batch_size}, {args.threads} threads, torch {torch.__version__}")
    print(table(["input", "", "torchvision ms", "PyTorch version ms", "times as fast"], rows))


if __name__ == "__main__":
    main()
