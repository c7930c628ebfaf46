# SPDX-License-Identifier: Apache-2.0
"""``python -m litv2 env``: what is printed is what the dispatcher does."""

from __future__ import annotations

import pytest
import torch

from litv2.__main__ import main
from litv2.layers import Block
from litv2.ops import OPERATORS, use


def section(printed: str, title: str) -> list[str]:
    return printed.split(f"\n{title}: ", 1)[1].split("\n\n")[0].splitlines()


def test_backends_are_those_that_compute(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    block, x = Block(384, 12, 2, 0.9).eval(), torch.zeros(8, 14, 14, 384)
    with torch.no_grad():
        chosen, reasons = OPERATORS["block"].choose(block, x).name, OPERATORS["block"].explain(block, x)
    first, *others = section(printed, "block, inference, float32 on cpu")
    assert first == chosen and len(others) == len(reasons) - 1
    for name, reason in reasons.items():
        assert name == chosen or any(line.startswith(f"  not {name}: {reason or 'it could'}") for line in others)
    for operator in OPERATORS:
        assert f"\n{operator}, " in printed


def test_forced_backends_are_said(capsys, monkeypatch):
    monkeypatch.setenv("LITV2_OPS", "block=native")
    with use(block="native"):
        assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "LITV2_OPS" in printed.split("\n\n")[0]
    assert section(printed, "block, training, float32 on cpu")[0].startswith("none: block: the backend 'native' is forced")


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["env", "--help"])
    assert ended.value.code == 0 and "which backend computes" in capsys.readouterr().out
