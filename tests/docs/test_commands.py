# SPDX-License-Identifier: Apache-2.0
"""Each command that a document shows has the one test that runs it: the test gets it by ``documented``, and the sources of the tests say
which that is. conda and docker are not run, as their tests say."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from command_helpers import run, run_here
from document_helpers import Command, commands, documented
from helpers import ROOT


@cache
def patterns() -> list[tuple[str, str, str]]:
    """Of each call of ``documented`` in the tests: where it stands, the document and the pattern."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        names: dict[str, str] = {}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant):
                names[node.targets[0].id] = node.value.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "documented":
                document, pattern = node.args
                document = names[document.id] if isinstance(document, ast.Name) else document.value
                found.append((f"{path.relative_to(ROOT).as_posix()}:{node.lineno}", document, pattern.value))
    return found


def places_of(command: Command) -> list[str]:
    return [place for place, document, pattern in patterns() if command.matches(document, pattern)]


@pytest.mark.parametrize("command", commands(), ids=str)
def test_each_command_has_its_test(command):
    places = places_of(command)
    advice = f"write one that gets it by documented({command.document!r}, PATTERN) and runs it (tests/command_helpers.py)"
    assert places, f"no test runs {command.line!r} of {command.document}: {advice}"
    assert len(places) == 1, f"more than one test runs {command.line!r} of {command.document}: {', '.join(places)}"


def test_each_test_has_its_command():
    """One without any would be skipped."""
    for place, document, pattern in patterns():
        assert any(command.matches(document, pattern) for command in commands()), f"{place}: no command of {document} is {pattern}"


def test_an_unknown_command_has_no_test():
    for line in ("python", "rm -r output", "litv3 list", "pip uninstall torch", "python main.py --cfg configs/litv2-small.yaml --evaluate"):
        assert places_of(Command("README.md", ROOT, line)) == places_of(Command("classification/README.md", ROOT, line)) == []


@pytest.mark.parametrize(
    "line",
    [
        "python main.py --cfg configs/litv2-small.yaml --dta-path DIR",
        "python main.py --cfg configs/litv2-small.yaml --opts TRAIN.EPOCH 3",
        "python -m litv2 convert FILE",
        "python ../benchmarks/models.py --models litv3_small",
    ],
)
def test_a_wrong_command_is_seen(line, monkeypatch):
    with pytest.raises(AssertionError, match="ended with the status 2"):
        run_here(monkeypatch, Command("classification/README.md", ROOT / "classification", line))


# Those of developers.


@pytest.mark.extra
@pytest.mark.parametrize("command", documented("CONTRIBUTING.md", r"\.venv/bin/python -m pytest -n 0 \S+"), ids=str)
def test_pytest(command):
    """The tests are collected; the whole suite runs them."""
    done = run(command, "--collect-only")
    assert re.search(r"[1-9]\d* tests collected", done.stdout) and command.words[-1] in done.stdout


@pytest.mark.parametrize("command", documented("CONTRIBUTING.md", r"\.venv/bin/ruff check \."), ids=str)
def test_ruff(command):
    assert "All checks passed!" in run(command).stdout
