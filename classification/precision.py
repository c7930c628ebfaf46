"""Mixed precision: a context for the forward pass, and a gradient scaler that is active only for float16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

NAMES = {"off": "off, float32 throughout", "fp16": "float16", "bf16": "bfloat16"}


@dataclass
class Precision:
    device: torch.device
    mode: str = "off"  # off | fp16 | bf16
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.mode == "fp16")

    @contextmanager
    def context(self) -> Iterator[None]:
        """The forward pass of training and evaluation runs in it."""
        dtype = torch.float16 if self.mode == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype=dtype, enabled=self.mode != "off"), ExitStack() as stack:
            if self.device.type == "cpu" and self.mode == "bf16" and torch.is_grad_enabled():
                # On the CPU the backward pass of torch's fused attention is several times slower in bfloat16 than plain attention,
                # which torch computes in float32.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


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
    return Precision(device, mode), f"mixed precision: {NAMES[mode]} ({why})"
