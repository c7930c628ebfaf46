# SPDX-License-Identifier: Apache-2.0
"""What Windows or macOS lack is not needed at import nor in a normal run. Each run is a process of its own, with those parts hidden."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT, TINY
from litv2 import LITv2

# Modules of POSIX alone, os.open of a folder, fork, and the signals that Windows does not have.
HIDE = """
import os, signal, sys

for name in "fcntl grp pwd resource termios".split():
    sys.modules[name] = None  # an import of it raises ModuleNotFoundError

def open_file(path, *arguments, real=os.open, **keywords):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real(path, *arguments, **keywords)

os.open = open_file
for name in "fork forkpty getuid geteuid getgid getpgid killpg setsid sched_getaffinity sysconf".split():
    delattr(os, name)
for name in [name for name in vars(signal) if name.startswith("SIG") and name not in ("SIG_DFL", "SIG_IGN")]:
    if name not in "SIGABRT SIGFPE SIGILL SIGINT SIGSEGV SIGTERM".split():
        delattr(signal, name)
"""


@pytest.fixture
def hidden(tmp_path):
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide/sitecustomize.py").write_text(HIDE)

    def run(*words) -> str:
        path = os.pathsep.join([str(tmp_path / "hide"), str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": path, "TORCH_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_they_are_hidden(hidden):
    code = "import os\nfor name in 'fcntl resource'.split():\n try: __import__(name)\n except ImportError: print('hidden')\n"
    code += "try: os.open('.', os.O_RDONLY)\nexcept PermissionError: print('hidden')\nprint(hasattr(os, 'fork'))"
    assert hidden("-c", code).split() == ["hidden", "hidden", "hidden", "False"]


def test_every_module_is_importable(hidden):
    """Of the model, its weights and its operators: those that need torch alone."""
    folders = ("litv2", "litv2/ops", "litv2/inference", "litv2/weights", "litv2/commands", "mm_modules", "mm_modules/DCN")
    modules = ["hilo"]
    for folder in folders:
        files = [path for path in sorted((ROOT / folder).glob("*.py")) if path.stem not in ("setup", "__main__", "mm_backbone")]
        modules += [".".join([*Path(folder).parts, path.stem]).removesuffix(".__init__") for path in files]
    hidden("-c", "\n".join(f"import {module}" for module in modules))


def test_inference(hidden):
    code = "import torch, litv2; from hilo import HiLo; torch.manual_seed(0)\n"
    code += f"model = litv2.LITv2(**{TINY}).eval(); x = torch.rand(1, 3, 64, 64)\n"
    code += "with torch.no_grad(): print(model(x).shape, litv2.fuse(model)(x).shape)\n"
    code += "model.train()(x).sum().backward()"
    assert hidden("-c", code).split("\n")[0] == "torch.Size([1, 10]) torch.Size([1, 10])"


@pytest.mark.extra
def test_commands(hidden, tmp_path):
    assert "litv2_small" in hidden("-m", "litv2", "list")
    model = LITv2(**TINY)
    torch.save({"model": model.state_dict()}, tmp_path / "mine.pth")
    assert "parameters" in hidden("-m", "litv2", "info", "mine.pth")
    hidden("-m", "litv2", "convert", "mine.pth", "weights.pth")
    written = torch.load(tmp_path / "weights.pth", weights_only=True)
    written = written.get("model", written)
    assert all(torch.equal(written[name], value) for name, value in model.state_dict().items())
