# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of a block's linear layers: interpreted, against torch; compiled, within their ceilings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import litv2.ops
from gpu_helpers import on_gpu
from helpers import normal
from litv2.ops import triton as room
from litv2.ops.linear import reference
from litv2.ops.triton import add_norm, linear_add, norm_linear, rows
from triton_helpers import CAPABILITIES, Called, Resources, compile_for

SIZES = [(1, 1), (1, 6), (5, 7), (7, 5), (14, 14)]
WIDTHS = [(96, 48), (16, 100), (48, 192), (40, 24), (192, 96)]  # inputs and outputs: one block or two, full or not
EPS = 1e-3  # large enough to be seen
BACKENDS = dict(norm_linear="triton", linear_add="triton", linear_add_norm="triton", add_norm="add_norm")  # that launch these kernels
KERNELS = list(BACKENDS)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def case(H: int, W: int, K: int, N: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, as a part of a wider product's columns and far from 0; weight, bias, residual; a product of the residual's shape, as x is."""
    x, product = ((normal(seed, 2, H, W, width + 8) + 3).to(dtype)[..., 8:] for seed, width in ((1, K), (5, N)))
    return [x, *(tensor.to(dtype) for tensor in (normal(2, N, K) / K**0.5, normal(3, N), 2 + normal(4, 2, H, W, N))), product]


def arguments(name: str, tensors: list[Tensor]) -> tuple:
    x, weight, bias, residual, product = tensors
    each = dict(norm_linear=(x, weight, bias, EPS), linear_add=(x, weight, bias, residual), add_norm=(product, residual, EPS))
    return (*each["linear_add"], EPS) if name == "linear_add_norm" else each[name]


def by_kernel(name: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """What the custom operator of this name returns, whatever a backend would say."""
    results = getattr(torch.ops.litv2, f"triton_{name}")(*arguments(name, tensors))
    return results if isinstance(results, tuple) else (results,)


def written_out(name: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """In float64, without torch's norm and linear layer."""

    def norm(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()

    x, weight, bias, residual, product = (tensor.double() for tensor in tensors)
    if name == "norm_linear":
        return (norm(x) @ weight.mT + bias,)
    y = residual + (product if name == "add_norm" else x @ weight.mT + bias)
    return (y,) if name == "linear_add" else (y, norm(y))


def by_torch(name: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    if name == "add_norm":
        y = tensors[3] + tensors[4]
        return y, F.layer_norm(y, y.shape[-1:], eps=EPS)
    results = getattr(reference, name)(*arguments(name, tensors))
    return results if isinstance(results, tuple) else (results,)


def error(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape and ours.is_contiguous()
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("H, W", SIZES)
def test_against_torch(H, W, name):
    """Rows that fill a program and that do not, in every combination with widths; in bfloat16 the interpreter truncates."""
    for K, N in WIDTHS:
        tensors = case(H, W, K, N)
        for ours, exact in zip(by_kernel(name, tensors), written_out(name, tensors), strict=True):
            assert error(ours, exact) < 1e-6
    tensors = case(H, W, 48, 96, torch.bfloat16)
    for ours, theirs, exact in zip(by_kernel(name, tensors), by_torch(name, tensors), written_out(name, tensors), strict=True):
        assert ours.dtype == torch.bfloat16 and error(ours, exact) <= 4 * error(theirs, exact)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", KERNELS)
def test_the_norm_is_of_what_is_stored(name):
    """And exact where channels differ by little from a large mean."""
    x, weight, bias, residual, product = case(5, 7, 48, 96)
    for tensors in ([x + 300, weight, bias, residual, product + 300], [x, weight, bias, residual + 300, product]):
        for ours, exact in zip(by_kernel(name, tensors), written_out(name, tensors), strict=True):
            assert error(ours, exact) < 2e-5  # what float32 leaves of it; the mean of squares minus the mean's square leaves 1e-2
    if name in ("linear_add_norm", "add_norm"):
        tensors = [tensor.bfloat16() for tensor in tensors]
        y, normed = by_kernel(name, tensors)
        assert error(normed, F.layer_norm(y.double(), (96,), eps=EPS)) < 1e-2 < error(normed, written_out(name, tensors)[1])


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", KERNELS)
def test_memory_formats(name):
    """Maps and weights whose channels do not lie side by side; a batch that is a part of a larger one, or empty."""
    tensors = case(5, 7, 24, 40)
    expected = by_kernel(name, tensors)[-1]
    transposed = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in tensors]
    assert torch.equal(by_kernel(name, transposed)[-1], expected)
    x, weight, bias, residual, product = tensors
    assert torch.equal(by_kernel(name, [x[1:], weight, bias, residual[1:], product[1:]])[-1], expected[1:])
    assert by_kernel(name, [x[:0], weight, bias, residual[:0], product[:0]])[-1].shape == (0, 5, 7, 40)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(name, value):
    tensors = case(5, 7, 48, 96)
    before = by_kernel(name, tensors)
    tensors[0][1, 2, 3, 5] = tensors[4][1, 2, 3, 5] = value
    for ours, old in zip(by_kernel(name, tensors), before, strict=True):
        changed = (ours != old).any(-1)
        assert changed.sum() == 1 and not ours[1, 2, 3].isfinite().all()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("K", "N", "kernel"), [(1536, 384, "add_norm"), (768, 768, "add_norm"), (384, 384, "linear_add_norm")])
def test_long_products_are_a_librarys(K, N, kernel):
    """In the third stage of LITv2-S the second linear layer of the feed-forward network, in the fourth HiLo's last one, too."""
    tensors = case(1, 3, K, N, torch.bfloat16)
    with Called() as called:
        ours = litv2.ops.linear_add_norm(*arguments("linear_add_norm", tensors))
    assert called.names == [kernel]
    for a, b, exact in zip(ours, by_torch("linear_add_norm", tensors), written_out("linear_add_norm", tensors), strict=True):
        assert error(a, exact) <= 4 * error(b, exact)


@pytest.mark.extra
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", KERNELS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.litv2, f"triton_{name}"), arguments(name, case(1, 3, 16, 40)))


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(1, (16, 0)), (16, (16, 0)), (17, (16, 16)), (96, (64, 32)), (128, (128, 0)), (192, (128, 64)), (200, (128, 128)), (384, (256, 128))],
)
def test_blocks(channels, expected):
    assert rows.blocks(channels) == expected


def test_reasons(monkeypatch):
    monkeypatch.setattr(room, "why_not", lambda x: None)  # as on a GPU

    def said(name: str, K: int, N: int, dtype: torch.dtype = torch.float16, **changes: Tensor) -> str:
        names = ("x", "weight", "bias", "residual")
        shapes = (2, 5, 7, K), (N, K), (N,), (2, 5, 7, N)
        tensors = [changes.get(key, torch.empty(1, dtype=dtype).expand(shape)) for key, shape in zip(names, shapes)]
        operator = "linear_add_norm" if name == "add_norm" else name
        return str(getattr(litv2.ops, operator).explain(*arguments(operator, [*tensors, tensors[-1]]))[BACKENDS[name]])

    for name in KERNELS:
        assert said(name, 96, 384) == "None"
        assert said(name, 96, 96, torch.float32) == "it supports float16 and bfloat16, got torch.float32"
        assert said(name, 96, 96, bias=torch.zeros(96)) == "x is torch.float16, but the weights or the residual are not"
        trained = torch.zeros(96, dtype=torch.float16, requires_grad=True)
        assert said(name, 96, 96, bias=trained) == "None"
        with torch.enable_grad():
            assert said(name, 96, 96, bias=trained).startswith("gradients are enabled")
        with torch.autocast("cpu", torch.float16):
            assert said(name, 96, 96).startswith("autocast is enabled")
    large = torch.empty(1, dtype=torch.float16).expand(2**16, 2**8, 2**7, 96)
    assert said("norm_linear", 96, 96, x=large) == "it supports maps of up to 2147483520 cells, got (65536, 256, 128)"
    assert said("norm_linear", 384, 96) == "it supports up to 256 inputs, got 384"
    assert said("linear_add_norm", 96, 768) == "it supports up to 384 outputs, got 768"
    assert said("linear_add", 1536, 384) == "a library's products of more than 512 inputs with more than 256 outputs are faster"
    assert said("linear_add", 768, 192) == "None" == said("linear_add_norm", 384, 384)
    assert said("add_norm", 3072, 768) == "None" and said("add_norm", 96, 4097) == "it supports up to 4096 outputs, got 4097"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert said("add_norm", 3072, 768) == "torch.compile makes one pass of sum and norm by itself"


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_on_a_gpu(name, dtype):
    """At the sizes of LITv2-S and B, as it is and in generated code."""
    widths = dict(norm_linear=[(96, 384), (192, 768), (256, 1024)], linear_add=[(384, 96), (768, 192), (1024, 256)])
    for K, N in widths.get(name, [(384, 384), (40, 24)]):
        tensors = [tensor.cuda() for tensor in case(14, 28, K, N, dtype)]
        ours, compiled = by_kernel(name, tensors), torch.compile(by_kernel)(name, tensors)
        exact = written_out(name, tensors)
        for a, b, c, d in zip(ours, by_torch(name, tensors), exact, compiled, strict=True):
            assert error(a, c) <= 2 * error(b, c) and torch.equal(a, d)


SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program can have
TYPES = dict.fromkeys(("x", "weight", "bias", "residual", "y", "normed"), "float16") | dict(rows="i32", eps="fp32")
COMPILED = [  # kernel, tile, registers on any of the GPUs
    (norm_linear, dict(norm_linear.tile(192), N=768), 136),
    (linear_add, dict(linear_add.tile(192), K=768, NORM=False), 216),
    (linear_add, dict(linear_add.tile(384), K=384, NORM=True), 128),
]


OF_BASE = [  # LITv2-B's second stage
    (norm_linear, dict(norm_linear.tile(256), N=1024), 112, 86),
    (linear_add, dict(linear_add.tile(256), K=1024, NORM=False), 184, 100),
]


def compiled(kernel, sizes: dict[str, int], capability: int) -> Resources:
    types = {name: kind for name, kind in TYPES.items() if name in kernel.arg_names}
    options = {name: sizes[name] for name in ("num_warps", "num_stages")}
    return compile_for(kernel, types, {name: size for name, size in sizes.items() if name not in options}, capability, **options)


@pytest.mark.extra
@pytest.mark.parametrize(
    ("module", "sizes", "registers", "capability"), [*((*each, capability) for each in COMPILED for capability in CAPABILITIES), *OF_BASE]
)
def test_machine_code(module, sizes, registers, capability):
    """float16: two programs' registers fit, or one's with its stages; 8 values at once to and from memory; nothing spilled."""
    found = compiled(module.forward_kernel, sizes, capability)
    assert found.stack == 0 and found.registers <= registers
    assert found.shared <= SHARED[capability] << 10
    assert found.count("STG.E.128") and not found.count("STG.E.U16") and found.count("LDG.E.U16") <= 1  # a thread's part of the bias
    copies = found.count(r"LDGSTS[.\w]*")  # of 8 values; where 512 threads share few of x, of 4
    assert found.count(r"LDGSTS[.\w]*128[.\w]*") > copies / 2 and found.count(r"LDGSTS[.\w]*(128|64)[.\w]*") == copies
    assert found.count(r"(H|HG|UTCH)MMA[.\w]*")


@pytest.mark.extra
@pytest.mark.parametrize(("channels", "capability"), [*((768, capability) for capability in CAPABILITIES), (384, 86), (1024, 90)])
def test_machine_code_of_the_sum_and_the_norm(channels, capability):
    """float16: all of a multiprocessor's threads fit, and every access to memory is one of 8 values."""
    found = compiled(add_norm.forward_kernel, add_norm.tile(channels), capability)
    assert found.stack == 0 and found.registers <= 64
    for access in ("LDG", "STG"):
        assert found.count(rf"{access}\.E\.128[.\w]*") == found.count(rf"{access}[.\w]*") > 0
