# SPDX-License-Identifier: Apache-2.0
"""The least time that a GPU needs for a model, operator by operator: the longer of its bytes over bandwidth and its operations over peak.

    python benchmarks/roofline.py                                    # batch 64 in float16, on five GPUs by their data sheets
    python benchmarks/roofline.py --models litv2_small --by-operator

An eager forward pass is traced on fake tensors: nothing is computed, and no GPU is needed. It is assumed that each operator reads its
inputs once and writes its outputs once, that no cache saves any of that, and that launches take no time. Attention is one fused kernel, a
convolution's bias is a pass of its own, as after cuDNN's kernels, and the deformable convolution gathers its columns before it multiplies
them, as the extension does. What fuses operators, such as torch.compile, can be faster than this bound. Writes JSON and CSV.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from harness import parser, positive, publish
from litv2 import LITv2
from litv2.errors import run_program
from litv2.ops import triton
from mm_modules.DCN import deform_conv

GPU_MODELS = [  # what gpu.py compares
    "litv2_small",
    "litv2_medium",
    "resnet50",
    "convnext_tiny",
    "swin_tiny_patch4_window7_224",
    "xcit_small_12_p16_224",
    "pvt_v2_b2",
    "efficientvit_b2",
    "repvit_m1_5",
    "deit3_small_patch16_224",
]


@dataclass(frozen=True)
class Kernel:
    operator: str
    bytes: int  # read and written
    operations: int  # of products and convolutions; a multiply-add is two
    dtype: str  # of the factors


@dataclass(frozen=True)
class Ceilings:
    """What a GPU can do: bytes/s, and operations/s of products by dtype; float32 is multiplied as TF32."""

    bandwidth: float
    rates: dict[str, float] = field(default_factory=dict)

    def seconds(self, kernels: Iterable[Kernel]) -> float:
        """Raises KeyError if there is no rate for the dtype of a product."""
        return sum(max(each.bytes / self.bandwidth, each.operations and each.operations / self.rates[each.dtype]) for each in kernels)


def _data_sheet(terabytes: float, half: float, tf32: float) -> Ceilings:
    return Ceilings(terabytes * 1e12, dict(float16=half * 1e12, bfloat16=half * 1e12, float32=tf32 * 1e12))


GPUS = {  # dense products, accumulated in float32
    "A100": _data_sheet(1.555, 312, 156),
    "H100": _data_sheet(3.35, 989, 495),
    "H200": _data_sheet(4.8, 989, 495),
    "RTX3090": _data_sheet(0.936, 71, 35.6),
    "RTX4090": _data_sheet(1.008, 165, 82.6),
}


def trace(name: str, batch: int, size: int = 224, dtype: torch.dtype = torch.float16) -> list[Kernel]:
    """Returns the operators of a forward pass of timm's model of this name, re-parameterised like the models that are timed."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        model = (model if isinstance(model, LITv2) else reparameterize_model(model)).to(dtype)
    with FakeTensorMode(), torch.no_grad():
        images = torch.empty(batch, 3, size, size, dtype=dtype, device="cuda").to(memory_format=torch.channels_last)
        return trace_module(on_fake_gpu(model), images)


def on_fake_gpu(module: nn.Module) -> nn.Module:
    """Puts fake tensors in the place of all parameters and buffers; to be called within a FakeTensorMode."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is not None:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cuda")
                    tensors[name] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
    return module


def trace_module(module: nn.Module, *inputs: Tensor) -> list[Kernel]:
    """The same of a call of any module with fake tensors."""
    kernels: list[Kernel] = []
    plain = patch.object(triton, "problem", "the bound of every model is that of torch's operators")
    with plain, _Operators(kernels), _FusedAttention(kernels), _deformable_convolution(kernels):
        module(*inputs)
    return kernels


class _Operators(TorchDispatchMode):
    def __init__(self, kernels: list[Kernel]):
        super().__init__()
        self.kernels = kernels

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        name = operator._schema.name.partition("::")[2]
        outputs = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        if not outputs or operator.is_view or name in ("_unsafe_view", "detach") or "empty" in name or name.startswith("as_strided"):
            return out  # no kernel
        count = flop_registry.get(operator.overloadpacket)
        operations = count(*args, **kwargs, out_val=out) if count else 0
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        self.kernels.append(_kernel(name, inputs + outputs, operations))
        if name == "convolution" and args[2] is not None:
            self.kernels.append(_kernel("convolution bias", [out, out]))
        return out


class _FusedAttention(TorchFunctionMode):
    """Without a GPU torch would choose its unfused form."""

    def __init__(self, kernels: list[Kernel]):
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v, *_ = args
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        operations = 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        masks = [each for each in tree_leaves((args[3:], kwargs)) if isinstance(each, Tensor)]
        self.kernels.append(_kernel("attention", [q, k, v, *masks, out], operations))
        return out


@contextmanager
def _deformable_convolution(kernels: list[Kernel]) -> Iterator[None]:
    def run(input, offset, weight, bias, stride, padding, dilation, mask):
        (B, _, Ho, Wo), (O, *patch_shape) = offset.shape, weight.shape
        columns = input.new_empty(B * Ho * Wo, math.prod(patch_shape))
        out = input.new_empty(B, Ho, Wo, O).permute(0, 3, 1, 2)
        kernels.append(_kernel("deform_conv2d, gather", [each for each in (input, offset, mask, columns) if each is not None]))
        kernels.append(_kernel("deform_conv2d, product", [columns, weight, out], 2 * columns.numel() * O))
        return out

    with patch.object(deform_conv, "operator", run):
        yield


def _kernel(name: str, tensors: list[Tensor], operations: int = 0) -> Kernel:
    return Kernel(name, sum(map(_bytes, tensors)), operations, str(tensors[0].dtype).removeprefix("torch.") if tensors else "")


def _bytes(tensor: Tensor) -> int:
    """Of a tensor that was expanded, those that there are."""
    return tensor.element_size() * math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride)


def main() -> None:
    flags = parser(__doc__, "roofline", threads=False)
    flags.add_argument("--models", nargs="+", default=GPU_MODELS, metavar="NAME", help="names in timm")
    flags.add_argument("--batch-size", type=positive, default=64)
    flags.add_argument("--img-size", type=positive, default=224)
    flags.add_argument("--dtype", default="float16", choices=["float32", "bfloat16", "float16"])
    flags.add_argument("--by-operator", action="store_true", help="a row per operator of each model, instead of one per model")
    args = flags.parse_args()
    rows = []
    for name in args.models:
        kernels = trace(name, args.batch_size, args.img_size, getattr(torch, args.dtype))
        if args.by_operator:
            groups = groupby(sorted(kernels, key=lambda kernel: kernel.operator), lambda kernel: kernel.operator)
            ours = [dict(model=name, operator=operator, **summary(list(own), args.batch_size)) for operator, own in groups]
            rows += sorted(ours, key=lambda row: -row["A100_ms"])
        else:
            rows.append(dict(model=name, **summary(kernels, args.batch_size)))
    title = f"bounds in {args.dtype}, batch {args.batch_size}, {args.img_size} x {args.img_size}, by the GPUs' data sheets"
    publish(rows, args.out, title, batch_size=args.batch_size, img_size=args.img_size, dtype=args.dtype)


def summary(kernels: list[Kernel], batch: int) -> dict:
    """The columns of some kernels."""
    return totals(kernels, batch) | {f"{gpu}_ms": round(1e3 * ceilings.seconds(kernels), 3) for gpu, ceilings in GPUS.items()}


def totals(kernels: list[Kernel], batch: int) -> dict:
    """Their number, bytes, and multiply-adds of one image."""
    multiply_adds = sum(kernel.operations for kernel in kernels) / 2 / batch
    return dict(kernels=len(kernels), MB=round(sum(kernel.bytes for kernel in kernels) / 1e6, 1), GFLOPs=round(multiply_adds / 1e9, 3))


if __name__ == "__main__":
    sys.exit(run_program(main))
