"""What can be installed, and under which names."""

from __future__ import annotations

import tomllib

from helpers import ROOT


def test_installable_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tools = project["tool"]["setuptools"]
    assert tools["py-modules"] == ["hilo"] and {name.split(".")[0] for name in tools["packages"]} == {"litv2", "mm_modules"}
    assert project["build-system"]["requires"] == ["setuptools>=68"]
    assert project["project"]["dependencies"] == ["torch>=2.6"]
