# SPDX-License-Identifier: Apache-2.0
"""Numbers of a device, read without stopping it."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """A copy of a tensor on its way to the host. On CUDA the host goes on, and waits only when it asks for the numbers."""

    def __init__(self, values: Tensor):
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        self._copy = values.to("cpu", non_blocking=values.is_cuda)  # from CUDA into page-locked memory, which makes it asynchronous
        if self._arrived is not None:
            self._arrived.record()

    def numbers(self) -> list:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()
