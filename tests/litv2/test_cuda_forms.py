# SPDX-License-Identifier: Apache-2.0
"""The forms of ``litv2.optimize`` on a CUDA device; without one, what they say of it."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gpu_helpers import on_gpu
from helpers import assert_as_precise, fill, max_difference, normal, tiny_model
from hilo import HiLo
from litv2 import fuse, optimize
from litv2.inference.cuda_graph import CudaGraph
from litv2.inference.fastest import make_form, why_not
from litv2.ops import use
from litv2.ops.windows import reference as windows
from mm_modules.DCN import compiled as deform_conv
from mm_modules.DCN.modules import _of_patches

ON_CUDA = ["compiled", "graph", "fused"]


@pytest.fixture(autouse=True)
def exact_products():
    """Without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def needs(form: str, images: Tensor) -> None:
    if reason := why_not(form, images):
        pytest.skip(f"{form}: {reason}")


@torch.no_grad()
def results(model, images: Tensor, dtype: torch.dtype) -> Tensor:
    return copy.deepcopy(model).to(images.device, dtype).eval()(images.to(dtype))


@on_gpu
@pytest.mark.parametrize("form", ON_CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_same_numbers(form, dtype):
    """At the example's shape and at others, odd ones included."""
    model, example = tiny_model(), normal(0, 2, 3, 64, 96).cuda()
    needs(form, example)
    fast = optimize(model, example, dtype, [form], report=None)  # the model is on the CPU
    assert (fast.form, fast.compute_dtype) == (form, dtype)
    for shape in ((2, 3, 64, 96), (2, 3, 96, 64), (3, 3, 65, 111)):
        images = normal(1, *shape).cuda()
        ours, exact = fast(images.to(dtype)), results(model, images, torch.float64)
        assert ours.dtype == dtype and ours.is_cuda
        if dtype == torch.float32:
            assert max_difference(ours, exact) < 1e-4 * exact.abs().max()
        else:
            assert_as_precise(ours, results(model, images, dtype), exact)


@on_gpu
@pytest.mark.parametrize("form", ON_CUDA)
def test_results_are_not_overwritten(form):
    model, images = tiny_model().cuda(), [normal(i, 2, 3, 64, 64).cuda() for i in range(4)]
    needs(form, images[0])
    fast = make_form(model, form, torch.float32)
    kept = [fast(x) for x in images]
    for ours, x in zip(kept, images):
        assert max_difference(ours, results(model, x, torch.float64)) < 1e-3


@on_gpu
def test_a_graph_serves_several_threads_and_streams():
    model, images = tiny_model().cuda(), [normal(i, 2, 3, 64, 64).cuda() for i in range(4)]
    needs("graph", images[0])
    graph = CudaGraph(fuse(model))
    expected, ours = [results(model, x, torch.float64) for x in images], {}
    graph(images[0])

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            ours[i] = [graph(images[i]) for _ in range(20)]

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert all(max_difference(y, expected[i]) < 1e-3 for i in range(4) for y in ours[i])


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_more_windows_than_a_fused_kernel_takes(dtype):
    """65535 sequences is the most; forward and backward."""
    layer, x = fill(HiLo(16, 2, window_size=2)).cuda(), normal(0, 5, 2 * 150 * 2 * 90, 16).cuda()
    assert 5 * 150 * 90 > 65535
    low, y = copy.deepcopy(layer).to(dtype), x.to(dtype).requires_grad_()
    ours, exact = low(y, 300, 180), copy.deepcopy(layer).double()(x.double(), 300, 180)
    assert max_difference(ours, exact) < 100 * torch.finfo(dtype).eps * exact.abs().max()
    ours.sum().backward()
    assert y.grad is not None and y.grad.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("generated", [False, True])
def test_windows_written_out(monkeypatch, generated):
    """What HiLo and its folded form compute on CUDA, as they are and in generated code: on the CPU, against torch's kernel there."""
    layer, x = HiLo(48, 3, window_size=3), normal(0, 3, 4, 3, 9, 16).unbind()
    assert max_difference(layer._attention(*x, written_out=True)[0], layer._attention(*x)[0]) < 1e-5
    monkeypatch.setattr(windows, "_is_generated", lambda: generated)
    for s, heads, d, H, W in ((2, 2, 8, 4, 10), (3, 1, 4, 9, 3), (4, 3, 8, 4, 8)):
        qkv = normal(s, 2, H, W, 3 * heads * d)
        assert max_difference(windows._on_cuda(qkv, s, heads, d, 0.3), windows._by_fused_attention(qkv, s, heads, d, 0.3)) < 1e-5


@torch.no_grad()
def test_the_folded_form_with_shifted_sums():
    """As it is compiled where there are no kernels."""
    model, images = tiny_model(alpha=0.5).eval(), normal(0, 2, 3, 65, 111)
    with use(depthwise_gelu="shifted"):
        assert max_difference(fuse(model)(images), model.double()(images.double())) < 1e-4


@pytest.mark.parametrize("H, W", [(4, 6), (7, 5), (2, 3)])
def test_offsets_as_sums_of_products(H, W):
    conv, x = fill(torch.nn.Conv2d(16, 8, 2, stride=2)), normal(0, 3, 16, H, W)
    assert max_difference(_of_patches(x, conv.weight, conv.bias), conv(x)) < 1e-5


def test_where_there_is_no_graph(monkeypatch):
    assert why_not("graph", torch.empty(1)) == "it needs a CUDA device, got cpu"
    monkeypatch.setattr(deform_conv, "problem", "not built")
    assert why_not("graph", SimpleNamespace(device=torch.device("cuda"))).endswith("; not built")
    with pytest.raises(ValueError, match="none of these forms is available: .*graph.*needs a CUDA device, got cpu"):
        optimize(tiny_model(), normal(0, 1, 3, 64, 64), forms=["graph"], report=None)
