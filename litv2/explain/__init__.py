"""Looks inside a LITv2: frequencies, attention, sampling points.

    from litv2.explain import attention, offsets, spectrum
    for branch in spectrum(model, images):
        print(branch.block, branch.branch, branch.high.mean())
"""

from .attending import attention
from .frequencies import spectrum
from .sampling import offsets

__all__ = ["attention", "offsets", "spectrum"]
