# SPDX-License-Identifier: Apache-2.0
"""Registration with timm whatever is imported first, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers import ROOT
from litv2.weights.releases import ZOO

pytest.importorskip("timm")
NAMES = [name for name, entry in ZOO.items() if entry.task == "classification"]


def python(code: str, *path: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_litv2_before_timm(tmp_path):
    """Importing litv2 does not import timm, and does not need it; a timm that fails does so by itself."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/__init__.py").write_text("raise RuntimeError('broken timm')")
    python(
        f"""
import sys, torch
import litv2
assert "timm" not in sys.modules and "torchvision" not in sys.modules
assert litv2.litv2_small(embed_dim=32, num_heads=(1, 2, 4, 8)).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
import importlib.util
sys.path.insert(0, {str(tmp_path)!r})
assert importlib.util.find_spec("timm").origin.startswith({str(tmp_path)!r})
for _ in range(2):
    try:
        import timm
    except RuntimeError as error:
        assert str(error) == "broken timm"
    else:
        raise AssertionError
sys.modules["timm"] = None
try:
    import timm
except ImportError:
    del sys.modules["timm"]
sys.path.pop(0)
sys.path_importer_cache.clear()
finders = len(sys.meta_path)
import timm.layers
assert len(timm.list_models("litv2*")) == {len(NAMES)} and len(sys.meta_path) == finders - 1
"""
    )


def test_timm_before_litv2():
    out = python("import timm, litv2; print(len(timm.list_models('litv2*')), timm.is_model('litv2_small'))")
    assert f"{len(NAMES)} True" in out and "Overwriting" not in out and "not registered" not in out


def test_a_timm_without_the_registry_is_a_warning(tmp_path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/__init__.py").write_text("__version__ = '0.1'")
    out = python("import litv2, timm; print('timm', timm.__version__)", tmp_path)
    assert "timm 0.1" in out and "LITv2's models are not registered with timm 0.1: ModuleNotFoundError" in out
