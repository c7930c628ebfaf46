# SPDX-License-Identifier: Apache-2.0
"""What is launched on a CUDA device, read from generated code and traces without one: ceilings that may be lowered, not raised."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import litv2
from litv2.ops import use

pytest.importorskip("triton", reason="torch has no triton here, and generates no code for CUDA")
from cuda_code import Kernels, generated, operators

pytestmark = [
    pytest.mark.extra,  # half a minute
    pytest.mark.skipif(torch.cuda.is_available(), reason="the code is read for a device that is described, which is not this one"),
    pytest.mark.filterwarnings("ignore"),
]
BATCH = 64
OURS = dict(  # kernels of our own in generated code
    patch_embed=1, norm_linear=4, depthwise_gelu=12, linear_add=4, linear_add_norm=6, pooled_linear=6, hilo_attention=6, pooled_attention=2,
    predict_offset=3, token_merging=3,
)  # fmt: skip


def counted(kernels: Kernels, name: str) -> dict[str, int]:
    return {kernel: kernels.names.count(name.format(kernel)) for kernel in OURS}


def stage(number: int) -> tuple[nn.Module, torch.Tensor]:
    """A block of a stage of LITv2-S as it is compiled, and its input."""
    side, dim = 56 >> number, 96 << number
    block = litv2.fuse(litv2.litv2_small(depths=(1, 1, 1, 1))).layers[number].blocks[0]
    return block, torch.empty(BATCH, side, side, dim)


@pytest.fixture(scope="module")
def model() -> tuple[nn.Module, torch.Tensor]:
    model = litv2.fuse(litv2.litv2_small())
    for conv in (model.patch_embed.proj, *(stage.downsample.dconv for stage in model.layers[:-1])):
        conv.to(memory_format=torch.channels_last)  # as fuse() has it on a CUDA device
    return model, torch.empty(BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def code(model) -> Kernels:
    with use(token_merging="triton"):  # the other one depends on what the extension was built for
        return generated(*model)


def test_the_model(code):
    assert len(code.names) <= 87 and code.bytes <= 4.76e9
    assert counted(code, "litv2.triton_{}.default") == OURS and "convolution" not in code.names
    assert not code.transposed() and "YBLOCK" not in code.source  # a kernel with blocks along y transposes


@pytest.mark.parametrize("number, kernels, megabytes", [(0, 3, 733), (2, 9, 327), (3, 9, 193)])
def test_a_block(number, kernels, megabytes):
    code = generated(*stage(number))
    assert len(code.names) <= kernels and code.bytes <= megabytes * 1e6
    assert "litv2.triton_depthwise_gelu.default" in code.names and "convolution" not in code.names and not code.transposed()


def test_the_layout_optimization_would_transpose():
    """The reason why it is off, and that it would be seen."""
    blocks = nn.Sequential(*litv2.litv2_small(depths=(1, 1, 1, 1)).eval().layers[2].blocks)
    with use(depthwise_gelu="torch", attention="torch"):
        code = generated(blocks, stage(2)[1], layout_optimization=True)
    assert code.transposed() and "YBLOCK" in code.source


def test_the_model_without_compilation(model):
    with use(token_merging="triton"):
        trace = operators(*model)
    assert len(trace.names) <= 88 and trace.bytes <= 4.74e9
    assert counted(trace, "litv2::triton_{}") == OURS and trace.names.count("litv2::triton_add_norm") == 8
    assert "gelu" not in trace.names[:-1]
