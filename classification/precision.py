# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: autocast and, for float16, a gradient scaler in training; half-precision weights in inference; TF32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Precision:
    device: torch.device
    mode: str = "off"  # off | fp16 | bf16
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.mode == "fp16")

    @contextmanager
    def context(self) -> Iterator[None]:
        """The forward pass of training runs in it."""
        with ExitStack() as stack:
            if self.mode != "off":
                stack.enter_context(torch.autocast(self.device.type, self.dtype))
            if self.device.type == "cpu" and self.mode == "bf16" and torch.is_grad_enabled():
                # On the CPU the backward pass of torch's fused attention is several times slower in bfloat16 than plain attention,
                # which torch computes in float32.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.mode]

    def for_inference(self, model: nn.Module) -> nn.Module:
        """Returns a copy of the model whose weights have ``dtype``, which takes images of ``dtype``; without mixed precision the model.

        The copy spares autocast's conversions of weights and activations in each pass. Batch norms and the convolutions that predict
        offsets keep float32 weights and statistics, and offsets are computed in float32. The statistics of LayerNorm and softmax are
        float32 inside torch's kernels.
        """
        if self.mode == "off":
            return model
        half = copy.deepcopy(model).to(self.dtype)
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) or name.endswith("conv_offset"):
                half.set_submodule(name, copy.deepcopy(module))
        return half


def choose_precision(amp: str, device: torch.device) -> tuple[Precision, str]:
    """Returns the precision for the setting AMP on a device, and a log line that states and explains it.

    ``auto`` is float16 on CUDA, as the released weights were trained, and off elsewhere. ``on``, the release's O1 and O2, is float16
    on CUDA and bfloat16 elsewhere.
    """
    cuda = device.type == "cuda"
    if amp == "auto":
        mode = "fp16" if cuda else "off"
        why = "AMP is auto: as in the release's training on CUDA" if cuda else f"AMP is auto, and the device is {device.type}, not cuda"
    elif amp == "on":
        mode = "fp16" if cuda else "bf16"
        why = f"AMP is on, and the device is {device.type}"
    else:
        mode, why = amp, f"AMP is {amp}"
    precision = Precision(device, mode)
    name = str(precision.dtype).removeprefix("torch.")
    what = "off, float32 throughout" if mode == "off" else name
    inference = "" if mode == "off" else f"; evaluation takes {name} weights instead of autocast"
    return precision, f"mixed precision: {what} ({why}){inference}"


def set_tf32(allowed: bool, device: torch.device) -> str:
    """Allows or forbids TF32 in the float32 products and convolutions of CUDA; returns a log line that states it.

    TF32 keeps 10 bits of the factors' mantissas, as float16 does. Torch's own default allows it in convolutions, among them those that
    predict the offsets of token merging.
    """
    if device.type != "cuda":
        return f"TF32: {'has no effect' if allowed else 'off'} ({device.type}, not cuda)"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    return "TF32: on, float32 products and convolutions round their factors to 10 bits" if allowed else "TF32: off"
