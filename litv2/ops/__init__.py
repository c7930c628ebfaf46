"""Native CPU operators (float32), optional: built by ``setup.py`` beside this file, switched off by LITV2_NATIVE=0.

* ``depthwise_gelu`` is used by every feed-forward network of the model, in training too;
* ``infer_block`` computes a whole block in two passes where no gradients are wanted, and nobody looks inside;
* ``native_form`` (form.py) is the model for inference with its weights packed once, see ``litv2.optimize``; there products with weights
  may be bfloat16 (csrc/product.cpp).

Without them torch's own operators compute the same, to rounding: as there, the last bits may depend on the number of threads
and of images. ``problem`` says why they are not in use, None if they are.
"""

from __future__ import annotations

import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hilo import HiLo
from mm_modules.DCN.reference import in_transform

from .block_forward import bfloat16
from .block_forward.bfloat16 import compute_dtype
from .packing import feed_forward_arguments, hilo_arguments

BUILD = "build them with: cd litv2/ops && python setup.py build_ext --inplace"

MIN_TOKENS = 512  # of a batch: below, packing the weights of a block costs more than it saves

problem: str | None = None
if os.environ.get("LITV2_NATIVE", "1") == "0":
    problem = "switched off by LITV2_NATIVE=0"
else:
    try:
        from . import _C  # noqa: F401 (registers the operators)
    except ImportError as error:
        problem = f"not built; {BUILD}"
        if error.name is None or not error.name.endswith("native._C"):  # it is there, but not for this torch or Python
            problem = f"cannot be loaded ({error}); {BUILD}"
            warnings.warn(f"litv2.ops._C {problem}. Until then torch's own operators are used.", stacklevel=2)


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(3 x 3 depthwise convolution with zero padding): x (B, H, W, C), weight (C, 1, 3, 3), bias (C,) -> (B, H, W, C)."""
    if not takes_depthwise_gelu(x, weight):
        x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
        return F.gelu(x).permute(0, 2, 3, 1)
    x = x.to(compute_dtype(x))
    return torch.ops.litv2.native_depthwise_gelu(x, weight.float().flatten(1).t().contiguous(), bias.float())


def takes_depthwise_gelu(x: Tensor, weight: Tensor) -> bool:
    """Whether the native operator computes this: eager or compiled on the CPU, not in an export, in float32.

    In bfloat16, and under autocast to it, only where torch emulates it; the operator rounds the result.
    """
    return (
        problem is None
        and isinstance(x, Tensor)  # not a proxy of torch.fx
        and x.device.type == "cpu"
        and {x.dtype, weight.dtype} <= {torch.float32, torch.bfloat16}
        and (x.dtype == weight.dtype or torch.is_autocast_enabled("cpu"))
        and (compute_dtype(x) == torch.float32 or compute_dtype(x) == torch.bfloat16 and bfloat16.emulated)
        and x.shape[-1] % 16 == 0
        and not (torch.jit.is_tracing() or _is_exporting())
        and (torch.compiler.is_compiling() or not _is_watched())
    )


# torch < 2.7 cannot tell an export from a compilation.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def _is_watched() -> bool:
    """Whether somebody counts or replaces operators (a dispatch mode), or wants derivatives that the native ones do not have."""
    return torch._C._len_torch_dispatch_stack() > 0 or in_transform()


def takes_block(block: nn.Module, x: Tensor) -> bool:
    """Whether ``infer_block`` may stand in for the block: plain inference with plain modules, without hooks on them.

    Whoever traces, counts operations or replaces a layer gets the plain modules, as with torch's own fast path for transformers.
    """
    return (
        problem is None
        and not (torch.jit.is_tracing() or torch.compiler.is_compiling())
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and not block.training
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x[..., 0].numel() >= MIN_TOKENS
        and not torch.is_autocast_enabled("cpu")
        and not _is_watched()
        and not torch.nn.modules.module._has_any_global_hook()
        and all(_is_plain(module) for module in block.modules() if module is not block)
    )


def _is_plain(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    known = type(module) in (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Dropout, HiLo) or type(module).__module__ == "litv2.layers"
    parameters = [p for p in module._parameters.values() if p is not None]
    whole = not isinstance(module, nn.LayerNorm) or len(parameters) == 2
    float32 = all(type(p) in (nn.Parameter, Tensor) and p.dtype == torch.float32 and p.device.type == "cpu" for p in parameters)
    return known and not hooked and not module.training and whole and float32


def infer_block(block: nn.Module, x: Tensor) -> Tensor:
    """A ``Block`` without gradients. The weights are packed anew each time: they may have changed."""
    if block.attn is not None:
        x = torch.ops.litv2.native_hilo(x, **hilo_arguments(block.attn, block.norm1))
    return torch.ops.litv2.native_feed_forward(x, **feed_forward_arguments(block.mlp, block.norm2))


def _register() -> None:
    @torch.library.register_fake("litv2::native_depthwise_gelu")
    def _(x, weight, bias):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @torch.library.register_fake("litv2::native_depthwise_gelu_backward")
    def _(gradient, x, weight, bias):
        return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight), torch.empty_like(bias)

    for name in ("feed_forward", "hilo"):
        torch.library.register_fake(f"litv2::native_{name}")(lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format))

    @torch.library.register_fake("litv2::native_patch_embed")
    def _(image, patch, weight, bias, norm_weight, norm_bias, eps):
        B, _, H, W = image.shape
        return image.new_empty(B, H // patch, W // patch, len(norm_weight))

    @torch.library.register_fake("litv2::native_token_merging")
    def _(x, offset_top, offset_bottom, offset_bias, weight, bias, out_channels):
        B, H, W, _ = x.shape
        return x.new_empty(B, H // 2, W // 2, out_channels)

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward(ctx, gradient):
        return torch.ops.litv2.native_depthwise_gelu_backward(gradient, *ctx.saved_tensors)

    def no_double_backward(ctx, *gradients):
        raise NotImplementedError(
            "depthwise_gelu: the native operator has no second derivatives; LITV2_NATIVE=0 selects torch's, which have"
        )

    torch.library.register_autograd("litv2::native_depthwise_gelu", backward, setup_context=keep)
    torch.library.register_autograd("litv2::native_depthwise_gelu_backward", no_double_backward)


if problem is None:
    _register()
