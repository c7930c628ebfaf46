# SPDX-License-Identifier: Apache-2.0
"""The operator ``pooled_linear``: the linear layer of an average-pooled map, from which Lo-Fi has its keys and values.

Its arguments are

* ``x``: a map normalised without scale and shift, (B, H, W, K);
* ``window_size``: the side s of a pooled cell;
* ``weight``, ``bias``: (N, K) and (N,), with the norm's scale and shift folded in;
* ``shift``: what the norm's shift adds to the result, (N,).

It returns (B, ceil(H / s), ceil(W / s), N). What completes the cells on the right and at the bottom is 0 *after* the norm's shift, which is
in the bias here: of a cell that lies partly outside the map only that part of ``shift`` is kept. In :mod:`litv2.inference.fused` it is part
of HiLo.
"""

from mm_modules.dispatch import Operator

from . import reference, triton

__all__ = ["pooled_linear"]

pooled_linear = Operator("pooled_linear", [triton.BACKEND, reference.BACKEND])
