"""Looks inside a LITv2: frequencies, attention, sampling points and class activation maps.

    from litv2.explain import spectrum
    for branch in spectrum(model, images):
        print(branch.block, branch.branch, branch.high.mean())
"""

from .spectrum import spectrum

__all__ = ["spectrum"]
