# SPDX-License-Identifier: Apache-2.0
"""numpy's arrays in mmengine's checkpoints. What numpy itself rebuilds them with takes any state, and a damaged one ends the process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["NUMPY_CLASSES"]

KINDS = ("i4", "i8", "u1", "f4", "f8")
STATES = [(3, order, None, None, None, -1, -1, 0) for order in "<|"]  # of a plain dtype, little-endian or of one byte


class Dtype:
    """Stands in for numpy.dtype in a pickle: a plain one of KINDS."""

    def __init__(self, kind: str, align: bool, copy: bool):
        if kind not in KINDS:
            raise ValueError(f"the file contains an array of dtype {kind!r}, expected one of {', '.join(KINDS)}")
        self.dtype = np.dtype(f"<{kind}")

    def __setstate__(self, state: Any) -> None:
        if state not in STATES:
            raise ValueError(f"the file contains a dtype with the state {state!r}")


class Array(np.ndarray):
    """An array that takes only a state that fits together; it is pickled as numpy's own."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        known = type(dtype) is Dtype and type(data) is bytes and type(shape) is tuple
        if not known or any(type(side) is not int or side < 0 for side in shape) or len(data) != math.prod(shape) * dtype.dtype.itemsize:
            raise ValueError("the file contains an array whose shape, dtype and data do not fit together")
        super().__setstate__((1, shape, dtype.dtype, bool(fortran), data))  # type: ignore[arg-type]

    def __reduce__(self) -> Any:
        return self.view(np.ndarray).__reduce__()


def _reconstruct(kind: type, shape: Any, code: Any) -> Array:
    return np.ndarray.__new__(Array, (0,), np.int8)


def _scalar(dtype: Any, data: Any) -> np.generic:
    if type(dtype) is not Dtype or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
        raise ValueError("the file contains a number whose dtype and data do not fit together")
    return np.frombuffer(data, dtype.dtype)[0]


# For ``torch.serialization.safe_globals``, under the names in the pickle.
NUMPY_CLASSES = [
    (Array, "numpy.ndarray"),
    (Dtype, "numpy.dtype"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    (_scalar, "numpy._core.multiarray.scalar"),
]
