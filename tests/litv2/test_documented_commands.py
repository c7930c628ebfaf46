# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 as the documents show it, with random weights for a checkpoint and where a download would put the published ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import litv2
from command_helpers import put_download, run_here
from document_helpers import documented
from helpers import TINY, write_images
from litv2 import LITv2
from litv2.weights.reading import read_checkpoint
from mm_modules.build import why_not

WEIGHTS = "docs/weights.md"
DEPLOYMENT = "docs/deployment.md"


@pytest.fixture
def files(tmp_path, monkeypatch) -> dict[str, Path]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.save({"model": LITv2(**TINY).state_dict()}, tmp_path / "mine.pth")
    image = write_images(tmp_path, {"images": 1}) / "images/0.png"
    return {"FILE": tmp_path / "mine.pth", "IMAGE": image, "weights.safetensors": tmp_path / "weights.safetensors"}


@pytest.fixture
def published(tmp_path) -> None:
    put_download(tmp_path, "litv2_s.pth", {"model": litv2.litv2_small().state_dict()})


@pytest.mark.parametrize("command", documented(WEIGHTS, r"python -m litv2 list"), ids=str)
def test_list(command, monkeypatch, capsys):
    run_here(monkeypatch, command)
    assert "26 files" in capsys.readouterr().out


@pytest.mark.parametrize("command", documented(WEIGHTS, r"python -m litv2 download litv2_small"), ids=str)
def test_download(command, files, published, tmp_path, monkeypatch, capsys):
    """What is there already needs no network; test_download.py has a server."""
    run_here(monkeypatch, command)
    assert capsys.readouterr().out.rstrip().endswith(str(tmp_path / "hub/checkpoints/litv2_s.pth"))


@pytest.mark.parametrize("command", documented(WEIGHTS, r"python -m litv2 info FILE"), ids=str)
def test_info(command, files, monkeypatch, capsys):
    run_here(monkeypatch, command, files=files)
    count = sum(parameter.numel() for parameter in LITv2(**TINY).parameters())
    assert re.search(rf"parameters +{count / 1e6:.3f} M", capsys.readouterr().out)


@pytest.mark.parametrize("command", documented(WEIGHTS, r"python -m litv2 convert FILE weights\.safetensors"), ids=str)
def test_convert(command, files, monkeypatch):
    run_here(monkeypatch, command, files=files)
    before, after = (read_checkpoint(files[name])["model"] for name in ("FILE", "weights.safetensors"))
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("command", documented(WEIGHTS, r"python -m litv2 predict IMAGE --checkpoint litv2_small"), ids=str)
def test_predict(command, files, published, tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, command, "--out", tmp_path / "predictions", files=files)
    first, *classes = capsys.readouterr().out.splitlines()
    assert first == f"{files['IMAGE']} -> {tmp_path / 'predictions/0.png'}" and (tmp_path / "predictions/0.png").is_file()
    assert len(classes) == 5 and all("%  " in line for line in classes)


@pytest.mark.parametrize("command", documented(DEPLOYMENT, r"python -m litv2 build"), ids=str)
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_build(command, monkeypatch, capsys):
    """`make test` has built them: here they are found. test_packaging.py compiles."""
    run_here(monkeypatch, command)
    libraries = [Path(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("where it fits")]
    assert len(libraries) == 2 and all(library.is_file() for library in libraries)


@pytest.mark.parametrize("command", documented(DEPLOYMENT, r"python -m litv2 env"), ids=str)
def test_env(command, monkeypatch, capsys):
    run_here(monkeypatch, command)
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and all(f"\n{operator}, " in printed for operator in litv2.ops.OPERATORS)
