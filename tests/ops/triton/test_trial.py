# SPDX-License-Identifier: Apache-2.0
"""The trial before the first use, interpreted."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from litv2.ops import triton as room

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
CPU = torch.device("cpu")


def test_it_agrees_whatever_surrounds_it():
    """While a program is traced or runs in bfloat16. The random numbers of others stay as they are."""
    state = torch.get_rng_state()
    with FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu"):
        room.trial.compare(CPU)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.extra
@pytest.mark.parametrize(
    ("check", "module", "function"),
    [
        ("depthwise_gelu", "depthwise", "depthwise_gelu"),
        ("depthwise_gelu", "depthwise", "depthwise_gelu_backward"),
        ("attention", "windows", "window_attention"),
        ("attention", "windows", "window_attention_backward"),
        ("attention", "pooled", "pooled_attention"),
        ("attention", "hilo_attention", "hilo_attention"),
        ("linear", "norm_linear", "norm_linear"),
        ("linear", "linear_add", "linear_add"),
        ("linear", "linear_add", "linear_add_norm"),
        ("linear", "add_norm", "add_norm"),
        ("linear", "pooled_linear", "pooled_linear"),
        ("merging", "merging", "token_merging"),
        ("merging", "offsets", "predict_offset"),
        ("embedding", "embedding", "patch_embed"),
    ],
)
@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_it_sees_other_numbers(check, module, function, factor, monkeypatch):
    kernels, check = getattr(room.trial, module), getattr(room.trial, f"of_{check}")
    right = getattr(kernels, function)
    assert check in room.trial.CHECKS

    def wrong(*arguments):
        results = right(*arguments)
        return results * factor if isinstance(results, torch.Tensor) else (*results[:-1], results[-1] * factor)

    monkeypatch.setattr(kernels, function, wrong)
    with pytest.raises(ArithmeticError, match=rf"{function.removesuffix('_backward')} differs from torch's$"):
        room.trial.compare(CPU, [check])


def test_it_sees_offsets_of_ten_bits(monkeypatch):
    """As TF32 has them: other kernels may be as far from torch."""
    right = room.trial.offsets.predict_offset
    monkeypatch.setattr(room.trial.offsets, "predict_offset", lambda *arguments: right(*arguments) * (1 + 2**-11))
    with pytest.raises(ArithmeticError, match=r"predict_offset differs from torch's$"):
        room.trial.compare(CPU, [room.trial.of_merging])
