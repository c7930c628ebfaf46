# SPDX-License-Identifier: Apache-2.0
"""examples/tour.ipynb runs from its first cell to its last, and the pictures that it is committed with are those of its cells."""

from __future__ import annotations

import pytest

from helpers import ROOT

pytestmark = pytest.mark.extra
nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: pip install -r requirements-test.txt")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)


def kinds(notebook) -> list[list[str]]:
    """Of each cell of code, the types of its outputs; warnings, which depend on what is installed, left out."""
    cells = [[output for output in cell.outputs if output.get("name") != "stderr"] for cell in notebook.cells if cell.cell_type == "code"]
    return [sorted(kind for output in outputs for kind in output.get("data", [output.output_type])) for outputs in cells]


def test_tour(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples/tour.ipynb", as_version=4)
    nbformat.validate(notebook)
    committed = kinds(notebook)
    resources = {"metadata": {"path": str(ROOT / "examples")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()  # raises what a cell raises
    assert kinds(notebook) == committed and sum("image/jpeg" in cell for cell in committed) >= 5
    printed = next(output.text for output in notebook.cells[3].outputs if output.get("name") == "stdout")
    confidences = [line.split("%")[0] for line in printed.splitlines()]
    assert len(confidences) == 3 and all(0 < float(value) < 100 for value in confidences)
