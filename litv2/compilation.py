# SPDX-License-Identifier: Apache-2.0
"""What ``torch.compile`` should be told about models of LITv2: ``torch.compile(model, options=litv2.COMPILE_OPTIONS)``."""

from __future__ import annotations

from typing import Any

__all__ = ["COMPILE_OPTIONS"]

COMPILE_OPTIONS: dict[str, Any] = {
    # Inductor would take tokens (B, H, W, C) for images (B, C, H, W), and store them transposed for the few convolutions among them.
    "layout_optimization": False,
}
