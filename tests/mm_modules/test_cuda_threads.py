# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the CUDA kernels, threads.h, run on the CPU: every thread of a launch in turn (threads.cpp), against plain PyTorch.

What only a GPU can show (the launches, the order of atomic additions, the shuffles of a warp) is left to the tests marked ``gpu``.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import max_difference
from mm_modules import build
from mm_modules.DCN import reference

CSRC = build.ROOT / "mm_modules/DCN/csrc"
# Type and vector, as threads.cpp has them: those of 128 bits, and single channels with 64-bit indices.
VARIANTS = ["float64_2", "float64_1", "float32_4", "float16_8", "bfloat16_8", "bfloat16_1"]


@pytest.fixture(scope="module")
def threads(tmp_path_factory):
    """threads.cpp, compiled."""
    if problem := build.why_not():
        pytest.skip(problem)
    library = tmp_path_factory.mktemp("threads") / "threads.so"
    headers = Path(torch.__file__).parent / "include"
    source = Path(__file__).with_name("threads.cpp")
    command = [*build._compiler(), "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{CSRC}", f"-I{headers}", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def number(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


class Convolution:
    """What deform_conv.cpp and kernels_cuda.cu do with the kernels: chunks, matrix products (here in float64), sorting."""

    def __init__(self, threads, variant: str, input, offset, weight, mask, stride, padding, dilation):
        name, V = variant.split("_")
        self.threads, self.variant, self.V = threads, variant, int(V)
        self.dtype, self.sums = getattr(torch, name), torch.promote_types(getattr(torch, name), torch.float32)
        self.pixels = input.permute(0, 2, 3, 1).contiguous()
        self.offset, self.mask = offset, mask
        B, C, H, W = input.shape
        O, C_per_group, kh, kw = weight.shape
        Ho, Wo = offset.shape[2:]
        self.groups, self.offset_groups, self.taps = C // C_per_group, offset.shape[1] // (2 * kh * kw), kh * kw
        self.positions, self.per_image, self.shape = B * Ho * Wo, Ho * Wo, (B, Ho, Wo)
        self.matrices = weight.permute(0, 2, 3, 1).reshape(self.groups, O // self.groups, -1).double()
        blocks = math.lcm(self.groups, self.offset_groups)
        fields = [B, C, H, W, Ho, Wo, kh, kw, *stride, *padding, *dilation, self.groups, self.offset_groups, blocks]
        fields += [*offset.stride(), *(mask.stride() if mask is not None else (0, 0, 0, 0))]
        self.fields = (ctypes.c_int64 * len(fields))(*fields)

    def chunks(self):
        """Two, that meet within an image."""
        half = self.positions // 2 + 1
        return [(0, half), (half, self.positions - half)]

    def run(self, kernel: str, first: int, count: int, *arguments) -> None:
        arguments = [number(x) if isinstance(x, int) else address(x) for x in arguments]
        getattr(self.threads, f"{kernel}_{self.variant}")(self.fields, number(first), number(count), *arguments)

    def forward(self) -> Tensor:
        outputs = []
        for first, count in self.chunks():
            columns = torch.full((self.groups, count, self.matrices.shape[-1]), math.nan, dtype=self.dtype)
            self.run("gather", first, count, self.pixels, self.offset, self.mask, columns)
            outputs.append((columns.double() @ self.matrices.mT).movedim(0, 1).flatten(1))
        return torch.cat(outputs).view(*self.shape, -1).permute(0, 3, 1, 2)

    def backward(self, gradient: Tensor, deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of input, offset and mask."""
        rows = gradient.permute(0, 2, 3, 1).reshape(self.positions, self.groups, -1).double()
        parts = math.lcm(self.groups, self.offset_groups) // self.offset_groups
        input = torch.zeros(self.pixels.shape, dtype=self.sums)
        offset = torch.full((parts, *self.shape, 2 * self.offset_groups * self.taps), math.inf, dtype=self.sums)
        mask = torch.full((parts, *self.shape, self.offset_groups * self.taps), math.inf, dtype=self.sums)
        for first, count in self.chunks():
            columns = (rows[first : first + count].movedim(1, 0) @ self.matrices).to(self.dtype).contiguous()
            if deterministic:
                self.collect(first, count, columns, input)
            added = None if deterministic else input
            self.run("scatter", first, count, columns, self.pixels, self.offset, self.mask, added, offset, mask)
        return tuple(x.permute(0, 3, 1, 2) for x in (input, offset.sum(0), mask.sum(0)))

    def collect(self, first: int, count: int, columns: Tensor, input: Tensor) -> None:
        first_image, last_image = first // self.per_image, (first + count - 1) // self.per_image
        pixels = (last_image - first_image + 1) * self.pixels.shape[1] * self.pixels.shape[2]
        nowhere = pixels * self.offset_groups
        entries = torch.full((4 * count * self.taps * self.offset_groups,), -1, dtype=torch.int64 if self.V == 1 else torch.int32)
        self.run("list", first, count, first_image, nowhere, self.offset, entries)
        entries, order = entries.sort(stable=True)
        starts = torch.searchsorted(entries, torch.arange(nowhere + 1, dtype=entries.dtype))
        self.run("collect", first, count, first_image, pixels, starts, order, self.offset, self.mask, columns, input)


# H and W differ, in both directions; where a block's channels are a multiple of 8, all variants can run.
CASES = [
    dict(B=3, C=24, H=10, W=6, kernel=(2, 2), stride=(2, 2)),  # token merging
    dict(B=2, C=16, H=5, W=9, kernel=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, offset_groups=1),
    dict(B=1, C=32, H=9, W=4, kernel=(1, 3), padding=(0, 1), groups=2, offset_groups=4, masked=True),
    dict(B=2, C=264, H=3, W=7, kernel=(2, 2), stride=(2, 2), masked=True),  # more vectors than lanes
    dict(B=2, C=5, H=7, W=4, kernel=(2, 3), padding=(1, 0), masked=True),  # single channels only
    dict(B=1, C=3, H=4, W=8, kernel=(2, 2), stride=(2, 2), groups=3, offset_groups=3),
]


def applicable():
    for variant in VARIANTS:
        for case in CASES:
            block = case["C"] // math.lcm(case.get("groups", 1), case.get("offset_groups", 1))
            if block % int(variant.split("_")[1]) == 0:
                yield variant, case


def make(threads, variant, B, C, H, W, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, offset_groups=1, masked=False):
    """The convolution, and its arguments in float64 for the reference. Some offsets are wild, and those of the first sample are NaN."""
    torch.manual_seed(B * H + W)
    dtype = getattr(torch, variant.split("_")[0])
    position = torch.promote_types(dtype, torch.float32)
    Ho, Wo = ((size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i, size in enumerate((H, W)))
    samples = offset_groups * kernel[0] * kernel[1]
    input, weight = torch.randn(B, C, H, W).to(dtype), torch.randn(4 * groups, C // groups, *kernel).to(dtype)
    offset = (torch.randn(B, 2 * samples, Ho, Wo) * 2).to(position)
    wild = torch.tensor([math.inf, -math.inf, 1e30, -1e9, 3e9, -1.0])
    places = torch.randperm(offset.numel())[: offset.numel() // 10]
    offset.view(-1)[places] = wild[torch.arange(len(places)) % len(wild)].to(position)
    offset[0, :2, 0, 0] = torch.tensor([0.5, math.nan])
    if B > 1:
        offset = offset.contiguous(memory_format=torch.channels_last)
    mask = torch.rand(B, samples, Ho, Wo).to(position) if masked else None
    convolution = Convolution(threads, variant, input, offset, weight, mask, stride, padding, dilation)
    exact = [None if x is None else x.double() for x in (input, offset, weight, mask)]
    return convolution, exact, (stride, padding, dilation)


def tolerance(variant: str, exact: Tensor) -> float:
    return 8 * torch.finfo(getattr(torch, variant.split("_")[0])).eps * exact.abs().nan_to_num(0).max().item()


@pytest.mark.parametrize("variant, case", applicable(), ids=str)
def test_gather(threads, variant, case):
    convolution, (input, offset, weight, mask), geometry = make(threads, variant, **case)
    expected = reference.deform_conv2d(input, offset, weight, None, *geometry, mask)
    out = convolution.forward()
    assert expected.isnan().any() and torch.equal(out.isnan(), expected.isnan())
    assert max_difference(out.nan_to_num(0), expected.nan_to_num(0)) <= tolerance(variant, expected)


@pytest.mark.parametrize("deterministic", [False, True], ids=["scatter", "collect"])
@pytest.mark.parametrize("variant, case", applicable(), ids=str)
def test_gradients(threads, variant, case, deterministic):
    """A NaN sample adds to no pixel, as one outside; its own gradients are NaN."""
    convolution, (input, offset, weight, mask), geometry = make(threads, variant, **case)
    nan = offset.isnan()
    outside = torch.where(nan, 1e6, offset)
    mask = torch.ones_like(offset[:, ::2]) if mask is None else mask
    tensors = [x.requires_grad_() for x in (input, outside, mask)]
    out = reference.deform_conv2d(input, outside, weight, None, *geometry, mask)
    seed = torch.randn_like(out).to(getattr(torch, variant.split("_")[0]))
    expected = torch.autograd.grad(out, tensors, seed.double())
    ours = convolution.backward(seed, deterministic)
    assert ours[1][0, :2, 0, 0].isnan().all() and ours[2][0, 0, 0, 0].isnan()
    for a, b, nans in zip(ours, expected, (0, 2, 1)):
        assert a.isnan().sum() == nans
        assert max_difference(a.nan_to_num(0), b) <= tolerance(variant, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_infinite_gradient_outside(threads, variant):
    """A gradient that has overflowed, of samples that read nothing, is nobody's: 0 * infinity would be NaN."""
    convolution, (input, offset, *_), _ = make(threads, variant, **CASES[0])
    convolution.offset.fill_(1e6)
    convolution.matrices.abs_()
    seed = torch.full((*offset.shape[:1], convolution.matrices.shape[1], *offset.shape[2:]), math.inf)
    for deterministic in (False, True):
        assert all((gradient == 0).all() for gradient in convolution.backward(seed, deterministic))


def test_division(threads):
    """Every small divisor, the largest ones and powers of two with their neighbours, of the numbers where a rounding would show."""
    top = 2**31 - 1
    divisors = {*range(1, 300), *(2**n + d for n in range(2, 30) for d in (-1, 0, 1)), 2**30, top // 3, top // 7}
    multiples = [(m * d, d) for d in sorted(divisors) for m in {1, 2, top // d // 2, top // d}]
    pairs = [(n, d) for multiple, d in multiples for n in (multiple - 1, multiple, multiple + d - 1) if 0 <= n <= top]
    a, b = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
    random = torch.randint(0, top, (100_000,), dtype=torch.int32)
    a, b = torch.cat((a, random)), torch.cat((b, random.flip(0) % 2**30 + 1))
    quotient, remainder = torch.empty_like(a), torch.empty_like(a)
    threads.divide_all(address(a), address(b), number(len(a)), address(quotient), address(remainder))
    assert torch.equal(quotient, a // b) and torch.equal(remainder, a % b)


@pytest.mark.parametrize(
    "change, small",
    [
        (dict(), True),
        (dict(B=3566), True),
        (dict(B=3567), False),  # 3567 * 56 * 56 * 96 is more than 2^30
        (dict(offset=(2**30, 1, 1, 1), B=2), False),  # a slice of something larger
        (dict(offset=(1, 2**28, 1, 1)), False),  # 8 channels
        (dict(mask=(1, 1, 2**26, 1)), False),
        (dict(padding=2**29), False),
        (dict(count=2**22), False),  # 2^22 positions of 4 taps of 96 channels
        (dict(C=2, count=2**26 - 1), True),
        (dict(C=2, count=2**26), False),  # 2^26 positions of 4 taps of 4 corners
    ],
    ids=str,
)
def test_sizes_of_32_bits(threads, change, small):
    given = dict(B=64, C=96, offset=(8, 1, 1, 1), mask=(0, 0, 0, 0), padding=0, count=784) | change
    p = given["padding"]
    fields = [given["B"], given["C"], 56, 56, 28, 28, 2, 2, 2, 2, p, p, 1, 1, 1, 1, 1, *given["offset"], *given["mask"]]
    threads.is_small_geometry.restype = ctypes.c_bool
    assert threads.is_small_geometry((ctypes.c_int64 * len(fields))(*fields), number(given["count"])) == small


def test_fast_math_is_refused():
    """Without NaN the kernels would read anywhere."""
    if problem := build.why_not():
        pytest.skip(problem)
    headers = Path(torch.__file__).parent / "include"
    command = [*build._compiler(), "-std=c++20", "-E", f"-I{headers}", str(CSRC / "sample.h")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    done = subprocess.run([*command, "-ffast-math"], capture_output=True, text=True)
    assert done.returncode != 0 and "compile the deformable convolution without -ffast-math" in done.stderr
