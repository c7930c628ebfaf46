# SPDX-License-Identifier: Apache-2.0
"""numpy's arrays and numbers in mmengine's checkpoints: read as they were saved, or refused, whatever the file says."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.extra
pytest.importorskip("mmengine", exc_type=ImportError)

from litv2.errors import UserError  # noqa: E402
from litv2.openmmlab.numpy_pickles import Array, Dtype  # noqa: E402
from litv2.openmmlab.runner import MMENGINE_CLASSES  # noqa: E402
from litv2.weights.reading import read_checkpoint  # noqa: E402

PLAIN = (3, "<", None, None, None, -1, -1, 0)


def test_arrays_are_read_and_saved_again(tmp_path):
    arrays = [np.arange(6, dtype=kind).reshape(2, 3) for kind in ("i4", "i8", "u1", "f4", "f8")]
    content = dict(arrays=[*arrays, np.asfortranarray(arrays[-1])], number=np.float64(0.1))
    torch.save(content, tmp_path / "first.pth")
    first = read_checkpoint(tmp_path / "first.pth", MMENGINE_CLASSES)
    torch.save(first, tmp_path / "second.pth")
    for read in (first, read_checkpoint(tmp_path / "second.pth", MMENGINE_CLASSES)):
        assert type(read["number"]) is np.float64 and read["number"] == 0.1
        for ours, expected in zip(read["arrays"], content["arrays"], strict=True):
            assert ours.dtype == expected.dtype and np.array_equal(ours, expected)
    assert type(pickle.loads(pickle.dumps(first["arrays"][0]))) is np.ndarray


class Damaged:
    """Is pickled as what ``reduced`` says."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


STATES = [PLAIN[:6], (3, "<", None, -1, -1, 0), (3, ">", *PLAIN[2:]), (3, "<", ((2,),), *PLAIN[3:]), 3, None]


@pytest.mark.parametrize("state", STATES, ids=str)
def test_states_of_dtypes(state, tmp_path):
    """numpy takes the first two, and the process ends when such an array is built."""
    torch.save(dict(value=Damaged(np.dtype, ("f8", False, True), state)), tmp_path / "file.pth")
    if state is None:  # no state at all is a plain dtype
        assert type(read_checkpoint(tmp_path / "file.pth", MMENGINE_CLASSES)["value"]) is Dtype
        return
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "file.pth", MMENGINE_CLASSES)


def test_kinds_of_dtypes():
    for kind in ("O", "V8", "U4", "M8", "f2", 8, None):
        with pytest.raises(ValueError, match="expected one of i4"):
            Dtype(kind, False, True)


@pytest.mark.parametrize(
    "state", [(1, (3,), False, bytes(16)), (1, (-2,), False, bytes(16)), (1, (2.0,), False, bytes(16)), (1, (2,), False, "x" * 16)], ids=str
)
def test_states_of_arrays(state):
    version, shape, fortran, data = state
    array = np.ndarray.__new__(Array, (0,), np.int8)
    array.__setstate__((1, (2,), Dtype("f8", False, True), False, bytes(16)))
    assert array.shape == (2,)
    with pytest.raises(ValueError, match="do not fit together"):
        array.__setstate__((version, shape, Dtype("f8", False, True), fortran, data))
    with pytest.raises(ValueError, match="do not fit together"):
        array.__setstate__((version, (2,), np.dtype("O"), fortran, bytes(16)))
