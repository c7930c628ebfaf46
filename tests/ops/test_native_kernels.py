# SPDX-License-Identifier: Apache-2.0
"""The same numbers with the kernels of every processor, and with none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT, max_difference
from litv2.ops import native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.problem is not None, reason=f"the native operators: {native.problem}"),
]


MEASURE = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from helpers import normal, tiny_model
from litv2.ops import native

x = normal(0, 2, 3, 100, 132)
kernels = native.problem or torch.ops.litv2.native_kernels()
results = dict(problem=native.problem, kernels=kernels, logits={}, rounded={}, gradients={}, flops={})
for name, arguments in dict(even={}, odd=dict(embed_dim=20, num_heads=(1, 2, 4, 5), local_ws=(0, 3, 2, 1), alpha=0.5)).items():
    model = tiny_model(**arguments).eval()
    with torch.no_grad():
        results["logits"][name] = model(x)
        if native.problem is None:
            from litv2.inference.packed import packed_model
            results["logits"][name + ", native form"] = packed_model(model)(x)
            for products in (torch.bfloat16, torch.int8):
                results["rounded"][f"{name}, {products}"] = packed_model(model, products)(x)
        with FlopCounterMode(display=False) as inference:
            model(x)
    with FlopCounterMode(display=False) as training:
        model(x).square().sum().backward()
    results["flops"][name] = inference.get_total_flops(), training.get_total_flops()
    model.zero_grad()
    model(x).square().sum().backward()
    results["gradients"][name] = {name: p.grad for name, p in model.named_parameters()}
"""


# Scratch memory that grows little by little: what is written behind its end breaks the heap, and the process aborts.
GROWTH = """
if native.problem is None:
    weight, one = torch.ops.litv2.native_pack(torch.ones(64, 1)), torch.ones(64)
    for width in range(1, 113):
        torch.ops.litv2.native_patch_embed(torch.ones(1, 1, 1, width), 1, weight, one, one, one, 1e-5)
"""


def measured(tmp_path, **environment: str) -> dict | str:
    """The results of MEASURE in a process with this environment, or the error it ended with."""
    out = tmp_path / "results.pt"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", f"{MEASURE}\n{GROWTH}\ntorch.save(results, {str(out)!r})"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return torch.load(out, weights_only=True) if done.returncode == 0 else done.stderr


@pytest.fixture(scope="module")
def measured_here() -> dict:
    names = {}
    exec(MEASURE, names)
    return names["results"]


def same_results(ours: dict, theirs: dict) -> None:
    assert ours["flops"] == theirs["flops"]
    for name, logits in theirs["logits"].items():
        assert max_difference(ours["logits"].get(name, logits), logits) < 1e-5 * logits.abs().max()
        assert max_difference(logits, theirs["logits"][name.split(",")[0]]) < 1e-5 * logits.abs().max()
    for name, logits in theirs["rounded"].items():
        # Where the last bits turn a rounding, a number is a whole step away; together they are nearer than steps are to the truth.
        rounding = max_difference(logits, theirs["logits"][name.split(",")[0]])
        assert rounding > 0 and max_difference(ours["rounded"].get(name, logits), logits) < rounding
    for name, gradients in theirs["gradients"].items():
        for key, gradient in gradients.items():
            # A bias before batch norm or of keys has no gradient but rounding: hence the 1.
            assert max_difference(ours["gradients"][name][key], gradient) < 1e-4 * max(1, gradient.abs().max()), key


@pytest.mark.parametrize("kernels", ["baseline", "AVX2", "AVX-512"])
def test_all_kernels(kernels, tmp_path, measured_here):
    if kernels == measured_here["kernels"]:
        pytest.skip("all the other tests use these kernels")
    results = measured(tmp_path, LITV2_NATIVE_KERNELS=kernels)
    if isinstance(results, str):
        assert f"ValueError: LITV2_NATIVE_KERNELS={kernels}: this processor has no such kernels" in results
        pytest.skip("this processor does not have them")
    assert results["kernels"] == kernels
    same_results(results, measured_here)


def test_unknown_kernels(tmp_path):
    error = measured(tmp_path, LITV2_NATIVE_KERNELS="SSE9")
    assert "ValueError: LITV2_NATIVE_KERNELS=SSE9: this processor has no such kernels" in error


def test_switched_off(tmp_path, measured_here):
    results = measured(tmp_path, LITV2_NATIVE="0")
    assert results["problem"] == "switched off by LITV2_NATIVE=0"
    same_results(results, measured_here)
