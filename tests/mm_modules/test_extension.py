# SPDX-License-Identifier: Apache-2.0
"""Where compiled extensions are looked for, and what is said where they are absent or do not fit, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command_helpers import run as run_command
from document_helpers import documented
from helpers import ROOT
from mm_modules import extension
from mm_modules.build import identity, sources_digest, why_not

NAMES = ("mm_modules.DCN._C", "litv2.ops._C")
LOAD = "from mm_modules.extension import load; [print(load(name)) for name in ('mm_modules.DCN._C', 'litv2.ops._C')]"
USE = "import torch; print(torch.ops.litv2.deform_conv2d, torch.ops.litv2.native_hilo)"


@pytest.fixture
def tree(tmp_path) -> Path:
    """The importable packages, with nothing compiled."""
    for name in ("litv2", "mm_modules"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("_C*", "build", "__pycache__"))
    shutil.copy(ROOT / "hilo.py", tmp_path / "tree")
    return tmp_path / "tree"


def run(tree: Path, code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(tree.parent / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def built(name: str) -> Path:
    """The library that the tests run with."""
    if (problem := extension.load(name)) is not None:
        pytest.skip(f"{name} is {problem}")
    return Path(sys.modules[name].__file__)


def place(tree: Path, name: str, file: str = f"_C{extension.SUFFIX}") -> Path:
    return tree.joinpath(*name.split(".")[:-1]) / file


def cached(tree: Path, name: str) -> Path:
    """The place in the cache of ``run``, for the sources as they are."""
    inside = extension.cached_library(name, "some-compiler-1").relative_to(extension.cache_folder())
    library = tree.parent / "cache/litv2" / inside
    library.parent.mkdir(parents=True)
    return library


def test_nothing_is_said_where_nothing_is_built(tree):
    done = run(tree, f"import litv2, mm_modules.DCN, hilo; {LOAD}")
    assert done.stdout.splitlines() == ["not built; `python -m litv2 build` compiles it"] * 2
    assert done.stderr == ""


def test_the_advice_fits_a_tree_without_litv2(tree):
    shutil.rmtree(tree / "litv2")
    done = run(tree, "from mm_modules.extension import load; print(load('mm_modules.DCN._C'))")
    assert done.stdout.strip() == "not built; `cd mm_modules/DCN && python setup.py build_ext --inplace` compiles it"


@pytest.mark.extra
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("command", documented("mm_modules/DCN/README.md", r"python setup\.py build_ext --inplace"), ids=str)
def test_built_in_place(tree, command):
    """In a copy, without the CUDA kernels, which take minutes."""
    assert command.folder == ROOT / "mm_modules/DCN"
    done = run_command(command, folder=tree / "mm_modules/DCN", LITV2_DCN_CUDA="0", PYTHONPATH="")
    assert done.stdout.splitlines()[-1].endswith("CPU kernels, no CUDA kernels: LITV2_DCN_CUDA=0")
    assert run(tree, LOAD).stdout.splitlines()[0] == "None" and place(tree, NAMES[0]).is_file()


def another_torch(name: str, library: Path) -> str:
    content = built(name).read_bytes()
    version = torch.__version__.partition("+")[0]
    text = f"built for torch {version} from"
    assert content.count(text.encode()) == 1
    library.write_bytes(content.replace(text.encode(), f"built for torch 1{version[1:]} from".encode()))
    return f"is for torch 1{version[1:]}, not {version}"


def other_sources(name: str, library: Path) -> str:
    shutil.copy(built(name), library)
    csrc = library.parent / "csrc"
    (csrc / "sample.h" if name == NAMES[0] else csrc / "hilo.cpp").open("a").write("// changed\n")
    return "was compiled from different sources"


def missing_symbols(name: str, library: Path) -> str:
    """A library with a symbol that this torch lacks, which says of itself that it fits."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    text = identity(torch.__version__.partition("+")[0], sources_digest(name))
    source = library.with_name("another.c")
    source.write_text(f'void gone_from_torch(void); const char text[] = "{text}"; void *PyInit__C(void) {{ gone_from_torch(); return 0; }}')
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return "gone_from_torch"


def another_processor(name: str, library: Path) -> str:
    text = identity(torch.__version__.partition("+")[0], sources_digest(name))
    library.write_bytes(b"\x7fELF" + bytes(60) + text.encode())
    return f"{library.name} cannot be loaded"


def another_python(name: str, library: Path) -> str:
    library.with_name("_C.cpython-39-x86_64-linux-gnu.so").touch()
    return "_C.cpython-39-x86_64-linux-gnu.so"


@pytest.mark.extra
@pytest.mark.parametrize("damage", [another_torch, other_sources, missing_symbols, another_processor, another_python])
@pytest.mark.parametrize("name", NAMES)
def test_one_line_where_it_is_built_for_something_else(tree, name, damage):
    words = damage(name, place(tree, name))
    done = run(tree, f"from mm_modules.extension import load; print(load({name!r})); load({name!r})")
    (line,) = done.stderr.splitlines()
    problem = done.stdout.strip()
    assert problem.startswith("unusable: ") and words in problem
    assert f"{name} is {problem}. Until then, slower operators compute the same results." in line
    assert "`python -m litv2 build`" in line


def test_the_cache_is_used(tree):
    """Both extensions, which register operators under the same name, from there."""
    for name in NAMES:
        shutil.copy(built(name), cached(tree, name))
    done = run(tree, f"{LOAD}; {USE}")
    assert done.stdout.splitlines() == ["None", "None", "litv2.deform_conv2d litv2.native_hilo"] and done.stderr == ""


def test_the_cache_stands_in_for_a_library_that_does_not_fit(tree):
    name = NAMES[0]
    another_processor(name, place(tree, name))
    shutil.copy(built(name), cached(tree, name))
    done = run(tree, f"from mm_modules.extension import load; print(load({name!r}))")
    assert done.stdout.strip() == "None" and done.stderr == ""


@pytest.mark.parametrize("file", ["litv2/ops/csrc/hilo.cpp", "mm_modules/DCN/csrc/sample.h"])
def test_other_sources_are_another_library(tree, file):
    name = "litv2.ops._C"
    shutil.copy(built(name), cached(tree, name))
    with open(tree / file, "a") as source:
        source.write("\n")
    assert run(tree, f"from mm_modules.extension import load; print(load({name!r}))").stdout.startswith("not built")


def test_a_process_without_a_home_folder(tree):
    """Nothing but the cache needs one."""
    code = "from pathlib import Path\ndef home(): raise RuntimeError('Could not determine home directory.')\n"
    code += "import os, sys; os.environ.pop('XDG_CACHE_HOME'); sys.platform = 'linux'; Path.home = home\n"
    assert run(tree, code + LOAD).stdout.count("not built") == 2


@pytest.mark.parametrize(
    "platform, variables, expected",
    [
        ("linux", {}, "home/.cache/litv2"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/litv2"),
        ("linux", {"XDG_CACHE_HOME": ""}, "home/.cache/litv2"),
        ("darwin", {}, "home/Library/Caches/litv2"),
        ("win32", {}, "home/AppData/Local/litv2/cache"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/litv2/cache"),
    ],
)
def test_cache_folder(platform, variables, expected, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert extension.cache_folder() == Path(expected)
