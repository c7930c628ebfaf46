"""python -m mm_modules.DCN: which backends of the deformable convolution work here, and how fast each is."""

from __future__ import annotations

import statistics
import time

import torch

from .deform_conv import BACKENDS, backend, choose_backend

SHAPE = (2, 96, 56, 56)  # LITv2-S's first token merging on two 224 x 224 images
CHANNELS, KERNEL = 192, 2


def main() -> None:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    print(f"torch {torch.__version__}, LITV2_DCN_BACKEND={backend}")
    print(f"Forward and forward + backward of a {KERNEL} x {KERNEL} kernel, {SHAPE} -> {CHANNELS} channels, float32")
    for device in devices:
        for name, module in BACKENDS.items():
            input = torch.randn(SHAPE, device=device).to(memory_format=torch.channels_last).requires_grad_()
            if not module.supports(input):
                print(f"  {device:5} {name:12} {module.problem or 'has no kernel for this device'}")
                continue
            used = "  <- used" if choose_backend(input) is module.deform_conv2d else ""
            forward, training = (1e3 * seconds for seconds in _time(module.deform_conv2d, input))
            print(f"  {device:5} {name:12} {forward:8.1f} ms {training:8.1f} ms{used}")


def _time(function, input: torch.Tensor) -> tuple[float, float]:
    """Median seconds of forward, and of forward + backward."""
    B, C, H, W = input.shape
    offset = torch.randn(B, 2 * KERNEL**2, H // 2, W // 2, device=input.device, requires_grad=True)
    weight = torch.randn(CHANNELS, C, KERNEL, KERNEL, device=input.device, requires_grad=True)

    def call():
        return function(input, offset, weight, None, (2, 2), (0, 0), (1, 1), None)

    def clock() -> float:
        if input.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def median(call) -> float:
        times = []
        for _ in range(5):
            start = clock()
            call()
            times.append(clock() - start)
        return statistics.median(times[1:])

    return median(torch.no_grad()(call)), median(lambda: call().sum().backward())


if __name__ == "__main__":
    main()
