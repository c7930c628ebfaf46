# SPDX-License-Identifier: Apache-2.0
"""What no image holds, and what no program should do: wild numbers, maps of one element or none, odd memory, many threads, a fork.

``make sanitize`` runs these, too, with the compiler's checks of memory and of undefined behaviour.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from helpers import normal, tiny_model
from litv2.inference.packed import packed_model
from litv2.ops import native
from mm_modules.DCN import deform_conv2d
from native_helpers import close

pytestmark = pytest.mark.usefixtures("one_thread")

WILD = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, 1e-45, -0.0]
FORMS = {"float32": lambda model: packed_model(model)}
FORMS |= {str(products): lambda model, products=products: packed_model(model, products) for products in (torch.bfloat16, torch.int8)}


@pytest.fixture(scope="module")
def model():
    return tiny_model(alpha=0.5).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=FORMS)
def form(request, model):
    return FORMS[request.param](model)


@pytest.mark.parametrize("value", WILD)
@torch.inference_mode()
def test_wild_numbers_stay_in_their_image(request, form, model, value):
    """Another image of the batch has the same bits as without them, but for rounding in float32, where Strassen's algorithm adds tokens;
    their own is finite exactly where the plain model's is."""
    x = normal(0, 3, 3, 64, 96)
    before = form(x)
    x[1, :, 5:9, 7:40] = value
    after = form(x)
    if "float32" in request.node.callspec.params["form"]:
        assert close(after[::2], before[::2], 3e-6)
    else:
        assert torch.equal(before[::2], after[::2])
    assert after[1].isfinite().all() == model(x)[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (1, 3, 32, 32), (1, 3, 32, 320), (2, 3, 33, 65)])
@torch.inference_mode()
def test_maps_of_one_element_or_none(form, shape):
    logits = form(normal(0, *shape))
    assert logits.shape == (shape[0], 10) and logits.isfinite().all()


def memories(x: Tensor) -> dict[str, Tensor]:
    """The same numbers, otherwise in memory."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
    wide[..., ::2] = x
    shifted = x.new_full((x.numel() + 1,), math.nan)[1:].view(x.shape)  # 4 bytes after where vectors would begin
    shifted.copy_(x)
    layout = x.contiguous(memory_format=torch.channels_last)
    return dict(strided=wide[..., ::2], shifted=shifted, channels_last=layout, transposed=x.mT.contiguous().mT)


@torch.inference_mode()
def test_odd_memory(form):
    x = normal(0, 2, 3, 64, 64)
    expected = form(x)
    for name, other in memories(x).items():
        assert torch.equal(form(other), expected), name


@torch.inference_mode()
def test_one_image_for_a_whole_batch(form):
    """Of stride 0."""
    x = normal(0, 1, 3, 64, 64)
    assert close(form(x.expand(3, -1, -1, -1)), form(x).expand(3, -1))


@torch.inference_mode()
def test_threads_repeat(form):
    """The same bits each time, whatever number of threads computes them; a race would change some."""
    x = normal(0, 5, 3, 96, 64)
    expected = form(x)
    for threads in range(1, 9):
        torch.set_num_threads(threads)
        results = [form(x) for _ in range(6)]
        assert all(torch.equal(results[0], result) for result in results[1:]), threads
        assert close(results[0], expected, 3e-2), threads
    torch.set_num_threads(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@torch.inference_mode()
def test_many_processes_at_once_that_fork_after_use(form):
    """As loader workers do, with one thread: torch's OpenMP does not survive a fork with more."""
    x = normal(0, 2, 3, 64, 64)
    expected = form(x)
    torch.set_num_threads(3)
    form(x)
    torch.set_num_threads(1)
    children = []
    for _ in range(8):
        if (child := os.fork()) == 0:
            os._exit(0 if all(torch.equal(form(x), expected) for _ in range(20)) else 3)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == 8 * [0]


# The deformable convolution


@pytest.mark.parametrize("value", [*WILD, 1e10, -1e10, 2.0**31, 2.0**63])
def test_wild_offsets(value):
    """A position far away samples zero, one that is no number gives none; gradients, too, touch nothing else."""
    input, weight = normal(0, 2, 4, 5, 6).requires_grad_(), normal(1, 3, 4, 3, 3).requires_grad_()
    offset = normal(2, 2, 18, 5, 6)
    offset[1, 4:8] = value
    offset.requires_grad_()
    out = deform_conv2d(input, offset, weight, padding=1)
    out.sum().backward()
    assert out[0].isfinite().all() and input.grad[0].isfinite().all() and offset.grad[0].isfinite().all()
    assert out[1].isnan().all() if math.isnan(value) else out[1].isfinite().all()
    with torch.no_grad():
        apart = deform_conv2d(input[:1], offset[:1], weight, padding=1)
    assert close(out[:1].detach(), apart)


def test_deformable_convolution_of_odd_memory():
    input, offset, weight = normal(0, 1, 4, 6, 8), normal(1, 1, 18, 6, 8), normal(2, 4, 4, 3, 3)
    expected = deform_conv2d(input, offset, weight, padding=1)
    for name, other in memories(input).items():
        assert close(deform_conv2d(other, offset, weight, padding=1), expected), name
    for name, other in memories(offset).items():
        assert close(deform_conv2d(input, other, weight, padding=1), expected), name


# Sizes beyond 2 ** 31, which no machine of a test has memory for


def test_sizes_beyond_32_bits():
    """The shapes of results that have more than 2 ** 31 elements, and of inputs that have."""
    with FakeTensorMode():
        check_sizes_beyond_32_bits()


def check_sizes_beyond_32_bits() -> None:
    image = torch.empty(2**13, 3, 512, 512)
    assert image.numel() > 2**31
    vectors = [torch.empty(size) for size in (64, 64, 64)]
    packed = torch.empty(4, 48, native.columns)
    out = torch.ops.litv2.native_patch_embed(image, 4, packed, *vectors, 1e-5)
    assert out.shape == (2**13, 128, 128, 64) and out.numel() > 2**32
    x = torch.empty(2**9, 1024, 1024, 8)
    assert torch.ops.litv2.native_depthwise_gelu(x, torch.empty(9, 8), torch.empty(8)).numel() == 2**32
    offset = torch.empty(2**11, 18, 1024, 1024)
    maps, weight = torch.empty(2**11, 2, 1024, 1024), torch.empty(2, 2, 3, 3)
    assert deform_conv2d(maps, offset, weight, padding=1).shape == maps.shape and maps.numel() == 2**32
