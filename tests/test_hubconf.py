# SPDX-License-Identifier: Apache-2.0
"""torch.hub on this checkout, from another folder and in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import hubconf
from helpers import ROOT
from litv2 import litv2_small
from litv2.weights.releases import ZOO

CODE = """
import json, sys, torch
root, calls = json.loads(sys.argv[1])
for arguments, options in calls:
    model = torch.hub.load(root, *arguments, source="local", **options)
    parameters, lo_fi = sum(p.numel() for p in model.parameters()), model.layers[2].blocks[0].attn.l_heads
    print(json.dumps([parameters, lo_fi, model.head.weight.double().sum().item()]))
print(json.dumps(sys.modules["litv2"].__file__))
"""
ALPHA_1 = "litv2_small_alpha10"


def hub(folder, *calls) -> tuple[list[list], str]:
    """For each call the parameters, the Lo-Fi heads of stage 3 and the head's sum; and where litv2 came from."""
    environment = {**os.environ, "TORCH_HOME": str(folder)}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", CODE, json.dumps([str(ROOT), calls])]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *models, file = map(json.loads, done.stdout.splitlines())
    return models, file


def test_torch_hub(tmp_path):
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    weights = litv2_small().state_dict()
    torch.save(dict(model=weights), tmp_path / "hub/checkpoints/litv2_s.pth")
    no, yes, ten = dict(pretrained=False), dict(pretrained=True), dict(num_classes=10)
    calls = [[["litv2_small"], no], [["litv2_s"], yes], [["litv2_m"], no], [["litv2", "alpha_0.2"], ten], [["litv2", ALPHA_1], no]]
    models, file = hub(tmp_path, *calls)
    small, pretrained, medium, sweep, lo_fi = models
    for model, name in ((small, "litv2_small"), (pretrained, "litv2_small"), (medium, "litv2_medium")):
        assert f"{model[0] / 1e6:.3f}" == ZOO[name].parameters and model[1] == 10
    assert pretrained[2] == pytest.approx(weights["head.weight"].double().sum().item()) != pytest.approx(small[2])
    assert sweep[1] == 2 and sweep[0] < small[0] - 700_000 and lo_fi[1] == 12
    assert file == str(ROOT / "litv2/__init__.py")


def test_only_models_are_entry_points():
    """What torch.hub.list lists: the callables without an underscore."""
    names = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    release = {entry.file.removesuffix(".pth") for entry in ZOO.values() if entry.path.startswith("v1.0/")}
    assert names == {"litv2", "litv2_small", "litv2_medium", "litv2_base", "litv2_base_384"} | release
