# SPDX-License-Identifier: Apache-2.0
"""Every module imports, alone, and the modules of the library import each other without a circle, from the rooms below."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from helpers import ROOT

# From the lowest to the highest: a room imports from those before it, and from itself.
ROOMS = [
    ["hilo", "litv2.errors", "litv2.files", "litv2.curves", "litv2.compilation", "litv2.classes", "litv2.configurations"],
    ["litv2.pages", "litv2.plain_yaml", "litv2.coco", "litv2.mean_precision"],
    ["litv2.runs"],
    ["mm_modules"],
    ["litv2.ops"],
    ["litv2.attentions"],
    ["litv2.layers"],
    ["litv2.model"],
    ["litv2.preprocess", "litv2.inference", "litv2.weights"],
    ["litv2.image_list", "litv2.image_batches", "litv2.features", "litv2.probes"],
    ["litv2.factory", "litv2.lit"],
    ["litv2.data_check", "litv2.comparison"],
    ["litv2.timm_bridge", "litv2.openmmlab"],
    ["litv2.mm_backbone", "litv2.export"],
    ["litv2.explain"],
    ["litv2.commands", "litv2.__main__"],
    ["litv2"],
]
SCRIPTS = ("setup.py",)  # run by hand, imported by nobody


def modules() -> dict[str, Path]:
    files = [ROOT / "hilo.py", *(ROOT / "litv2").rglob("*.py"), *(ROOT / "mm_modules").rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    return {name: path for path, name in names.items() if path.name not in SCRIPTS and "build" not in name.split(".")[:-1]}


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of ours that a module imports: at its top and inside functions, those for type checkers alone left out."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {module for module in found if module in MODULES} - {name}


def room(name: str) -> int:
    """The number of the room of a module: that with the longest name of those that contain it."""
    fitting = [(len(prefix), i) for i, rooms in enumerate(ROOMS) for prefix in rooms if name == prefix or name.startswith(prefix + ".")]
    return max(fitting)[1]


def test_no_circle():
    """Also not one that is hidden in a function. A circle raises graphlib.CycleError, which names it."""
    order = list(TopologicalSorter({name: imports(name) for name in MODULES}).static_order())
    assert len(order) == len(MODULES) > 50


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_room_imports_from_those_below(name):
    for imported in imports(name):
        assert room(imported) <= room(name), f"{name} imports {imported}, which stands above it"


def test_tables_import_no_readers_and_readers_no_network():
    assert imports("litv2.weights.releases") == {"litv2.errors"}
    reader = imports("litv2.weights.reading") | imports("litv2.weights.state_dict") | imports("litv2.weights.architecture")
    assert "litv2.weights.download" not in reader and "litv2.weights.releases" not in reader


def test_the_library_imports_neither_the_compiler_nor_an_extra():
    """They take longer than the rest of torch."""
    others = ["torch._dynamo", "triton", "timm", "torchvision", "yacs", "PIL"]
    code = f"import sys, litv2; print([name for name in {others} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.extra
def test_every_module_imports_first_and_alone():
    """In any order: each module in a process that has imported nothing of ours before. The process is forked after ``import torch``."""
    names = sorted(name for name in MODULES if not name.endswith("__main__"))
    program = f"""
import importlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, numpy
failed = []
for name in {names}:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except ImportError as error:  # of a package that is an extra
            os._exit(0 if (error.name or "").split(".")[0] not in ("litv2", "mm_modules", "hilo") else 1)
        except BaseException as error:
            print(name, repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print("failed:", failed)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=900)
    assert done.stdout == "failed: []\n", done.stdout + done.stderr
