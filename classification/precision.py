"""Mixed precision: a context for the forward pass, and a gradient scaler that is active only for float16."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

NAMES = {"off": "off, float32 throughout", "fp16": "float16", "bf16": "bfloat16"}


@dataclass
class Precision:
    device: torch.device
    mode: str = "off"  # off | fp16 | bf16
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.mode == "fp16")

    def context(self) -> torch.autocast:
        dtype = torch.float16 if self.mode == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.mode != "off")


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
