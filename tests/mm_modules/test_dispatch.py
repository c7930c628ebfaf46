# SPDX-License-Identifier: Apache-2.0
"""The choice among the backends of an operator: its order, its reasons, and how it is forced."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers import ROOT
from mm_modules import dispatch
from mm_modules.dispatch import Backend, Operator, use


@pytest.fixture
def operator(monkeypatch):
    """x -> the backend's name and x. ``even`` can do even numbers, ``small`` would rather not do large ones."""
    monkeypatch.setattr(dispatch, "OPERATORS", {})
    return Operator(
        "number",
        [
            Backend("even", lambda x: ("even", x), lambda x: "it is odd" if x % 2 else None),
            Backend("small", lambda x: ("small", x), why_rather_not=lambda x: "it is large" if x > 10 else None),
            Backend("any", lambda x: ("any", x)),
        ],
    )


def test_the_first_that_can_computes(operator):
    assert [operator(x) for x in (4, 3, 13)] == [("even", 4), ("small", 3), ("any", 13)]
    assert operator.explain(13) == {"even": "it is odd", "small": "it is large", "any": None}


def test_a_forced_backend_computes_whatever_is_better_or_says_why_it_cannot(operator):
    with use(number="small"):
        assert operator(4) == ("small", 4) and operator(13) == ("small", 13)
        with use(number="any"):
            assert operator(4) == ("any", 4)
        assert operator(4) == ("small", 4)
    with use(number="even"), pytest.raises(RuntimeError, match="number: the backend 'even' is forced .*, but it is odd"):
        operator(3)
    assert operator(3) == ("small", 3)


def test_use_ends_with_an_error_inside(operator):
    with pytest.raises(KeyError), use(number="any"):
        raise KeyError
    assert operator(4) == ("even", 4)


@pytest.mark.parametrize(
    "choice, words", [(dict(number="odd"), "number has no backend 'odd'; choose from even, small, any"), (dict(n="any"), "no operator 'n'")]
)
def test_unknown_names(operator, choice, words):
    with pytest.raises(ValueError, match=words):
        use(**choice).__enter__()
    assert operator(4) == ("even", 4)


PROGRAM = """
import torch
from litv2.layers import Block
from litv2.ops import OPERATORS
block = Block(16, 2, 2, 0.5).eval()
x = torch.zeros(2, 16, 16, 16)
with torch.no_grad():
    conv = block.mlp.dwconv.dwconv
    print(OPERATORS["block"].choose(block, x).name, OPERATORS["depthwise_gelu"].choose(torch.zeros(1, 4, 4, 64), conv).name)
"""


@pytest.mark.parametrize(
    "variables, printed, error",
    [
        ({"LITV2_OPS": "block=torch, depthwise_gelu=torch"}, "torch torch", ""),
        ({"LITV2_NATIVE": "0"}, "torch torch", ""),
        ({"LITV2_OPS": "block"}, "", "ValueError: LITV2_OPS: 'block' must be OPERATOR=BACKEND"),
        ({"LITV2_OPS": "block=fast"}, "", "ValueError: LITV2_OPS: block has no backend 'fast'; choose from native, "),
        ({"LITV2_OPS": "blocks=torch"}, "", "ValueError: LITV2_OPS: there is no operator 'blocks'"),
        ({"LITV2_DCN_BACKEND": "fast"}, "", "ValueError: LITV2_OPS: deform_conv2d has no backend 'fast'"),
    ],
)
def test_forced_by_the_environment(variables, printed, error):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == printed and error in done.stderr, done.stderr
