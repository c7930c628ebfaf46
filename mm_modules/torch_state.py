# SPDX-License-Identifier: Apache-2.0
"""The state of torch that the choice of a backend depends on.

This is the one file on the model's path that uses private names of torch: a new release of torch is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

F = TypeVar("F", bound=Callable)

__all__ = [
    "bfloat16_is_emulated",
    "compute_dtype",
    "constant_in_graphs",
    "has_global_hooks",
    "has_hooks",
    "has_kernel",
    "in_transform",
    "is_exporting",
    "is_watched",
    "without_modes",
]


def is_exporting() -> bool:
    """Whether a program for use outside this process is being traced: torch.export, ONNX, torch.jit.trace."""
    # The flag itself, not torch.compiler.is_exporting(): Dynamo of torch 2.7 to 2.11 takes that for True in every compilation.
    # torch < 2.7 cannot tell an export from a compilation.
    return getattr(torch.compiler, "_is_exporting_flag", torch.compiler.is_compiling()) or torch.jit.is_tracing()


def in_transform() -> bool:
    """Whether torch.func's transforms or forward-mode derivatives are active: some fast operators have no rules for them."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def constant_in_graphs(function: F) -> F:
    """``torch.compiler.assume_constant_result``, which imports the compiler, and that takes as long as the rest of torch."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_watched() -> bool:
    """Whether a dispatch mode is active, or derivatives are needed that the fast operators lack."""
    return torch._C._len_torch_dispatch_stack() > 0 or in_transform()


def without_modes() -> AbstractContextManager[object]:
    """Within it, tensors are real and nothing watches them, although code is being traced with fake ones, for example."""
    return _disable_current_modes()


def has_global_hooks() -> bool:
    """Whether hooks are installed on every module (``torch.nn.modules.module.register_module_forward_hook`` and others)."""
    return torch.nn.modules.module._has_any_global_hook()


def has_hooks(module: nn.Module) -> bool:
    """Whether calling this module does more, or something else, than its class's ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def has_kernel(operator: str, device: str) -> bool:
    """Whether a registered operator, such as ``litv2::deform_conv2d``, computes on this type of device, such as ``cuda``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, device.upper())


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which torch multiplies x with weights: autocast's if enabled, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# Asked once: a compiled graph then holds a constant.
_BFLOAT16_IS_EMULATED: bool = torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def bfloat16_is_emulated() -> bool:
    """Whether this CPU lacks bfloat16 instructions, according to oneDNN."""
    return _BFLOAT16_IS_EMULATED
