# SPDX-License-Identifier: Apache-2.0
"""python -m mm_modules.DCN: lists which backends of the deformable convolution work on this machine and how fast they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .deform_conv import operator

SHAPE = (2, 96, 56, 56)  # LITv2-S's first token merging on two 224 x 224 images
CHANNELS, KERNEL = 192, 2
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16, torch.float16]}
WARM_UP, ROUNDS = 3, 7


def main() -> None:
    print(f"torch {torch.__version__}")
    print(f"Forward and forward + backward of a {KERNEL} x {KERNEL} kernel, {SHAPE} -> {CHANNELS} channels")
    cases = [(device, dtype) for device, dtypes in DTYPES.items() for dtype in dtypes if device == "cpu" or torch.cuda.is_available()]
    for device, dtype in cases:
        arguments, kind = _arguments(device, dtype), str(dtype).removeprefix("torch.")
        used = operator.choose(*arguments)
        for backend in operator.backends.values():
            reason = backend.why_not(*arguments)
            if backend.name == "onnx" or reason is not None:
                print(f"  {device:5} {backend.name:12} {kind:9} {reason or backend.why_rather_not(*arguments)}")
                continue
            forward, training = (1e3 * seconds for seconds in _time(backend.run, arguments))
            ending = "  <- used" if backend is used else ""
            print(f"  {device:5} {backend.name:12} {kind:9} {forward:9.2f} ms {training:9.2f} ms{ending}")


def _arguments(device: str, dtype: torch.dtype) -> tuple:
    (B, C, H, W), k = SHAPE, KERNEL
    input = torch.randn(SHAPE, device=device, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    offset = torch.randn(B, 2 * k**2, H // 2, W // 2, device=device, requires_grad=True)
    weight = torch.randn(CHANNELS, C, k, k, device=device, dtype=dtype, requires_grad=True)
    return input, offset, weight, None, (2, 2), (0, 0), (1, 1), None


def _time(function: Callable[..., Tensor], arguments: tuple) -> tuple[float, float]:
    """Returns the median seconds of forward, and of forward + backward."""

    def call() -> Tensor:
        return function(*arguments)

    def clock() -> float:
        if arguments[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def median(call: Callable[[], object]) -> float:
        times = []
        for _ in range(WARM_UP + ROUNDS):
            start = clock()
            call()
            times.append(clock() - start)
        return statistics.median(times[WARM_UP:])

    return median(torch.no_grad()(call)), median(lambda: call().sum().backward())


if __name__ == "__main__":
    main()
