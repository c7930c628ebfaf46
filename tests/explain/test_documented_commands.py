# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 explain as the document shows it, of the classifier that comes with the repository."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from command_helpers import run_here
from document_helpers import documented
from helpers import ROOT, write_images

pytestmark = pytest.mark.extra
pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)

DOCUMENT = "docs/explain.md"


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    folder = write_images(tmp_path / "images", {"noise": 3}, size=160)
    return {"FILE": ROOT / "examples/litv2_imagenette.safetensors", "IMAGE": folder / "noise/0.png", "DIR": folder}


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m litv2 explain IMAGE.*"), ids=str)
def test_explain(command, files, tmp_path, monkeypatch):
    run_here(monkeypatch, command, "--out", tmp_path / "x", files=files)
    what = ["attention-1", "attention-2", "offsets-1", "offsets-2"] if "--at" in command.line else ["attention", "cam", "offsets"]
    spectrum = [] if "--at" in command.line else ["spectrum.npz", "spectrum.png"]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == sorted(["0.npz", *(f"0-{name}.png" for name in what), *spectrum])


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m litv2 explain DIR .*--what spectrum.*"), ids=str)
def test_explain_a_folder(command, files, tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, command, "--out", tmp_path / "x", files=files)
    printed = capsys.readouterr().out
    assert "mean over 3 images" in printed and printed.count(" [") == 7  # two blocks with both branches and their difference, one without
    assert np.load(tmp_path / "x/spectrum.npz")["layers.2.blocks.0.hifi.magnitude"].shape == (11, 11)


@pytest.mark.parametrize("command", documented("benchmarks/README.md", r"python benchmarks/pointing\.py .*"), ids=str)
def test_pointing(command, files, tmp_path, monkeypatch, capsys):
    """Of boxes that are the whole image, everything hits; of none of it that the model sees, nothing."""
    for corner, hits in ((0, "100.0%"), (158, "0.0%")):
        names = [f"noise/{i}.png" for i in range(3)]
        images = [dict(id=i, file_name=name, width=160, height=160) for i, name in enumerate(names)]
        boxes = [dict(image_id=i, category_id=7, bbox=[corner, corner, 160 - corner, 160 - corner], iscrowd=0) for i in range(3)]
        crowd = dict(image_id=0, category_id=7, bbox=[0, 0, 160, 160], iscrowd=1)
        content = dict(images=images, annotations=[*boxes, crowd], categories=[dict(id=7, name="thing")])
        (tmp_path / "annotations.json").write_text(json.dumps(content))
        given = {**files, "ANNOTATIONS.json": tmp_path / "annotations.json", "FOLDER": files["DIR"]}
        run_here(monkeypatch, command, "--out", tmp_path / "pointing", files=given)
        rows = {row["points_at"]: row for row in json.loads((tmp_path / "pointing.json").read_text())["rows"]}
        assert {row["hits"] for row in rows.values()} == {hits} and rows["gradcam"]["over_centre"] == "0.0% to 0.0%"
    assert "pointing game, 3 targets in 3 images" in capsys.readouterr().out
