# SPDX-License-Identifier: Apache-2.0
"""Looks inside a LITv2: frequencies, attention, sampling points and class activation maps.

    from litv2.explain import attention, offsets, spectrum
    for branch in spectrum(model, images):
        print(branch.block, branch.branch, branch.high.mean())

Class activation maps are in ``litv2.explain.activation``, which needs the package grad-cam, and pictures in ``litv2.explain.drawing``,
which needs matplotlib.
"""

from .attending import attention
from .frequencies import spectrum
from .sampling import offsets

__all__ = ["attention", "offsets", "spectrum"]
